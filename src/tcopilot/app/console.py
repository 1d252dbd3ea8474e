"""What a run prints: three lines before training, the tables at the end, and no messages of libraries in between."""

import logging
import sys
import warnings
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from tcopilot.app.build import Prepared
from tcopilot.app.checks.data import log_bytes, record_bytes
from tcopilot.app.checks.groups import given_overrides, plain_config
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.checks.unused import idle_overrides
from tcopilot.app.memory.estimate import Budget, bytes_text
from tcopilot.data.summary import summary_table
from tcopilot.evaluation.results import Results
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.processes import is_first
from tcopilot.reporting.run_tables import gain_table, selection_table, weight_table
from tcopilot.reporting.tables import accept_any_sign
from tcopilot.training.recorded_data import RecordedData


def show_summary(
    cfg: DictConfig, prepared: Prepared, model: TCopilotModel, params: dict[str, int], memory: Budget | None
) -> None:
    """Say before training what is trained, what the log keeps and how large it grows, memory, budget and unused keys.

    Raises:
        ConfigError: if the log's storage cannot keep this Pilot's p̂.
    """
    log, data, rows = prepared.log, prepared.data, {}
    rounds = data.total_rounds
    for name in ("pilot", "copilot"):
        rows[f"{name} parameters"] = f"{params[f'{name}_trainable']:,} trainable of {params[name]:,}"
    if log is not None:
        try:
            rows["a record keeps"] = log.describe(model.pilot, model.copilot.pooler)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        size, record = (measure(cfg, prepared.pilot, data, log) for measure in (log_bytes, record_bytes))
        rows["full Mistake Log"] = f"{bytes_text(size)}, {min(log.capacity_rounds, rounds)} rounds; {_per_row(record)}"
    if memory is not None:
        rows["memory"] = str(memory)
    read = "stream" if data.train_rows is None else f"{data.train_rows:,} training rows"
    if data.held_out:
        read += f", {data.held_out_rows:,} held out for the log"
    if data.rounds is not None and data.epochs is not None:
        read += f"; rounds={rounds} counts, data.epochs={data.epochs:g} does not (rounds=null makes it count)"
    rows["budget"] = f"{rounds:,} rounds of {cfg.data.batch_size} rows; {read}"
    _show(cfg, prepared, "Transformer Copilot", rows)


def show_fit(cfg: DictConfig, prepared: Prepared, params: dict[str, int], data: RecordedData) -> None:
    """Say before a fit what a record holds, its size, what is still to be recorded, the budget and unused keys."""
    about, rows = data.recording.pilot, len(data.train) + len(data.validation)
    size = about.bytes_per_token * (data.train.tokens + data.validation.tokens) / rows
    depths = ", ".join(f"{depth:g}" for depth in about.depths)
    more = data.distinct > len(data.train.keys | data.validation.keys)
    what = "rows, options and rows to report on included" if more else "rows to learn from and to validate on"
    shown = {
        "pilot parameters": f"{params['pilot']:,}, all frozen",
        "copilot parameters": f"{params['copilot_trainable']:,} trainable",
        "a record keeps": f"states ({about.dtype}) at depths {depths} for each target token, and p̂ by its head",
        "recording": f"{_per_row(size)}: {data.recording.folder}",
        "to be recorded": f"{len(data.missing):,} of {data.distinct:,} {what}",
        "budget": f"at most {cfg.copilot.passes} passes of {data.updates_per_pass} updates",
    }
    _show(cfg, prepared, "Transformer Copilot, frozen Pilot", shown)


def _per_row(size: float) -> str:
    return f"{size / 1e3:.1f} kB a row, {1e9 / size:,.0f} rows in 1 GB"


def _show(cfg: DictConfig, prepared: Prepared, title: str, rows: dict[str, str]) -> None:
    """Print a summary, with the settings that the models now built have no use for, and the table of the data."""
    if not is_first():
        return
    if idle := idle_overrides(cfg, prepared.read, prepared.data, given_overrides(), plain_config(cfg)):
        rows["not used here"] = ", ".join(idle)
    table = Table(title=title, show_header=False)
    for row in (rows | {"run directory": str(cfg.paths.run_dir)}).items():
        table.add_row(*row)
    _console().print(table, summary_table(prepared.data.summary()))
    sys.stdout.flush()  # a log file would otherwise show it at the end only


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
    """Silence messages that a user of this program can do nothing about; its own warnings and torch's stay."""
    accept_any_sign()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # hardware list, tips
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that a kernel for this CPU is not installed
    for message in (
        ".*does not have many workers.*",  # rows are in memory; a loader process would only copy them
        ".*in eval mode at the start of training.*",  # the module says which of its parts train
        ".*set_vital.*",  # torchdata 0.11 on torch 2.13
        ".*treespec.*",  # lightning 2.6 on torch 2.13
        ".*Experiment logs directory.*",  # the run directory also holds config.yaml
        ".*sync_dist=True.*",  # what is logged is summed over processes already
    ):
        warnings.filterwarnings("ignore", message=message)
