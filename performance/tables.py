"""The tables of all measurements: which columns their rows have, on the terminal and in docs/performance.md."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def show(title: str, rows: Sequence[Row], columns: Columns) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def markdown(rows: Sequence[Row], columns: Columns) -> str:
    """Write rows as a Markdown table."""
    cells = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def write(file: Path | None, found: Any) -> None:
    """Write what was found as JSON, if a file is asked for."""
    if file is not None:
        file.write_text(json.dumps(found, indent=1))


def of(key: str, form: str = "{}") -> Callable[[Row], str]:
    """The cell of a figure; empty where there is none."""
    return lambda row: "" if row.get(key) is None else form.format(row[key])


def _mb(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 1e6:,.1f}" if row[key] else ""


ROUND: Columns = {
    "Pilot": of("pilot"), "Copilot": of("copilot"), "prompt M": of("source"), "target N": of("target"),
    "joint : Pilot alone": of("ratio", "{:.2f}"), "FLOP floor": of("floor", "{:.2f}"),
    "overhead": of("overhead", "{:.2f}"), "Pilot alone : HF Trainer": of("trainer", "{:.2f}"),
}  # fmt: skip
DECODE: Columns = {
    "Pilot": of("architecture"), "prompt": of("prompt"), "answer": of("answer"), "batch": of("batch"),
    "beams": of("beams"), "ours, λ = 0": of("pilot", "{:.2f}"), "fused": of("fused", "{:.2f}"),
    "static": of("static", "{:.2f}"), "floor": of("floor", "{:.2f}"), "overhead": of("overhead", "{:.2f}"),
}  # fmt: skip
MEMORY: Columns = {
    "model": of("size"), "what": of("what"), "peak MB": _mb("peak"), "estimate MB": _mb("estimate"),
    "off": lambda row: "" if row["off"] is None else f"{100 * row['off']:+.1f} %",
}  # fmt: skip
RECORDS: Columns = {
    "Pilot": of("model"), "storage": of("storage"), "p̂ MB": _mb("probs_bytes"),
    "p̂ smaller": of("probs_ratio", "{:.1f} ×"), "record MB": _mb("record_bytes"),
    "record smaller": of("record_ratio", "{:.1f} ×"),
}  # fmt: skip
RECORDING: Columns = {
    "Pilot": of("size"), "rows": of("rows"), "batch": of("batch"), "recorded rows/s": of("recorded", "{:,.0f}"),
    "recording : forward pass": of("over_pass", "{:.2f}"), "fitted rows/s": of("fitted", "{:,.0f}"),
    "pass of a fit : recording": of("fit_over_recording", "{:.3f}"),
}  # fmt: skip
FEW_TOKENS: Columns = {
    "vocabulary": of("vocabulary", "{:,}"), "few : all tokens": of("ratio", "{:.3f}"), "FLOPs": of("flops", "{:.3f}"),
}  # fmt: skip
SCALE: Columns = {
    "what": of("what"), "varied": of("varied"), "value": of("value", "{:,}"), "measured": of("measured", "{:.2f}"),
    "FLOPs": of("flops", "{:.2f}"),
}  # fmt: skip
PREFIX: Columns = {
    "what": of("what"), "rows": of("rows"), "time": of("time", "{:.2f}"), "FLOPs": of("flops", "{:.2f}"),
}  # fmt: skip
LOG: Columns = {
    "policy": of("policy"), "rounds held": of("rounds", "{:,}"), "sample": of("ratio", "{:.2f}"),
    "append": of("append_ratio", "{:.2f}"),
}  # fmt: skip
TABLES: dict[str, tuple[str | None, Columns]] = {
    **dict.fromkeys(("round", "gpu_round_llama", "gpu_round_t5"), (None, ROUND)),
    **dict.fromkeys(("decode", "gpu_decode_1b", "gpu_decode_3b", "gpu_decode_t5"), ("cases", DECODE)),
    **dict.fromkeys(("memory", "gpu_memory"), ("peaks", MEMORY)),
    "scale": (None, SCALE),
    "prefix": (None, PREFIX),
    **dict.fromkeys(("recording", "gpu_recording"), (None, RECORDING)),
    "few_tokens": (None, FEW_TOKENS),
    "log": ("costs", LOG),
}
"""By measurement: where its rows stand in its JSON, and their columns."""
