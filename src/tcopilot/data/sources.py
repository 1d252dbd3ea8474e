"""Where rows come from: a built-in task, a local folder of JSON lines, or the Hugging Face Hub; and their mixture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets

from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError, is_finite

STARTS = {  # of files that are no JSON lines
    b"[": "one JSON array: write one object a line, as jq -c '.[]' does",
    b"{": "JSON with line breaks inside its objects: write one object a line, as jq -c . does",
    b"\x1f\x8b": "gzip: unpack it",
    b"PK": "a zip archive: unpack it",
    b"PAR1": "Parquet: write one JSON object a line",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file with git lfs pull",
}
Stream = TypeVar("Stream", datasets.Dataset, datasets.IterableDataset)


class WrittenNumber(float):
    """A number that is written out as the file has it: 2.50 as 2.50, and with all its digits."""

    def __new__(cls, text: str) -> WrittenNumber:
        """Keep the number's text."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text if is_finite(float(self)) else super().__str__()


class HubError(DataError):
    """Say that the Hub could not be read, or has no copy; other splits would fail likewise."""


@dataclass(frozen=True)
class RowSource:
    """Iterate over the raw rows of one split, as often as wanted, and check each row on its way.

    Raises while iterating:
        DataError: If there is no row, or a row lacks a column that the benchmark reads.

    Attributes:
        where: File, Hub id or task, for messages.
        benchmark: Whose columns are checked.
        rows: What is iterated.
        check: False hands on a row without a column, which is refused when it is rendered, unless all rows lack one.
    """

    where: str
    benchmark: Benchmark
    rows: Iterable[dict[str, Any]]
    check: bool = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns, number, complete, problem = self.benchmark.columns, 0, 0, None
        for number, row in enumerate(self.rows, start=1):
            complete += not (missing := [column for column in columns if column not in row])
            if missing and not problem:
                problem = DataError(
                    f"{self.where}: row {number} has no column {', '.join(map(repr, missing))}; it has "
                    f"{', '.join(map(repr, row))}. Rename it there, or name the right columns in "
                    f"data.benchmarks.{self.benchmark.name}."
                )
            if missing and self.check:
                raise problem
            yield row
        if problem and not complete:
            raise problem
        if not number:
            raise DataError(f"{self.where}: no rows. Every split needs at least one.")


@dataclass(frozen=True)
class JsonLines:
    """Read a file of JSON objects, one a line; blank lines are skipped.

    Raises while iterating:
        DataError: At a line that is not a JSON object, with file and line number.
    """

    file: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_each_once, parse_float=WrittenNumber)
            except (ValueError, RecursionError) as error:  # malformed, too deep, or bytes that are not UTF-8
                raise DataError(
                    f"{self.file}, line {number}: not JSON ({error}). {_likely_cause(line, number)}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{self.file}, line {number}: expected an object {{…}}, got {line[:40]!r}. "
                    f"{_likely_cause(line, number)}"
                )
            yield row

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.file.open("rb") as lines:
                yield from lines
        except OSError as error:
            raise DataError(
                f"{self.file} cannot be read ({error.strerror or error}). Give a readable file."
            ) from error


def _likely_cause(line: bytes, number: int) -> str:
    """Say why a line is no JSON object, and what to do."""
    start = line.lstrip(b"\xef\xbb\xbf \t")
    for first, advice in STARTS.items():
        if number == 1 and start.startswith(first) and (first != b"{" or not start[1:].strip()):
            return f"The file looks like {advice}."
    if 3 * line.count(b"\0") > len(line):
        return "The file looks like UTF-16: save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does."
    try:
        line.decode()
    except UnicodeDecodeError:
        return "Mend it: it may be Windows' cp1252, which iconv -f CP1252 -t UTF-8 saves as UTF-8."
    return "Mend or remove it."


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that gives a key twice, of which JSON readers silently keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return values


def open_split(
    benchmark: Benchmark,
    split: str,
    path: str | Path | None,
    streaming: bool = False,
    check: bool = True,
    training: bool = True,
) -> RowSource | None:
    """Find the rows of a split; None for a validation split that does not exist or a test split that is not asked for.

    Local train rows may be missing too if ``training`` is false. A built-in task brings its own. With ``path`` they
    come from ``<path>/<folder>/<file>`` if that folder exists, else from ``<path>/<file>``. Without it the Hub's copy
    is loaded; ``streaming`` reads its files while they are used. The file is the benchmark's for that split, or has
    the name that ``splits`` gives it, where that is not one of ours.

    Raises:
        DataError: If a required file is missing.
        HubError: If the Hub cannot be read or has no copy.
    """
    rows = benchmark.builtin_rows(split)
    if rows is not None:
        found = f"built-in task {benchmark.name}, {split}", rows
    elif path is not None:
        try:
            found = _local_rows(benchmark, split, Path(path), training)
        except PermissionError as error:
            mend = "Allow it to be entered and read, or give another data.path."
            raise DataError(f"{benchmark.name}: {error.filename or path} is not accessible. {mend}") from error
    else:
        found = _hub_rows(benchmark, split, streaming) if split in benchmark.splits else None
    return found and RowSource(found[0], benchmark, found[1], check)


def mixture(parts: Sequence[Stream], weights: Sequence[float] | None = None, seed: int = 0) -> Stream:
    """Join data sets, all map-style or all streaming, into one.

    ``weights`` are the relative frequencies of the parts on any positive scale: rows are drawn until each part was
    used up at least once, so small parts repeat. None keeps every row exactly once.

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


def as_stream(rows: Callable[[], Iterator[dict[str, Any]]]) -> datasets.IterableDataset:
    """Make a streaming data set of a function that starts a new pass over its rows whenever it is called."""
    return datasets.IterableDataset.from_generator(_call, gen_kwargs={"rows": rows})


def _call(rows: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    yield from rows()


def _local_rows(benchmark: Benchmark, split: str, root: Path, training: bool) -> tuple[str, Iterable[Any]] | None:
    folder = root / (benchmark.folder or benchmark.name)
    place, name = folder if folder.is_dir() else root, benchmark.splits.get(split, split)
    own = place / f"{name}.jsonl"  # the Hub calls its splits otherwise too; then the file has our name
    file = own if name not in SPLITS and own.is_file() else place / benchmark.file(split)
    if split == "validation" and name not in SPLITS and benchmark.hub is None and file != own:
        raise DataError(
            f"data.benchmarks.{benchmark.name}.splits.validation={name}: {own} does not exist; add it, or leave "
            "splits.validation out to take a part of the train rows"
        )
    if file.is_file():
        return str(file), benchmark.derive(split, JsonLines(file))
    if os.path.lexists(file):
        kind = "a folder" if file.is_dir() else "a link to nothing" if file.is_symlink() else "no regular file"
        raise DataError(
            f"{benchmark.name}: {file} does not exist as a file: it is {kind}. Put a file there, or remove it."
        )
    if split == "validation" and (others := [path.name for path in sorted(place.glob("*")) if _is_validation(path)]):
        raise DataError(
            f"{benchmark.name}: {', '.join(others)} in {place} is not read, and validation rows would be taken from "
            f"train. Call it {file.name}, or move it elsewhere."
        )
    if split == "validation" or split not in benchmark.splits or (split == "train" and not training):
        return None
    there = sorted(path.name for path in file.parent.glob("*"))[:10] if file.parent.is_dir() else "no such folder"
    raise DataError(
        f"{benchmark.name}: {file} does not exist (found: {there}). data.path is the folder that holds "
        f"{_files(benchmark)}."
    )


def _is_validation(file: Path) -> bool:
    """Tell whether a file seems to be meant as the validation split, under a name that is not read."""
    name = file.name.lower().split(".")[0]
    return name in ("val", "valid", "validation", "dev", "development") and not file.is_dir()


def _files(benchmark: Benchmark) -> str:
    """Say which files data.path must hold."""
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
        name, revision = benchmark.splits[split], benchmark.revision
        rows = datasets.load_dataset(
            benchmark.hub, benchmark.config, revision=revision, split=name, streaming=streaming
        )
    except Exception as error:  # the Hub's clients raise many unrelated types: no network, offline mode, no such name
        raise HubError(
            f"{where} could not be read ({type(error).__name__}: {error}). Without network, give "
            f"data.path=<folder> that holds {_files(benchmark)}."
        ) from error
    return where, rows
