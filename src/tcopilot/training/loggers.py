"""wandb's run of a job, which a resumed run goes on with."""

import json
import netrc
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from tcopilot.run_directory import RunDirectory, write_whole

STEPS_PER_ROUND = 4  # the most lines that go to wandb in a round
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class WandbRun(WandbLogger):
    """One wandb run per run directory, whose curves go on after `train.py resume=`.

    Without credentials the run is offline, unless WANDB_MODE says otherwise. Its id is kept in the run directory, its
    config is the `config.yaml` there, and all figures are drawn over `round`. The runs of a sweep are grouped by the
    sweep's folder instead of by `group`.
    """

    def __init__(self, folder: str, project: str, group: str | None = None, job_type: str = "train") -> None:
        super().__init__(project=project, save_dir=folder, group=group, job_type=job_type)
        self.run = RunDirectory(folder)
        self._round = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The open run; opened on first use, in the first process only."""
        if self._experiment is None and getattr(self, "_attach_id", None) is None:
            self._experiment = self._open()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a line at the round that it names, else at the round of the previous line."""
        run = self.experiment
        self._round = int(metrics.get("round", self._round))
        # wandb's own step must only grow, also from one offline part of a resumed run to the next
        own_step = max(run.step, STEPS_PER_ROUND * self._round)
        run.log({**metrics, "round": self._round}, step=own_step, commit=True)

    def _open(self) -> Any:
        import wandb

        here = str(self.run.folder.absolute())
        saved = OmegaConf.load(self.run.config)
        OmegaConf.update(saved, "paths.run_dir", here)
        config = OmegaConf.to_container(saved, resolve=True)
        swept = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        group = str(HydraConfig.get().sweep.dir) if swept else self._wandb_init.get("group")
        identity = {"group": group, "folder": here}
        if config.get("resume") and self.run.wandb.exists():
            identity |= json.loads(self.run.wandb.read_text())
        original = RunDirectory(identity["folder"]).wandb
        if "id" not in identity or (original.exists() and not original.samefile(self.run.wandb)):  # new, or a copy
            identity["id"] = secrets.token_hex(4)
        write_whole(self.run.wandb, json.dumps({**identity, "folder": here}) + "\n")
        del identity["folder"]
        mode = os.environ.get("WANDB_MODE") or (None if has_credentials() else "offline")  # None: wandb's own settings
        options = self._wandb_init | identity | {"config": config, "mode": mode, "reinit": "finish_previous"}
        options.pop("anonymous", None)  # Lightning passes it, wandb warns of it
        run = wandb.init(**options)
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        return run


def has_credentials() -> bool:
    """Whether wandb can log in: by an environment variable, or by the entry that `wandb login` writes."""
    if any(os.environ.get(name) for name in CREDENTIALS):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False


@contextmanager
def closing_wandb() -> Iterator[None]:
    """Close wandb's run with the job, so that the next job of a sweep opens its own; an error marks it as failed."""
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            # A clean stop, which ends in SystemExit, is no failure: the run goes on later.
            wandb.finish(exit_code=int(not isinstance(sys.exception(), SystemExit | None)))
