import gzip
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest

from tcopilot.data import DataError, ExactMatch
from tcopilot.data.sources import HubError, mixture, open_split

BENCHMARK = ExactMatch(name="mine", hub="someone/mine", splits={"train": "train", "test": "validation"})
ROW = '{"prompt": "a", "target": "b"}\n'


def read(tmp_path, text: str | None, split: str = "train"):
    if text is not None:
        (tmp_path / f"{split}.jsonl").write_text(text)
    source = open_split(BENCHMARK, split, tmp_path)
    return source if source is None else list(source)


def test_blank_lines_are_skipped(tmp_path):
    assert read(tmp_path, ROW + "\n" + ROW + "\n") == [{"prompt": "a", "target": "b"}] * 2


@pytest.mark.parametrize("line", ['{"prompt": "a"', '["a", "b"]', '{"prompt": "\\xff"}'])
def test_a_malformed_line_names_file_and_line(tmp_path, line):
    with pytest.raises(DataError, match=r"train\.jsonl, line 2"):
        read(tmp_path, ROW + line + "\n" + ROW)


def test_bytes_that_are_not_utf8_name_file_and_line(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(ROW.encode() + b'{"prompt": "\xff\xfe", "target": "b"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not JSON"):
        read(tmp_path, None)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (f"[{ROW}]".encode(), "line 1: .*looks like one JSON array: call it .json"),
        (b"[\n" + ROW.encode() + b"]", "line 1: .*looks like one JSON array"),
        (
            b'{\n  "prompt": "a",\n  "target": "b"\n}\n',
            "line 1: .*looks like JSON with line breaks inside its objects",
        ),
        (gzip.compress(ROW.encode(), mtime=0), "line 1: .*looks like gzip: put .gz behind its name"),
        (b"PAR1\x15\x04\n", "line 1: .*looks like Parquet: call it .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1: .*looks like a pointer of Git LFS"),
        (ROW.encode("utf-16"), "line 1: .*looks like UTF-16: save it as UTF-8"),
        (ROW.encode("utf-16-be"), "line 1: .*looks like UTF-16"),
        (
            ROW.encode() + '{"prompt": "caf\xe9", "target": "b"}\n'.encode("cp1252"),
            r"line 2: .*Mend it: it may be Windows' cp1252",
        ),
    ],
)
def test_a_file_of_another_kind_names_the_likely_cause(tmp_path, content, cause):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.jsonl, {cause}"):
        read(tmp_path, None)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda file: file.mkdir(), "a folder"),
        (lambda file: file.symlink_to("nowhere"), "a link to nothing"),
        (os.mkfifo, "no regular file"),
    ],
)
def test_a_split_that_is_no_file_is_refused(tmp_path, split, make, kind):
    make(tmp_path / f"{split}.jsonl")
    with pytest.raises(DataError, match=rf"{split}\.jsonl does not exist as a file: it is {kind}\. Put a file"):
        read(tmp_path, None, split)


def test_a_folder_that_may_not_be_entered_is_refused(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", closed)  # the superuser, as whom tests may run, enters every folder
    with pytest.raises(DataError, match=rf"mine: {tmp_path}/mine is not accessible\. Allow it to be entered"):
        read(tmp_path, None)


def test_a_missing_column_names_it_and_what_is_there(tmp_path):
    with pytest.raises(DataError, match=r"row 2 has no column 'target'; it has 'prompt', 'reply'.*benchmarks\.mine"):
        read(tmp_path, ROW + '{"prompt": "a", "reply": "b"}\n')


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: no rows"):
        read(tmp_path, "\n")


def test_a_missing_file_names_it_and_what_is_there(tmp_path):
    (tmp_path / "trian.jsonl").write_text(ROW)
    with pytest.raises(DataError, match=r"train\.jsonl does not exist \(found: \['trian\.jsonl'\]\).*data\.path"):
        read(tmp_path, None)


def test_a_missing_validation_file_is_not_an_error(tmp_path):
    assert read(tmp_path, None, "validation") is None


def test_a_folder_of_the_benchmarks_name_comes_first(tmp_path):
    (tmp_path / "mine").mkdir()
    assert read(tmp_path / "mine", ROW) == [*open_split(BENCHMARK, "train", tmp_path)]


def test_an_unreachable_hub_names_the_id_and_the_way_out(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"someone/mine.*split validation.*no network.*data\.path=<folder>"):
        open_split(BENCHMARK, "test", None)


@dataclass(kw_only=True)
class Pairs(ExactMatch):
    """Halves of the lines of one file: the first for train, the others for everything else."""

    def file(self, split: str) -> str:
        return "pairs.jsonl"

    def derive(self, split: str, rows):
        rows = list(rows)
        return rows[:1] if split == "train" else rows[1:]


PAIRS = Pairs(name="pairs", splits={split: split for split in ("train", "validation", "test")})


def test_splits_are_derived_from_the_file_that_the_benchmark_names(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(ROW + '{"prompt": "c", "target": "d"}')
    train, validation, test = (list(open_split(PAIRS, split, tmp_path)) for split in PAIRS.splits)
    assert train == [{"prompt": "a", "target": "b"}]
    assert validation == test == [{"prompt": "c", "target": "d"}]


@pytest.mark.parametrize("split", PAIRS.splits)
def test_without_a_copy_on_the_hub_the_file_to_give_is_named(split):
    with pytest.raises(
        HubError, match=r"pairs: there is no copy on the Hub.*data\.path=<folder> that holds pairs\.jsonl,"
    ):
        open_split(PAIRS, split, None)
    other = ExactMatch(name="mine", hub=None)
    with pytest.raises(HubError, match=r"holds train\.jsonl and test\.jsonl, or a folder 'mine'"):
        open_split(other, "train", None)


def test_a_missing_file_of_all_splits_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"pairs\.jsonl does not exist \(found: \[\]\).*folder that holds pairs\.jsonl, or"
    ):
        open_split(PAIRS, "test", tmp_path)


def test_our_split_names_map_to_the_hubs(monkeypatch):
    asked = {}
    rows = [{"prompt": "a", "target": "b"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.update(more, names=names) or rows)
    assert list(open_split(BENCHMARK, "test", None, streaming=True)) == rows
    assert asked == {"names": ("someone/mine", None), "revision": None, "split": "validation", "streaming": True}


def parts(streaming: bool):
    sizes = {"a": 400, "b": 50}
    rows = [[{"name": name} for _ in range(size)] for name, size in sizes.items()]
    if streaming:
        return [datasets.IterableDataset.from_generator(lambda part=part: iter(part)) for part in rows]
    return [datasets.Dataset.from_list(part) for part in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_set_the_frequencies_of_a_mixture(streaming):
    counts = Counter(row["name"] for row in mixture(parts(streaming), weights=[1, 3], seed=0))
    assert counts["a"] >= 400
    assert 0.7 < counts["b"] / counts.total() < 0.8


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_every_row_comes_once(streaming):
    assert Counter(row["name"] for row in mixture(parts(streaming))) == {"a": 400, "b": 50}


def test_weights_must_be_positive():
    with pytest.raises(DataError, match="must be positive"):
        mixture(parts(False), weights=[1, 0])
