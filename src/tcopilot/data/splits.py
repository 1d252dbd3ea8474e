"""From a benchmark to its three splits of raw rows: read, carved where validation is missing, subsampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError
from tcopilot.data.sources import HubError, RowSource, open_split

NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class NumberedRows:
    """Iterate, as often as wanted, over (number from 0, row) pairs of a source from ``start`` up to ``stop``."""

    source: RowSource
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[NumberedRow]:
        return islice(enumerate(self.source), self.start, self.stop)


@dataclass(frozen=True)
class Split:
    """Hold the raw rows of a split (a list; for a streamed train split ``NumberedRows``) and their place in words."""

    where: str
    rows: list[NumberedRow] | NumberedRows


@dataclass(frozen=True)
class SplitReader:
    """Read the splits of a benchmark; the attributes are arguments of the data module."""

    path: str | Path | None
    streaming: bool
    validation_size: float | int
    max_train_rows: int | None
    max_eval_rows: int | None
    seed: int
    on_error: str = "stop"

    def __call__(self, benchmark: Benchmark, training: bool = True) -> tuple[dict[str, Split], list[str]]:
        """Return the splits and the problems found on the way; train rows must be there if ``training``."""
        splits: dict[str, Split] = {}
        problems: list[str] = []
        for name in SPLITS:
            streamed = self.streaming and name == "train"
            try:
                source = open_split(benchmark, name, self.path, streamed, self.on_error == "stop", training)
                if source is not None:
                    rows = NumberedRows(source)
                    splits[name] = Split(source.where, rows if streamed else list(rows))
            except DataError as error:
                problems.append(str(error))
                if isinstance(error, HubError):
                    break
        if not problems:
            try:
                if "validation" not in splits and (training or "train" in splits):
                    splits |= self._carve(splits["train"])
                splits = {name: self._subsample(name, split) for name, split in splits.items()}
            except DataError as error:
                problems.append(str(error))
        name = benchmark.name
        return splits, [text if text.startswith(name) else f"{name}: {text}" for text in problems]

    def _carve(self, train: Split) -> dict[str, Split]:
        """Divide train: a seeded draw of it becomes validation; of a stream, its first rows."""
        if isinstance(train.rows, NumberedRows):
            head = self._carved_rows(None)
            held, kept = list(NumberedRows(train.rows.source, 0, head)), NumberedRows(train.rows.source, head)
        else:
            chosen = {number for number, _ in Random(self.seed).sample(train.rows, self._carved_rows(len(train.rows)))}
            held = [row for row in train.rows if row[0] in chosen]
            kept = [row for row in train.rows if row[0] not in chosen]
        return {"train": Split(train.where, kept), "validation": Split(train.where, held)}

    def _carved_rows(self, rows: int | None) -> int:
        """Return how many of ``rows`` train rows (None: unknown) become validation."""
        size = self.validation_size
        if isinstance(size, float) and rows is None:
            raise DataError(f"data.validation_size={size} is a share, and a stream's length is unknown; give a number")
        wanted = max(1, round(size * rows)) if isinstance(size, float) else size
        if wanted < 1 or (rows is not None and wanted >= rows):
            raise DataError(
                f"there is no validation split, and data.validation_size={size} would take {wanted} of the {rows} "
                "train rows; it needs at least 1 and must leave 1"
            )
        return wanted

    def _subsample(self, name: str, split: Split) -> Split:
        limit, rows = self.max_train_rows if name == "train" else self.max_eval_rows, split.rows
        if limit is None:
            return split
        if isinstance(rows, NumberedRows):
            return Split(split.where, NumberedRows(rows.source, rows.start, rows.start + limit))
        return Split(split.where, sorted(Random(self.seed).sample(rows, min(limit, len(rows))), key=itemgetter(0)))
