"""The sources of rows (a built-in task, files, or the Hugging Face Hub) and the mixture of several benchmarks."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets

from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError
from tcopilot.data.files import FileRows, Part, files_called, find_files, found_in, name_and_part, names_files

Stream = TypeVar("Stream", datasets.Dataset, datasets.IterableDataset)


class HubError(DataError):
    """Raised if the Hub cannot be read or has no copy; all other splits would fail in the same way."""


@dataclass(frozen=True)
class RowSource:
    """Iterate over the raw rows of one split and check each of them; each iteration starts anew.

    Raises while iterating:
        DataError: If there are no rows, or a row lacks a column that the benchmark reads.

    Attributes:
        where: File, Hub id or task, for messages.
        benchmark: The benchmark whose columns every row must have.
        rows: The rows to iterate over.
        check: If False, a row that lacks a column is passed on, to be refused on rendering, unless all rows lack one.
    """

    where: str
    benchmark: Benchmark
    rows: Iterable[dict[str, Any]]
    check: bool = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns, number, complete, problem = self.benchmark.columns, 0, 0, None
        for number, row in enumerate(self.rows, start=1):
            complete += not (missing := [column for column in columns if not _has(row, column)])
            if missing and not problem:
                problem = DataError(
                    f"{self.where}: row {number} has no column {', '.join(map(repr, missing))}; it has "
                    f"{', '.join(map(repr, row))}. Rename it in the data, or name the right columns in "
                    f"data.benchmarks.{self.benchmark.name}."
                )
            if missing and self.check:
                raise problem
            yield row
        if problem and not complete:
            raise problem
        if not number:
            raise DataError(f"{self.where}: no rows. Every split needs at least one.")


def _has(row: Mapping[str, Any], column: str) -> bool:
    """Tell whether a row has a column, or columns such as ``question.stem`` in place of ``question``."""
    return column in row or any(name.startswith(f"{column}.") for name in row)


def open_split(
    benchmark: Benchmark,
    split: str,
    path: str | Path | None,
    streaming: bool = False,
    check: bool = True,
    training: bool = True,
) -> RowSource | None:
    """Find the rows of a split; None if it is a missing validation split, or a test split that ``splits`` leaves out.

    Local train rows, and a validation file that ``splits`` names, may also be missing if ``training`` is false. A
    built-in task generates its rows. If ``splits`` names files, they are looked up in ``path``, or in the working
    directory without it. Otherwise, with ``path``, rows come from ``<path>/<folder>/<file>`` if that folder exists,
    else from ``<path>/<file>``; without it they come from the Hub, and ``streaming`` downloads them while they are
    used. The file name, whose ending may be that of any format, is ``benchmark.file(split)``. If ``splits`` gives
    another name, it is that one, or for a data set of the Hub either, since the Hub's splits may be called otherwise.

    Raises:
        DataError: If a required file is missing.
        HubError: If the Hub cannot be read or has no copy.
    """
    rows = benchmark.builtin_rows(split)
    if rows is not None:
        return RowSource(f"built-in task {benchmark.name}, {split}", benchmark, rows, check)
    in_files = names_files(benchmark.splits.get(split, split))
    if path is None and not in_files:
        found = _hub_rows(benchmark, split, streaming) if split in benchmark.splits else None
    else:
        try:
            place = Path(path or "")
            if path is not None and (own := place / (benchmark.folder or benchmark.name)).is_dir():
                place = own
            files = (_named_rows if in_files else _local_rows)(benchmark, split, place, training)
        except PermissionError as error:
            mend = "Allow it to be entered and read, or give another data.path."
            raise DataError(f"{benchmark.name}: {error.filename or path} is not accessible. {mend}") from error
        found = files and (str(files), files)
    return found and RowSource(found[0], benchmark, benchmark.derive(split, found[1]), check)


def mixture(parts: Sequence[Stream], weights: Sequence[float] | None = None, seed: int = 0) -> Stream:
    """Join data sets, all map-style or all streaming, into one.

    ``weights`` are the relative frequencies of the parts on any positive scale: rows are drawn until every part was
    exhausted at least once, so small parts are repeated. None takes every row exactly once.

    Raises:
        DataError: If a weight is not positive, or so small that a pass over all parts would never end.
    """
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return datasets.concatenate_datasets(list(parts))
    if min(weights) <= 0:
        raise DataError(f"data.weights must be positive, got {list(weights)}; leave out a benchmark to drop it.")
    shares = [weight / sum(weights) for weight in weights]
    if all(isinstance(part, datasets.Dataset) for part in parts):
        draws = max(len(part) / share for part, share in zip(parts, shares, strict=True))
        if draws > max(10**7, 100 * sum(map(len, parts))):
            raise DataError(
                f"data.weights={list(weights)}: a pass that uses up every row of the rarest benchmark takes "
                f"{draws:.0e} draws. Raise its weight, or leave the benchmark out."
            )
    return datasets.interleave_datasets(list(parts), shares, seed=seed, stopping_strategy="all_exhausted")


def _named_rows(benchmark: Benchmark, split: str, place: Path, training: bool) -> FileRows | Part | None:
    try:
        return find_files(place, benchmark.splits[split])
    except DataError as error:
        if split != "test" and not training:
            return None
        raise DataError(f"data.benchmarks.{benchmark.name}.splits.{split}: {error}") from error


def _local_rows(benchmark: Benchmark, split: str, place: Path, training: bool) -> FileRows | Part | None:
    name, part = name_and_part(benchmark.splits.get(split, split))
    named = benchmark.hub is None and name != split  # the Hub may use other split names than we do
    file = place / (f"{name}.jsonl" if named else benchmark.file(split))
    own = files_called(place / name)
    files = own if own and name not in SPLITS else files_called(file.with_name(file.name.removesuffix(".jsonl")))
    if named and not files and not os.path.lexists(file) and (split == "test" or training):
        leave_out = "leave it out to take a part of the train rows" if split == "validation" else "name another file"
        raise DataError(
            f"data.benchmarks.{benchmark.name}.splits.{split}={name}: {file} does not exist (found: "
            f"{found_in(file.parent)}); add it, or {leave_out}"
        )
    if len(files) > 1:
        raise DataError(
            f"{benchmark.name}: {place} holds {' and '.join(one.name for one in files)}; name the one to read in "
            f"data.benchmarks.{benchmark.name}.splits.{split}"
        )
    if files:
        return Part(FileRows(files), part) if part else FileRows(files)
    if os.path.lexists(file):
        kind = "a folder" if file.is_dir() else "a link to nothing" if file.is_symlink() else "no regular file"
        raise DataError(
            f"{benchmark.name}: {file} does not exist as a file: it is {kind}. Put a file there, or remove it."
        )
    if split == "validation" and (others := [path.name for path in sorted(place.glob("*")) if _is_validation(path)]):
        raise DataError(
            f"{benchmark.name}: {', '.join(others)} in {place} is not read, and validation rows would be taken from "
            f"train. Rename it to {file.name}, or move it elsewhere."
        )
    if split == "validation" or split not in benchmark.splits or (split == "train" and not training):
        return None
    raise DataError(
        f"{benchmark.name}: {file} does not exist (found: {found_in(file.parent)}). data.path is the folder "
        f"that holds {_files(benchmark)}."
    )


def _is_validation(file: Path) -> bool:
    """Tell whether a file looks like a validation split under a name that is not read."""
    name = file.name.lower().split(".")[0]
    return name in ("val", "valid", "validation", "dev", "development") and not file.is_dir()


def _files(benchmark: Benchmark) -> str:
    """Describe the files that data.path must contain."""
    files = dict.fromkeys(benchmark.file(split) for split in benchmark.splits if split != "validation")
    return f"{' and '.join(files)}, or a folder {benchmark.folder or benchmark.name!r} with them"


def _hub_rows(benchmark: Benchmark, split: str, streaming: bool) -> tuple[str, Iterable[Any]]:
    if benchmark.hub is None:
        raise HubError(
            f"{benchmark.name}: there is no copy on the Hub, and data.path is not given. Give data.path=<folder> that "
            f"holds {_files(benchmark)}."
        )
    where = f"Hub data set {benchmark.hub}, config {benchmark.config}, split {benchmark.splits[split]}"
    try:
        name, part = name_and_part(benchmark.splits[split])
        rows = datasets.load_dataset(
            benchmark.hub, benchmark.config, revision=benchmark.revision, split=name, streaming=streaming
        )
    except Exception as error:  # the Hub's clients raise many unrelated types: no network, offline mode, no such name
        raise HubError(
            f"{where} could not be read ({type(error).__name__}: {error}). Without network, give "
            f"data.path=<folder> that holds {_files(benchmark)}."
        ) from error
    return where, Part(rows, part) if part else rows
