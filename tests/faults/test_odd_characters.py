"""Rows with characters that some tools take for the end of a line."""

import json

import composed
import pytest

SEPARATORS = {"U+2028": "\u2028", "U+2029": "\u2029", "U+0085": "\x85", "form feed": "\f", "carriage return": "\r"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "character",
    [pytest.param(c, id=name, marks=[] if name == "U+2028" else pytest.mark.slow) for name, c in SEPARATORS.items()],
)
def test_a_row_with_a_line_separator_goes_through_training_tables_and_back(character, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in {"train": 40, "validation": 4, "test": 4}.items():
        lines = [{"prompt": f"{split}{character}{number} ?", "target": f"a{character}b"} for number in range(rows)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="")
    run = composed.train(tmp_path / "run", "debug=fdr", "data=jsonl", f"data.path={data}")
    answers = composed.predictions(run, "test", 0.0, "jsonl")
    assert len({answer["id"] for answer in answers}) == 4
    composed.evaluate(run, tmp_path / "again")
    rows = composed.results(tmp_path / "again")["rows"]
    assert rows == [row for row in composed.results(run)["rows"] if row["weight"] in {one["weight"] for one in rows}]
