"""Logging of the final evaluation to dashboards: gains, the curve over λ, and answers side by side.

`docs/metrics.md` names every figure with its unit and reduction.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from tcopilot.evaluation.outcomes import OUTCOMES, Answers, answers_of_both, answers_table
from tcopilot.evaluation.results import Results
from tcopilot.reporting.tables import markdown_table, without_formulas
from tcopilot.run_directory import RunDirectory, write_whole

SHOWN = 200  # rows in the table of generations
WEIGHT_COLUMNS = ["benchmark", "split", "metric", "weight", "value", "ci95_low", "ci95_high", "n", "selected"]


@rank_zero_only
def log_evaluation(loggers: Sequence[Logger], results: Results, run_dir: str | Path, most: int = SHOWN) -> None:
    """Log the final evaluation to every logger, and write its tables.

    Loggers show `weights.csv` and `generations.csv`, the latter with at most `most` rows; the files beside the
    predictions hold all answers of both models.
    """
    run = RunDirectory(run_dir)
    figures: dict[str, float] = {"round": float(results.rounds)}
    for gain in results.gain:
        columns = {
            "pilot": gain.pilot, "fused": gain.fused, "gain": gain.difference, "gain_low": gain.ci95[0],
            "gain_high": gain.ci95[1], "p_value": gain.p_value, "selected_weight": results.weight_of(gain.benchmark),
        }  # fmt: skip
        if gain.fixed is not None:
            columns |= {"fixed": float(gain.fixed), "broken": float(gain.broken)}
        figures |= {f"eval/{gain.benchmark}/{gain.metric}/{name}": value for name, value in columns.items()}
    weights = results.table()
    weights["selected"] = [row.weight == results.weight_of(row.benchmark) for row in results.rows]
    weights = weights[WEIGHT_COLUMNS]
    generations = pd.DataFrame(side_by_side(results, run.predictions, most), columns=list(Answers._fields))
    tables = {run.weights: weights, run.generations: generations}
    if len(answers := answers_table(results, run.predictions)):
        tables[run.answers] = answers
        write_whole(run.answers_exact, answers.to_parquet(index=False))
    for path, table in tables.items():
        write_whole(path, without_formulas(table).to_csv(index=False, lineterminator="\r\n"))
    for logger in loggers:
        logger.log_metrics(figures, step=results.rounds)
        if isinstance(logger, WandbLogger):
            _show_on_wandb(logger, results, weights, generations)
        elif isinstance(logger, TensorBoardLogger):
            _show_on_tensorboard(logger, results, generations, run)
        logger.finalize("success")  # flushes


def side_by_side(results: Results, predictions: Path, most: int = SHOWN) -> list[Answers]:
    """Select at most `most` rows with the answers of Pilot and fused model; rows that the Copilot changed come first.

    They are drawn evenly from benchmarks and, within each, from outcomes, as far as there are rows, so that shares of
    outcomes in this table are not representative of the split.
    """
    benchmarks, shown = results.benchmarks, list[Answers]()
    for place, name in enumerate(benchmarks):
        room = (most - len(shown)) // (len(benchmarks) - place)
        rows = answers_of_both(results, predictions, name)
        of_each = {kind: [row for row in rows if row.outcome == kind] for kind in OUTCOMES}
        ranked = sorted((place, kind) for kind, some in of_each.items() for place in range(len(some)))[:room]
        shown += [row for kind, some in of_each.items() for row in some[: sum(other == kind for _, other in ranked)]]
    return shown


def _show_on_wandb(logger: WandbLogger, results: Results, weights: pd.DataFrame, generations: pd.DataFrame) -> None:
    import wandb

    shown: dict[str, Any] = {
        name: wandb.Table(columns=list(table), data=[list(row) for row in table.itertuples(index=False)])
        for name, table in {"eval/weights": weights, "eval/generations": generations}.items()
    }
    for (benchmark, metric), rows in weights.groupby(["benchmark", "metric"], sort=False):
        lines = dict(list(rows.groupby("split", sort=False)))
        xs, ys = ([line[axis].tolist() for line in lines.values()] for axis in ("weight", "value"))
        title = f"{benchmark}/{metric}"
        shown[f"eval/curve/{title}"] = wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=title, xname="λ")
    logger.log_metrics({"round": results.rounds, **shown})


def _show_on_tensorboard(
    logger: TensorBoardLogger, results: Results, generations: pd.DataFrame, run: RunDirectory
) -> None:
    for row in results.rows:
        tag = f"weights/{row.benchmark}/{row.split}/{row.metric}"
        logger.experiment.add_scalar(tag, row.value, global_step=round(1000 * row.weight))
    rows = [[str(value).replace("\n", "<br>") for value in row] for row in generations.itertuples(index=False)]
    logger.experiment.add_text("eval/generations", markdown_table(list(generations), rows), results.rounds)
    config = "\n".join(f"    {line}" for line in run.config.read_text(encoding="utf-8").splitlines())
    logger.experiment.add_text("config", config, results.rounds)
