"""Joint training, Algorithm 1: from a prepared run to its trained models, with a clean stop and a resume."""

import csv
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from tcopilot import processes
from tcopilot.app import build
from tcopilot.app.build import Prepared
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.console import show_summary
from tcopilot.app.jobs import STOPPED
from tcopilot.app.memory.estimate import Budget
from tcopilot.app.trainer import make_callbacks, make_trainer
from tcopilot.mistake_log.recording import Recording
from tcopilot.models.adapters import merge_adapters
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.quantization import is_quantised
from tcopilot.processes import agree_on, rank, refuse_differences
from tcopilot.run_directory import RunDirectory, flatten
from tcopilot.training.callbacks import FlopCount, GracefulStop, RoundCheckpoint
from tcopilot.training.checkpoints import checkpoints, newest_good, round_of
from tcopilot.training.module import TCopilotModule, TrainingDivergedError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained model and what its training took, in the terms of `results.json`."""

    model: TCopilotModel
    rounds: int
    train_seconds: float
    train_flops: float | None
    params: dict[str, int] = field(default_factory=dict)
    loggers: list[Logger] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recording: Recording | None = None
    recording_flops: float | None = None

    @property
    def costs(self) -> dict[str, Any]:
        """The figures of training that an evaluation cannot know."""
        return {name: getattr(self, name) for name in ("rounds", "train_seconds", "train_flops")}


def train_jointly(cfg: DictConfig, prepared: Prepared, memory: Budget | None) -> Trained:
    """Build both models and run all rounds."""
    model = build.fused_model(prepared.config, prepared)
    module = build.training_module(prepared.config, model, prepared.data.total_rounds)
    params = build.parameter_counts(model)  # now that a frozen Pilot is frozen
    if rank():
        seed_everything(cfg.seed + rank(), workers=True, verbose=False)  # every process draws its own dropout
    show_summary(cfg, prepared, model, params, memory)
    _fit(cfg, prepared, module)

    model.to(module.trainer.strategy.root_device)  # Lightning leaves it on the CPU
    for part in (model.pilot, model.copilot):
        if part is not None and not is_quantised(part):
            merge_adapters(part)
    seconds = agree_on(round(sum(module.seconds.values()), 2))
    counts = (callback for callback in module.trainer.callbacks if isinstance(callback, FlopCount))
    flops = next((count.total() for count in counts), None)
    return Trained(model, module.round, seconds, flops, params, module.trainer.loggers)


def _fit(cfg: DictConfig, prepared: Prepared, module: TCopilotModule) -> None:
    shared = {"data": prepared.data.fingerprint()} | flatten(OmegaConf.to_container(cfg, resolve=True))
    callbacks = [LambdaCallback(setup=lambda trainer, module, stage: refuse_differences(shared)), *make_callbacks(cfg)]
    trainer = make_trainer(cfg, callbacks, prepared.log, module.rounds)
    stop = next((c for c in callbacks if isinstance(c, GracefulStop)), None)
    saver = next((c for c in callbacks if isinstance(c, RoundCheckpoint)), None)
    run, start = RunDirectory(cfg.paths.run_dir), _newest_checkpoint(cfg, trainer.world_size)
    if problem := processes.address_problem(trainer.world_size, trainer.num_nodes):
        raise ConfigError([problem])
    processes.expect_others(trainer.world_size)
    if start is not None and round_of(start) >= module.rounds:
        log.warning("resume=%s: all %d rounds are done; rounds=<more> goes on with it", cfg.resume, module.rounds)
    if start is not None:
        _keep_metrics(trainer, run.metrics, round_of(start))
    try:
        trainer.fit(module, datamodule=prepared.data, ckpt_path=start, weights_only=True)
    except TrainingDivergedError as error:
        saved = checkpoints(saver.folder) if saver else []
        go_on = f"Go on with: {run.go_on} pilot.optimizer.lr=<lower>"
        last = f"{go_on}. Last good state: {saved[-1]}" if saved else "No state had been saved yet"
        raise TrainingDivergedError(f"{error}. {last}") from None
    except SystemExit as end:  # how Lightning ends at a second Ctrl-C, and at any signal before the first round
        if isinstance(end, SIGTERMException) or isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if stop is not None and stop.requested:
        go_on = (
            f"Go on with: {run.go_on}" if saver else "It cannot go on: no state is saved without callbacks.checkpoint"
        )
        log.info("Stopped after round %d. %s", module.round, go_on)
        sys.exit(STOPPED)


def _newest_checkpoint(cfg: DictConfig, world_size: int) -> Path | None:
    if not cfg.get("resume"):
        return None
    newest = newest_good(RunDirectory(cfg.resume).checkpoints, world_size)
    if newest is None:
        raise ConfigError([f"resume={cfg.resume}: no checkpoint in {cfg.resume}/checkpoints; start the run anew"])
    return newest


def _keep_metrics(trainer: Trainer, path: Path, rounds: int) -> None:
    """Hand the lines of the rounds done to the CSV logger of a resumed run, which would delete the file it finds."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        lines = [{key: value for key, value in line.items() if key and value} for line in csv.DictReader(file)]
    done = [line for line in lines if line.get("step", "").isdigit() and int(line["step"]) < rounds]  # from step 0
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            logger.experiment.metrics += done
            logger.experiment.save()
