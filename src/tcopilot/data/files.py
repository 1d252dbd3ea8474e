"""Rows in files: which files a split names, and how each format is read.

JSON and CSV are read line by line, so that error messages name the line and numbers keep their spelling (2.50, 007).
Arrow reads Parquet, and decompresses packed files.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Self

import datasets
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from tcopilot.data.answers import is_finite
from tcopilot.data.benchmarks import DataError

Row = dict[str, Any]
PARQUET_ROWS = 1000  # read at once
PACKED = (".gz", ".zst", ".bz2", ".lz4")
STARTS = {  # the first bytes of files that are not JSON lines, and what such a file is
    b"[": "one JSON array: call it .json",
    b"{": "JSON with line breaks inside its objects: write one object a line, as jq -c . does",
    b"\x1f\x8b": "gzip: put .gz behind its name",
    b"\x28\xb5\x2f\xfd": "zstd: put .zst behind its name",
    b"PK": "a zip archive: unpack it",
    b"PAR1": "Parquet: call it .parquet",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file with git lfs pull",
}


class WrittenNumber(float):
    """A float that keeps its spelling in the file, so that 2.50 is written as 2.50 and no digit is lost."""

    def __new__(cls, text: str) -> Self:
        """Parse a number and keep its text."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text if is_finite(float(self)) else super().__str__()


@dataclass(frozen=True)
class FileRows:
    """Iterate over the rows of some files, one after another; each iteration starts anew. Files have one of `FORMATS`.

    Raises while iterating:
        DataError: If something cannot be read; the message names the file and, for text files, the line.
    """

    files: Sequence[Path]

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    def __iter__(self) -> Iterator[Row]:
        for file in self.files:
            try:
                yield from FORMATS[format_of(file)](file)
            except OSError as error:
                raise DataError(f"{file} cannot be read ({error.strerror or error}). Give a readable file.") from error


@dataclass(frozen=True)
class Part:
    """Iterate over a slice of rows, such as ``[:2000]``, ``[-500:]`` or ``[10%:]``.

    A percentage, or a position counted from the end, needs a first pass that counts the rows.
    """

    rows: Iterable[Row]
    part: str

    @property
    def files(self) -> Sequence[Path]:
        """The files whose rows these are; none if they come from the Hub."""
        return getattr(self.rows, "files", ())

    def __str__(self) -> str:
        return f"{self.rows}{self.part}"

    def __iter__(self) -> Iterator[Row]:
        count = sum(1 for _ in self.rows) if re.search("[-%]", self.part) else sys.maxsize
        try:
            (bounds,) = datasets.ReadInstruction.from_spec(f"rows{self.part}").to_absolute({"rows": count})
        except ValueError as error:
            raise DataError(f"{self}: not a part of some rows ({error}); give one such as [:90%]") from error
        return islice(self.rows, bounds.from_, bounds.to)


def name_and_part(place: str) -> tuple[str, str]:
    """Separate the name of a split or file from the slice behind it.

    >>> name_and_part("train[:2000]"), name_and_part("part-[0-9].csv")
    (('train', '[:2000]'), ('part-[0-9].csv', ''))
    """
    return re.fullmatch(r"(.*?)(\[-?\d*%?:-?\d*%?\])?", place, re.DOTALL).groups("")


def names_files(place: str | list[str]) -> bool:
    """Tell by the ending whether a split names files rather than a split of a data set on the Hub.

    >>> [names_files(place) for place in ("train[:10]", "rows.csv[:10]", "part-*.json.gz", ["a.csv", "b.jsonl"])]
    [False, True, True, True]
    """
    return isinstance(place, list) or format_of(name_and_part(place)[0]) in FORMATS


def find_files(folder: Path, places: str | list[str]) -> FileRows | Part:
    """Find the files that a split names by paths or patterns below a folder; the last may end in a slice.

    The files of a pattern are sorted by name.

    Raises:
        DataError: If a path or pattern matches no file.
    """
    files: list[Path] = []
    *whole, last = [places] if isinstance(places, str) else places
    name, part = name_and_part(last)
    for place in (*whole, name):
        given = folder / place
        found = [place] if given.is_file() else sorted(glob(place, root_dir=folder, recursive=True))
        if not (readable := [folder / one for one in found if format_of(one) in FORMATS and (folder / one).is_file()]):
            raise DataError(
                f"{given} does not exist (found: {found_in(given.parent)}). Give a file or a pattern; the ending says "
                f"how it is read: {', '.join(FORMATS)}, and behind it {', '.join(PACKED)} where it is packed."
            )
        files += readable
    return Part(FileRows(files), part) if part else FileRows(files)


def found_in(folder: Path) -> list[str] | str:
    """List up to ten entries of a folder, for a message about a file that it lacks."""
    return sorted(path.name for path in folder.glob("*"))[:10] if folder.is_dir() else "no such folder"


def files_called(stem: Path) -> list[Path]:
    """List the existing files with this stem, in any format, compressed or not."""
    names = (f"{stem.name}{ending}{packed}" for ending in FORMATS for packed in ("", *PACKED))
    return [file for name in names if (file := stem.with_name(name)).is_file()]


def format_of(file: str | Path) -> str:
    """Return the ending of a file's name without the ending of its compression.

    >>> format_of("rows.csv.gz"), format_of("v1.5")
    ('.csv', '.5')
    """
    name = PurePath(file)
    return PurePath(name.stem if name.suffix in PACKED else name).suffix


def _bytes_of(file: Path) -> io.BufferedReader:
    """Open a file, and decompress it if its name has the ending of a compressed file."""
    return io.BufferedReader(pa.input_stream(file, compression="detect"))


def _json_lines(file: Path, lines: Iterable[bytes] | None = None) -> Iterator[Row]:
    """Read one object per line; blank lines are skipped."""
    for number, line in enumerate(lines or _bytes_of(file), start=1):
        if line.strip():
            row = _from_json(line, f"{file}, line {number}", number)
            if not isinstance(row, dict):
                cause = _likely_cause(line, number)
                raise DataError(f"{file}, line {number}: expected an object {{…}}, got {line[:40]!r}. {cause}")
            yield row


def _json(file: Path) -> Iterator[Row]:
    """Read an array of objects, or one object per line, because ``.json`` files come in both forms."""
    stream = _bytes_of(file)
    if not stream.peek(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(file, stream)
        return
    for number, row in enumerate(_from_json(stream.read(), str(file), 0), start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, item {number}: expected an object {{…}}, got {row!r:.40}. Mend or remove it.")
        yield row


def _from_json(text: bytes, where: str, line: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_each_once, parse_float=WrittenNumber)
    except (ValueError, RecursionError) as error:  # malformed, too deep, or bytes that are not UTF-8
        raise DataError(f"{where}: not JSON ({error}). {_likely_cause(text, line)}") from error


def _table(file: Path, separator: str) -> Iterator[Row]:
    """Read a table whose first line names the columns; all cells are texts."""
    csv.field_size_limit(10**9)  # characters; the default limit is too small for long documents
    rows = csv.DictReader(io.TextIOWrapper(_bytes_of(file), "utf-8-sig", newline=""), delimiter=separator, strict=True)
    try:
        columns = rows.fieldnames or [""]
        if len(columns) == 1 and (other := next((char for char in ",;\t" if char in columns[0]), None)):
            mend = f"Separate cells by {separator!r}, not {other!r}"
            raise DataError(f"{file}: its first line names one column, {columns[0]!r}. {mend}.")
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise DataError(f"{file}: its first line names the column {twice!r} twice. Rename or remove one of them.")
        for row in rows:
            if None in row or None in row.values():
                cells = f"{'more' if None in row else 'fewer'} cells than the {len(columns)} columns"
                raise DataError(f"{file}, line {rows.line_num}: {cells}. Quote cells that hold a {separator!r}.")
            yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}, line {rows.line_num + 1}: {error}. Mend it, or save the table as UTF-8.") from error


def _parquet(file: Path) -> Iterator[Row]:
    """Read the rows of a Parquet file; lists and structs are kept, and float32 is as short as it can be written."""
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                for place in (n for n, field in enumerate(batch.schema) if pa.types.is_float32(field.type)):
                    numbers = batch.column(place).cast(pa.string()).cast(pa.float64())
                    batch = batch.set_column(place, batch.schema[place].name, numbers)
                yield from batch.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{file}: not Parquet ({error}). Mend it, or save it anew.") from error


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_table, separator=","),
    ".tsv": partial(_table, separator="\t"),
    ".parquet": _parquet,
}
"""File endings and the function that reads such a file."""


def _likely_cause(line: bytes, number: int) -> str:
    """Say why a line is probably not a JSON object, and what to do."""
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
    """Refuse an object with a repeated key, for which JSON readers would silently keep the last value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return values
