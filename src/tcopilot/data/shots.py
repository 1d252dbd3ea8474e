"""Shots: solved training rows that precede every prompt of a benchmark, the same ones each time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tcopilot.run_directory import write_whole

NumberedRow = tuple[int, dict[str, Any]]
SEPARATOR = "\n\n"  # behind each shot


def write_shots(shots: Mapping[str, Sequence[NumberedRow]], file: Path) -> None:
    """Store the shots of each benchmark as raw rows, so that an evaluation does not need the training rows."""
    write_whole(file, json.dumps(shots, ensure_ascii=False, indent=1, default=str) + "\n")


def read_shots(file: Path) -> dict[str, list[NumberedRow]]:
    """Read what `write_shots` wrote; empty where there is no such file."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: [(number, row) for number, row in rows] for name, rows in found.items()}
