"""What dashboards show: wandb's run of a job, and the final evaluation on every logger.

`docs/metrics.md` names every figure with its unit and reduction.
"""

from __future__ import annotations

import csv
import json
import netrc
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from tcopilot.evaluation.outcomes import OUTCOMES, answer_text, outcome, read_predictions
from tcopilot.evaluation.results import Results

SHOWN = 200  # rows of the table of generations
STEPS_PER_ROUND = 4  # at most so many lines go to wandb in a round
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
WEIGHT_COLUMNS = ("benchmark", "split", "metric", "weight", "value", "ci95_low", "ci95_high", "n", "selected")
GENERATION_COLUMNS = ("benchmark", "id", "prompt", "target", "pilot", "fused", "outcome")


class WandbRun(WandbLogger):
    """One wandb run per run directory, whose curves go on after `train.py resume=`.

    It is offline by itself where there are no credentials, unless WANDB_MODE says otherwise. The run's id lies in the
    run directory, the config is the `config.yaml` there, and all figures are drawn over `round`.

    Args:
        folder: the run directory.
        project: of wandb.
        group: what the runs of a sweep are told apart by from others'; a sweep's own folder takes its place.
        job_type: shown in wandb's table of runs.
    """

    def __init__(self, folder: str, project: str, group: str | None = None, job_type: str = "train") -> None:
        super().__init__(project=project, save_dir=folder, group=group, job_type=job_type)
        self.folder = Path(folder)
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
        """Log a line at the round that it names, or else at that of the line before."""
        run = self.experiment
        self._round = int(metrics.get("round", self._round))
        # wandb's own step must only grow, also from one offline part of a resumed run to the next
        own_step = max(run.step, STEPS_PER_ROUND * self._round)
        run.log({**metrics, "round": self._round}, step=own_step, commit=True)

    def _open(self) -> Any:
        import wandb

        config = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"), resolve=True)
        file = self.folder / "wandb.json"
        if config.get("resume") and file.exists():
            identity = json.loads(file.read_text())
        else:
            identity = {"id": secrets.token_hex(4), "group": _sweep() or self._wandb_init.get("group")}
            file.write_text(json.dumps(identity) + "\n")
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
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


@contextmanager
def closing_wandb() -> Iterator[None]:
    """Close wandb's run with the job, so that the next job of a sweep opens its own; errors mark it as failed."""
    failed = True
    try:
        yield
        failed = False
    except SystemExit:  # a clean stop is no failure: the run goes on later
        failed = False
        raise
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))


@rank_zero_only
def log_evaluation(loggers: Sequence[Logger], results: Results, run_dir: str | Path) -> None:
    """Show the final evaluation: the gain, the curve over λ, and answers side by side.

    Both tables are also written as `weights.csv` and `generations.csv`.

    Args:
        loggers: of the Trainer.
        results: what the run found.
        run_dir: where its predictions lie and the tables go.
    """
    run_dir = Path(run_dir)
    figures: dict[str, float] = {"round": float(results.rounds)}
    for gain in results.gain:
        low, high = gain.ci95
        columns = {
            "pilot": gain.pilot, "fused": gain.fused, "gain": gain.difference, "gain_low": low, "gain_high": high,
            "p_value": gain.p_value, "selected_weight": results.weight_of(gain.benchmark),
        }  # fmt: skip
        if gain.fixed is not None:
            columns |= {"fixed": float(gain.fixed), "broken": float(gain.broken)}
        figures |= {f"eval/{gain.benchmark}/{gain.metric}/{name}": value for name, value in columns.items()}
    weights = [
        (*(row.benchmark, row.split, row.metric, row.weight, row.value, *row.ci95, row.n),
         row.weight == results.weight_of(row.benchmark))
        for row in results.rows
    ]  # fmt: skip
    generations = side_by_side(results, run_dir / "predictions")
    _write(run_dir / "weights.csv", WEIGHT_COLUMNS, weights)
    _write(run_dir / "generations.csv", GENERATION_COLUMNS, generations)
    for logger in loggers:
        logger.log_metrics(figures, step=results.rounds)
        if isinstance(logger, WandbLogger):
            _show_on_wandb(logger, results, weights, generations)
        elif isinstance(logger, TensorBoardLogger):
            _show_on_tensorboard(logger, results, generations, run_dir)
        logger.finalize("success")  # flushes


def side_by_side(results: Results, folder: Path) -> list[tuple[Any, ...]]:
    """Answers of Pilot and fused model to the same rows, as rows of `GENERATION_COLUMNS`.

    At most `SHOWN`, shared out evenly among benchmarks and then among outcomes as far as there are rows, so shares in
    this table are not those of the split.
    """
    benchmarks = list(dict.fromkeys(gain.benchmark for gain in results.gain))
    shown: list[tuple[Any, ...]] = []
    for place, name in enumerate(benchmarks):
        room = (SHOWN - len(shown)) // (len(benchmarks) - place)
        pilot, fused = (read_predictions(results, folder, name, w) for w in (0.0, results.weight_of(name) or 0.0))
        rows = [
            (name, number, said["prompt"], said["target"], answer_text(said), answer_text(fused[number]),
             outcome(said, fused[number], results.row_wise().get(name)))
            for number, said in pilot.items()
            if number in fused
        ]  # fmt: skip
        shown += _even(rows, room)
    return shown


def _even(rows: Sequence[tuple[Any, ...]], room: int) -> list[tuple[Any, ...]]:
    """So many rows, as evenly over outcomes as there are rows; what the Copilot changed comes first."""
    of_each = {kind: [row for row in rows if row[-1] == kind] for kind in OUTCOMES}
    ranked = sorted((place, row[-1]) for some in of_each.values() for place, row in enumerate(some))[:room]
    return [row for kind, some in of_each.items() for row in some[: sum(other == kind for _, other in ranked)]]


def _show_on_wandb(logger: WandbLogger, results: Results, weights: Sequence, generations: Sequence) -> None:
    import wandb

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in results.rows:
        lines = curves.setdefault(f"eval/curve/{row.benchmark}/{row.metric}", {})
        lines.setdefault(row.split, []).append((row.weight, row.value))
    shown: dict[str, Any] = {
        "eval/weights": wandb.Table(columns=list(WEIGHT_COLUMNS), data=[list(row) for row in weights]),
        "eval/generations": wandb.Table(columns=list(GENERATION_COLUMNS), data=[list(row) for row in generations]),
    }
    for name, lines in curves.items():
        points = [list(zip(*line, strict=True)) for line in lines.values()]
        xs, ys = ([list(axes[i]) for axes in points] for i in (0, 1))
        title = name.removeprefix("eval/curve/")
        shown[name] = wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=title, xname="λ")
    logger.log_metrics({"round": results.rounds, **shown})


def _show_on_tensorboard(logger: TensorBoardLogger, results: Results, generations: Sequence, run_dir: Path) -> None:
    writer = logger.experiment
    for row in results.rows:
        tag = f"weights/{row.benchmark}/{row.split}/{row.metric}"
        writer.add_scalar(tag, row.value, global_step=round(1000 * row.weight))
    table = [GENERATION_COLUMNS, ["---"] * len(GENERATION_COLUMNS), *generations]
    writer.add_text(
        "eval/generations", "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table), results.rounds
    )
    config = "\n".join(f"    {line}" for line in (run_dir / "config.yaml").read_text(encoding="utf-8").splitlines())
    writer.add_text("config", config, results.rounds)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _sweep() -> str | None:
    """The sweep's folder, or None outside of one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return str(HydraConfig.get().sweep.dir)
