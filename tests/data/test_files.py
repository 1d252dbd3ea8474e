import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tcopilot.data import DataError, ExactMatch
from tcopilot.data.files import FORMATS
from tcopilot.data.sources import open_split

ROWS = [{"prompt": f"p{n}", "target": f"t{n}, with é"} for n in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "\ufeffprompt,target\r\n" + "".join(f'{row["prompt"]},"{row["target"]}"\r\n' for row in ROWS)


def write(file: Path, content: str | bytes) -> None:
    """A file in the form that its ending says, packed if it says so."""
    content = content.encode() if isinstance(content, str) else content
    packing = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}.get(file.suffix)
    with pa.output_stream(str(file), compression=packing) as stream:
        stream.write(content)


def rows(path: Path | None, split: str = "train", **splits) -> list[dict]:
    return [*open_split(ExactMatch(name="mine", splits={"train": "train", "test": "test"} | splits), split, path)]


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "train.jsonl.gz": LINES, "train.jsonl.zst": LINES, "train.json": json.dumps(ROWS, indent=1),
        "train.json.bz2": LINES, "train.csv": TABLE, "train.csv.lz4": TABLE,
        "train.tsv": TABLE.replace(",", "\t", 1).replace(',"', '\t"'),
    }.items(),
)  # fmt: skip
def test_a_format_gives_the_rows_whatever_it_is_packed_in(name, content, tmp_path):
    write(tmp_path / name, content)
    assert rows(tmp_path) == ROWS


def test_parquet_keeps_lists_and_numbers(tmp_path):
    whole = [{"prompt": "p", "target": 2.5, "parts": [{"role": "user", "n": 1}], "none": None}]
    datasets.Dataset.from_list(whole).to_parquet(tmp_path / "train.parquet")
    assert rows(tmp_path) == whole


def test_a_float32_of_parquet_is_written_as_short_as_it_can_be(tmp_path):
    columns = {"prompt": ["p", "q"], "target": pa.array([0.1, None], pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert [row["target"] for row in rows(tmp_path)] == [0.1, None]


def test_names_of_folders_are_no_patterns(tmp_path):
    folder = tmp_path / "runs::[1]*"
    folder.mkdir()
    write(folder / "part-1.jsonl", LINES)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "test.parquet")
    assert rows(folder, train="part-*.jsonl") == rows(folder, "test") == ROWS


def test_a_cell_is_the_text_that_stands_there(tmp_path):
    write(tmp_path / "train.csv", 'prompt,target\n007,2.50\nNA,\n"a ""b""\nc",true\n')
    assert [tuple(row.values()) for row in rows(tmp_path)] == [("007", "2.50"), ("NA", ""), ('a "b"\nc', "true")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("train.csv", "prompt,target\na,b\na,b,c\n", r"train\.csv, line 3: more cells than the 2 columns\. Quote"),
        ("train.csv", "prompt,target,target\na,b,c\n", r"train\.csv: .* the column 'target' twice"),
        ("train.csv", "prompt,target\na\n", r"train\.csv, line 2: fewer cells than the 2 columns"),
        ("train.csv", "prompt;target\na;b\na,c;d\n", r"train\.csv.* 'prompt;target'\. Separate cells by ',', not ';'"),
        ("train.csv", b"prompt,target\na,caf\xe9\n", r"train\.csv, line \d: 'utf-8' codec.*save the table as UTF-8"),
        ("train.csv", 'prompt,target\na,"b\n', r"train\.csv, line \d: unexpected end of data"),
        ("train.json", "[1]", r"train\.json, item 1: expected an object \{…\}, got 1"),
        ("train.json", '[{"prompt": 1]', r"train\.json: not JSON"),
        ("train.json", '{"prompt": "a"', r"train\.json, line 1: not JSON"),
        ("train.parquet", "PAR", r"train\.parquet: not Parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_place(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=problem):
        rows(tmp_path)


def test_a_file_that_is_packed_otherwise_than_its_name_says_is_named(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:50])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz cannot be read"):
        rows(tmp_path)
    (tmp_path / "train.jsonl.gz").write_text(LINES)
    with pytest.raises(DataError, match=r"train\.jsonl\.gz cannot be read"):
        rows(tmp_path)


def test_splits_name_files_patterns_lists_and_slices(tmp_path, monkeypatch):
    for part in range(3):
        write(tmp_path / f"part-{part}.jsonl.gz", "".join(LINES.splitlines(keepends=True)[3 * part : 3 * part + 3]))
    write(tmp_path / "last.csv", 'prompt,target\np9,"t9, with é"\n')
    assert rows(tmp_path, train="part-*.jsonl.gz") == ROWS[:9]
    assert rows(tmp_path, train=["part-*.gz", "last.csv"]) == ROWS
    assert rows(tmp_path, train=["part-[02].jsonl.gz", "last.csv[4:]"]) == [*ROWS[7:9], ROWS[9]]
    assert rows(tmp_path, train="part-*.jsonl.gz[-2:]", test="last.csv") == ROWS[7:9]
    monkeypatch.chdir(tmp_path)
    assert rows(None, "test", test="last.csv[:100%]") == [ROWS[9]]  # from the working directory
    assert rows(None, "validation", validation=str(tmp_path / "last.csv")) == [ROWS[9]]


@pytest.mark.parametrize(
    ("part", "kept"), {"[:3]": ROWS[:3], "[8:]": ROWS[8:], "[-3:-1]": ROWS[7:9], "[20%:40%]": ROWS[2:4]}.items()
)
def test_a_slice_of_a_split_is_taken_as_often_as_asked(part, kept, tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    source = open_split(ExactMatch(name="mine", splits={"train": f"train{part}"}), "train", tmp_path)
    assert [*source] == [*source] == kept


def test_a_slice_beyond_all_rows_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    with pytest.raises(DataError, match=r"train\.jsonl\[:150%\]: not a part of some rows .*; give one such as"):
        rows(tmp_path, train="train[:150%]")


def test_two_files_of_a_split_are_refused(tmp_path):
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds train\.jsonl and train\.csv; name the one to read in .*splits\.train"):
        rows(tmp_path)


def test_a_file_that_is_named_and_missing_says_what_is_there_and_how_files_end(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(
        DataError, match=r"splits\.train: .*rows\.csv does not exist \(found: \['rows\.xlsx'\]\)"
    ) as refused:
        rows(tmp_path, train="rows.csv")
    assert all(ending in str(refused.value) for ending in FORMATS)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_slice_of_a_data_set_on_the_hub(streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone/rows").mkdir(parents=True)
    write(tmp_path / "someone/rows/train.jsonl", LINES)
    benchmark = ExactMatch(name="mine", hub="someone/rows", splits={"train": "train[2:4]", "validation": "train[-2:]"})
    source = open_split(benchmark, "train", None, streaming)
    assert [*source] == [*source] == ROWS[2:4]
    assert [*open_split(benchmark, "validation", None, streaming)] == ROWS[8:]
