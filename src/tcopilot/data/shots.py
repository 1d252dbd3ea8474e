"""Shots: solved training rows that precede every prompt of a benchmark, the same ones each time."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tcopilot.data.files import WrittenNumber
from tcopilot.run_directory import write_whole

NumberedRow = tuple[int, dict[str, Any]]
SEPARATOR = "\n\n"  # behind each shot


def write_shots(shots: Mapping[str, Sequence[NumberedRow]], file: Path) -> None:
    """Store the shots of each benchmark as raw rows, so that an evaluation does not need the training rows."""
    text = json.dumps(_marked(shots), ensure_ascii=False, indent=1, default=str)
    write_whole(file, re.sub(r'"\\u0000(-?\d[-+.\deE]*)"', r"\1", text) + "\n")


def read_shots(file: Path) -> dict[str, list[NumberedRow]]:
    """Read what `write_shots` wrote; empty where there is no such file."""
    text = file.read_text(encoding="utf-8") if file.exists() else "{}"
    found = json.loads(text, parse_float=WrittenNumber)
    return {name: [(number, row) for number, row in rows] for name, rows in found.items()}


def _marked(value: Any) -> Any:
    """Turn numbers into marked texts, since JSON would not keep their spelling."""
    if isinstance(value, WrittenNumber):
        return f"\0{value.text}"
    if isinstance(value, Mapping):
        return {key: _marked(part) for key, part in value.items()}
    return [_marked(part) for part in value] if isinstance(value, list | tuple) else value
