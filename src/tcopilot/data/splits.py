"""Read the three splits of a benchmark as raw rows, carve validation from train if it is missing, and subsample."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from random import Random

from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError
from tcopilot.data.files import names_files
from tcopilot.data.shots import NumberedRow
from tcopilot.data.sources import HubError, RowSource, open_split


@dataclass(frozen=True)
class NumberedRows:
    """Iterate over the (number from 0, row) pairs of a source from ``start`` up to ``stop``; repeatable."""

    source: RowSource
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[NumberedRow]:
        return islice(enumerate(self.source), self.start, self.stop)


@dataclass(frozen=True)
class Split:
    """Hold the raw rows of a split (a list, or ``NumberedRows`` if train is streamed) and a name of their source."""

    where: str
    rows: list[NumberedRow] | NumberedRows
    carved: bool = False  # whether the rows were taken from train


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
        """Return the splits and the problems found; train rows are required if ``training``.

        Rows that are taken out of train as shots form a split of their own, ``shots``.
        """
        splits: dict[str, Split] = {}
        problems = self._without_folder(benchmark)
        for name in () if problems else SPLITS:
            streamed = self.streaming and name == "train"
            try:
                needed = training or "train" in splits  # else validation would be taken from the train rows
                source = open_split(benchmark, name, self.path, streamed, self.on_error == "stop", needed)
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
        """Refuse a benchmark without its own folder if there are several: all would read the files of the root."""
        if self.alone or self.path is None or benchmark.builtin_rows("train") is not None:
            return []
        if all(map(names_files, benchmark.splits.values())):
            return []
        folder = Path(self.path) / (benchmark.folder or benchmark.name)
        if os.path.isdir(folder):  # unlike Path.is_dir, it is false for a root without permission
            return []
        mend = f"give it one, or name it in data.benchmarks.{benchmark.name}.folder"
        return [f"there is no folder {folder}, and one of several benchmarks needs its own; {mend}"]

    def _carve(self, train: Split, benchmark: Benchmark) -> dict[str, Split]:
        """Take validation rows out of train: by seeded draws, or the first rows of a stream.

        All rows with the same question, whatever their options, go to the same split: to train if there are more of
        them than validation rows are wanted, and a question with fewer.
        """
        if isinstance(train.rows, NumberedRows):
            head = self._carved_rows(None)
            held, kept = list(NumberedRows(train.rows.source, 0, head + 1)), NumberedRows(train.rows.source, head)
            if len(held) <= head:
                self._carved_rows(len(held))  # refuses to take all rows
            del held[head:]
        else:
            groups = list(_by_question(benchmark, train.rows).values())
            if len(groups) == 1:  # with one question only, its rows must be divided
                groups = [[number] for number, _ in train.rows]
            wanted, chosen = self._carved_rows(len(train.rows)), set[int]()
            most = max(wanted, min(map(len, groups)))
            rare = [group for group in groups if len(group) <= most]
            for group in Random(self.seed).sample(rare, min(wanted, len(rare), len(groups) - 1)):
                if len(chosen) < wanted:
                    chosen.update(group)
            held = [row for row in train.rows if row[0] in chosen]
            kept = [row for row in train.rows if row[0] not in chosen]
        return {"train": Split(train.where, kept), "validation": Split(train.where, held, carved=True)}

    def _take_shots(self, train: Split, benchmark: Benchmark) -> dict[str, Split]:
        """Take shots out of train before it is subsampled: by seeded draws, or the first rows of a stream.

        Drawn shots differ in their questions. Other rows with these questions are not trained on, because the prompts
        would contain their answers.
        """
        if isinstance(rows := train.rows, NumberedRows):
            first, after = rows.start, rows.start + self.shots
            shots, kept = list(NumberedRows(rows.source, first, after)), NumberedRows(rows.source, after)
        else:
            asked = _by_question(benchmark, rows)
            groups = [group for question, group in asked.items() if isinstance(question, str)]
            if len(groups) <= self.shots:
                raise DataError(
                    f"data.shots={self.shots} needs {self.shots + 1} train rows with different questions, and there "
                    f"are {len(groups)}; lower it"
                )
            chosen, by_number = Random(self.seed).sample(groups, self.shots), dict(rows)
            taken = set(chain(*chosen))
            shots = [(group[0], by_number[group[0]]) for group in chosen]
            kept = [row for row in rows if row[0] not in taken]
        return {"train": Split(train.where, kept), "shots": Split(train.where, shots)}

    def _carved_rows(self, rows: int | None) -> int:
        """Return how many of ``rows`` train rows become validation; ``rows`` is None if their number is unknown."""
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
    """Group the numbers of rows by their question."""
    groups: dict[str | int, list[int]] = {}
    for number, row in rows:
        try:
            asked: str | int = benchmark.group_of(row)
        except Exception:  # a row that cannot be rendered is reported later; here it is a group of its own
            asked = number
        groups.setdefault(asked, []).append(number)
    return groups
