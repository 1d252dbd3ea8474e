"""What a run prints: three lines before training, the tables at the end, and nothing of libraries in between."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from tcopilot.app.build import Prepared
from tcopilot.app.checks.data import log_bytes
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.memory.estimate import Budget, bytes_text
from tcopilot.data.summary import summary_table
from tcopilot.evaluation.results import Results, gain_table, selection_table, weight_table
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.processes import is_first
from tcopilot.reporting.tables import accept_any_sign
from tcopilot.training.fit import RecordedData


def show_summary(
    cfg: DictConfig,
    prepared: Prepared,
    model: TCopilotModel,
    params: dict[str, int],
    rounds: int,
    memory: Budget | None,
    idle: Sequence[str] = (),
) -> None:
    """Say before training what is trained, what the log keeps and how large it grows, memory, budget and idle keys.

    Raises:
        ConfigError: if the log's storage cannot keep this Pilot's p̂.
    """
    try:
        kept = None
        if prepared.log is not None:
            kept = prepared.log.describe(model.pilot, model.copilot.pooler.keeps_source)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if not is_first():
        return
    table = Table(title="Transformer Copilot", show_header=False)
    for name in ("pilot", "copilot"):
        table.add_row(f"{name} parameters", f"{params[f'{name}_trainable']:,} trainable of {params[name]:,}")
    if prepared.log is not None:
        size = bytes_text(log_bytes(cfg, prepared.pilot, prepared.data, prepared.log))
        table.add_row("a record keeps", kept)
        table.add_row("full Mistake Log", f"{size}, {min(prepared.log.capacity_rounds, rounds)} rounds")
    if memory is not None:
        table.add_row("memory", str(memory))
    rows = "stream" if prepared.data.train_rows is None else f"{prepared.data.train_rows:,} training rows"
    if prepared.data.held_out:
        rows += f", {prepared.data.held_out_rows:,} held out for the log"
    if prepared.data.rounds is not None and prepared.data.epochs is not None:
        rows += f"; rounds={rounds} counts, data.epochs={prepared.data.epochs:g} does not (rounds=null makes it count)"
    table.add_row("budget", f"{rounds:,} rounds of {cfg.data.batch_size} rows; {rows}")
    if idle:
        table.add_row("not used here", ", ".join(idle))
    table.add_row("run directory", str(cfg.paths.run_dir))
    _console().print(table, summary_table(prepared.data.summary()))


def show_fit(
    cfg: DictConfig, prepared: Prepared, params: dict[str, int], data: RecordedData, idle: Sequence[str]
) -> None:
    """Say before a fit what a record holds and takes, what is still to be recorded, the budget and idle keys."""
    if not is_first():
        return
    table = Table(title="Transformer Copilot, frozen Pilot", show_header=False)
    table.add_row("pilot parameters", f"{params['pilot']:,}, all frozen")
    table.add_row("copilot parameters", f"{params['copilot_trainable']:,} trainable")
    about, rows = data.recording.pilot, len(data.train) + len(data.validation)
    size = about.bytes_per_token * (sum(data.train.lengths) + sum(data.validation.lengths)) / rows
    depths = ", ".join(f"{depth:g}" for depth in about.depths)
    table.add_row(
        "a record keeps", f"states ({about.dtype}) at depths {depths} for each target token, and p̂ by its head"
    )
    table.add_row("recording", f"{size / 1e3:.1f} kB a row, {1e9 / size:,.0f} rows in 1 GB: {data.recording.folder}")
    table.add_row("to be recorded", f"{len(data.missing):,} of {rows:,} rows")
    table.add_row("budget", f"at most {cfg.copilot.passes} passes of {data.updates_per_pass} updates")
    if idle:
        table.add_row("not used here", ", ".join(idle))
    table.add_row("run directory", str(cfg.paths.run_dir))
    _console().print(table, summary_table(prepared.data.summary()))


def show_results(results: Results, path: Path) -> None:
    """Print the tables, the notes and, as the last line, where the figures are."""
    if not is_first():
        return
    chosen = [selection_table(results)] if results.selection else []
    for part in (weight_table(results), *chosen, gain_table(results), *results.notes):
        _console().print(part)
    print(f"results: {path}", flush=True)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def quiet_libraries() -> None:
    """Silence what a user of this program can do nothing about; warnings of our own and of torch stay."""
    accept_any_sign()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # hardware list, tips
    for message in (
        ".*does not have many workers.*",  # rows are in memory; a loader process would only copy them
        ".*set_vital.*",  # torchdata 0.11 on torch 2.13
        ".*treespec.*",  # lightning 2.6 on torch 2.13
        ".*Experiment logs directory.*",  # the run directory also holds config.yaml
        ".*sync_dist=True.*",  # what is logged is summed over processes already
    ):
        warnings.filterwarnings("ignore", message=message)
