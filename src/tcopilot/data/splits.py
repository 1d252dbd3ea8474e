"""From a benchmark to its three splits of raw rows: read, carved where validation is missing, subsampled."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from random import Random

from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError
from tcopilot.data.files import names_files
from tcopilot.data.shots import NumberedRow, draw_shots
from tcopilot.data.sources import HubError, RowSource, open_split


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
    carved: bool = False  # whether they were taken from train


@dataclass(frozen=True)
class SplitReader:
    """Read the splits of a benchmark; the attributes are arguments of the data module."""

    path: str | Path | None
    alone: bool  # whether there is no other benchmark
    streaming: bool
    validation_size: float | int
    max_train_rows: int | None
    max_eval_rows: int | None
    seed: int
    on_error: str = "stop"
    shots: int = 0

    def __call__(self, benchmark: Benchmark, training: bool = True) -> tuple[dict[str, Split], list[str]]:
        """Return the splits and the problems found on the way; train rows must be there if ``training``.

        What is taken out of train as shots is a split of its own, ``shots``.
        """
        splits: dict[str, Split] = {}
        problems = self._without_folder(benchmark)
        for name in () if problems else SPLITS:
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
                    splits |= self._carve(splits["train"], benchmark)
                if self.shots and "train" in splits:
                    splits |= self._take_shots(splits["train"], benchmark)
                splits = {name: self._subsample(name, split) for name, split in splits.items()}
            except DataError as error:
                problems.append(str(error))
        name = benchmark.name
        return splits, [text if text.startswith(name) else f"{name}: {text}" for text in problems]

    def _without_folder(self, benchmark: Benchmark) -> list[str]:
        """Refuse one of several benchmarks without a folder of its own, as the root would be that of all of them."""
        if self.alone or self.path is None or benchmark.builtin_rows("train") is not None:
            return []
        if all(map(names_files, benchmark.splits.values())):
            return []
        folder = Path(self.path) / (benchmark.folder or benchmark.name)
        if os.path.isdir(folder):  # Path's own asks too much of a root that may not be entered
            return []
        mend = f"give it one, or name it in data.benchmarks.{benchmark.name}.folder"
        return [f"there is no folder {folder}, and one of several benchmarks needs its own; {mend}"]

    def _carve(self, train: Split, benchmark: Benchmark) -> dict[str, Split]:
        """Divide train: seeded draws of it become validation; of a stream, its first rows.

        All rows that ask the same question, whatever the options, go to the same side.
        """
        if isinstance(train.rows, NumberedRows):
            head = self._carved_rows(None)
            held, kept = list(NumberedRows(train.rows.source, 0, head)), NumberedRows(train.rows.source, head)
        else:
            groups = _by_question(benchmark, train.rows)
            if len(groups) == 1:  # nothing else is possible
                groups = {number: [number] for number, _ in train.rows}
            wanted, chosen = self._carved_rows(len(train.rows)), set[int]()
            for group in Random(self.seed).sample(list(groups.values()), min(wanted, len(groups) - 1)):
                if len(chosen) < wanted:
                    chosen.update(group)
            held = [row for row in train.rows if row[0] in chosen]
            kept = [row for row in train.rows if row[0] not in chosen]
        return {"train": Split(train.where, kept), "validation": Split(train.where, held, carved=True)}

    def _take_shots(self, train: Split, benchmark: Benchmark) -> dict[str, Split]:
        """Draw shots from train, before it is subsampled; of a stream, its first rows."""
        if isinstance(rows := train.rows, NumberedRows):
            first, after = rows.start, rows.start + self.shots
            shots, kept = list(NumberedRows(rows.source, first, after)), NumberedRows(rows.source, after)
        else:
            asked = _by_question(benchmark, rows)
            groups = [group for question, group in asked.items() if isinstance(question, str)]
            shots, kept = draw_shots(rows, groups, self.shots, self.seed)
        return {"train": Split(train.where, kept), "shots": Split(train.where, shots)}

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
        limits = {"train": self.max_train_rows, "shots": None}
        limit, rows = limits.get(name, self.max_eval_rows), split.rows
        if limit is None:
            return split
        if isinstance(rows, NumberedRows):
            return replace(split, rows=NumberedRows(rows.source, rows.start, rows.start + limit))
        return replace(split, rows=sorted(Random(self.seed).sample(rows, min(limit, len(rows))), key=itemgetter(0)))


def _by_question(benchmark: Benchmark, rows: list[NumberedRow]) -> dict[str | int, list[int]]:
    """Group the numbers of rows by what they ask."""
    groups: dict[str | int, list[int]] = {}
    for number, row in rows:
        try:
            asked: str | int = benchmark.group_of(row)
        except Exception:  # a row that cannot be rendered is told of later, and stands by itself
            asked = number
        groups.setdefault(asked, []).append(number)
    return groups
