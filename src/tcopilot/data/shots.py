"""Shots: solved training rows that precede every prompt of a benchmark, the same ones each time."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from tcopilot.data.benchmarks import DataError
from tcopilot.run_directory import write_whole

NumberedRow = tuple[int, dict[str, Any]]
SEPARATOR = "\n\n"  # behind each shot


def draw_shots(
    rows: Sequence[NumberedRow], groups: Sequence[Sequence[int]], count: int, seed: int
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Draw shots with different questions; return them and the rows that are left to train on.

    Rows with the same question as a shot are not trained on, because their prompts would contain their answers.

    Args:
        rows: (number, row) pairs.
        groups: Numbers of the rows that may become shots, grouped by question.
        count: Shots to draw.
        seed: Seed of the draw.

    Raises:
        DataError: If no question would be left to train on.
    """
    if len(groups) <= count:
        raise DataError(
            f"data.shots={count} needs {count + 1} train rows with different questions, and there are {len(groups)}; "
            "lower it"
        )
    chosen, by_number = Random(seed).sample(groups, count), dict(rows)
    taken = set(chain.from_iterable(chosen))
    return [(group[0], by_number[group[0]]) for group in chosen], [row for row in rows if row[0] not in taken]


def write_shots(shots: Mapping[str, Sequence[NumberedRow]], file: Path) -> None:
    """Store the shots of each benchmark as raw rows, so that an evaluation does not need the training rows."""
    write_whole(file, json.dumps(shots, ensure_ascii=False, indent=1, default=str) + "\n")


def read_shots(file: Path) -> dict[str, list[NumberedRow]]:
    """Read what `write_shots` wrote; empty where there is no such file."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: [(number, row) for number, row in rows] for name, rows in found.items()}
