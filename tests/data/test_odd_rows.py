"""What odd rows become: the right prompt, target and gold, or a message; never something else without a word."""

import json
from decimal import Decimal

import pytest

from tcopilot.data import (
    DataError,
    ExactMatch,
    LetteredOptions,
    MultipleChoice,
    NumberAnswer,
    TCopilotDataModule,
    YesNo,
    byte_tokenizer,
)
from tcopilot.data.next_item import MOST_ITEMS, NextItem
from tcopilot.data.sources import RowSource

TEXT = ExactMatch(name="mine", target=" {target}")
NUMBER = NumberAnswer(name="mine", prompt="{q}", target=" #### {number}", answer_column="a")
CHOICE = {"question_column": "q", "option_columns": ["o"], "label_column": "l"}
YES = YesNo(name="mine", question_column="q", label_column="l")
LETTERS = LetteredOptions(name="mine", question_column="q", options_column="o", label_column="l", option_count=2)


def choice(label="zero_based", **settings):
    return MultipleChoice(name="mine", label=label, **CHOICE | settings)


def read(folder, benchmark, *lines):
    """The module of a folder that has the same lines in all splits."""
    text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    for name in ("train", "validation", "test", "interactions"):
        (folder / f"{name}.jsonl").write_bytes(text)
    data = TCopilotDataModule({"mine": benchmark}, path=folder, rounds=1, batch_size=1)
    data.prepare(byte_tokenizer(), "left")
    return data


def first(folder, benchmark, *lines):
    return read(folder, benchmark, *lines).evaluation_rows("test", "mine")[0]


RIGHT = [  # a line of a file of texts, and the gold answer that it gives
    (b'\xef\xbb\xbf{"prompt": "p", "target": "t"}', "t"),
    (b'{"prompt": "p", "target": "t"}\r', "t"),
    ({"prompt": "p  ", "target": "t  "}, "t"),
    ({"prompt": "p", "target": "a\r\nb"}, "a b"),
    ({"prompt": "p", "target": "null"}, "null"),
    ({"prompt": "p", "target": "nan"}, "nan"),
    ({"prompt": "{x} {{", "target": "{y}"}, "{y}"),
    ({"prompt": "p", "target": "e\u0301"}, "\u00e9"),
    (b'{"prompt": "p", "target": 2.50}', "2.50"),
    (b'{"prompt": "p", "target": 1e22}', "1e22"),
    (b'{"prompt": "p", "target": 3.14159265358979323846}', "3.14159265358979323846"),
    (b'{"prompt": "p", "target": 9007199254740993.0}', "9007199254740993.0"),
    (b'{"prompt": "p", "target": 123456789012345678901234567890}', "123456789012345678901234567890"),
    ({"prompt": "p", "target": True}, "true"),
    ({"prompt": "p", "target": False}, "false"),
    ({"prompt": "p", "target": '["a"]'}, '["a"]'),
    ({"": "x", "prompt": "p", "target": "t", "k" * 10_000: "x"}, "t"),
]


@pytest.mark.parametrize(("line", "answer"), RIGHT)
def test_a_text_is_read_as_it_is_written(line, answer, tmp_path):
    row = first(tmp_path, TEXT, line)
    assert row["answer"] == answer
    assert TEXT.correct(row["target"], row["answer"])


@pytest.mark.parametrize("template", [" {x}", " {target} {x}"])
def test_a_template_writes_values_as_the_file_does(template, tmp_path):
    benchmark = ExactMatch(name="mine", target=template)
    given = {"true": "true", "2.0": "2.0", "1.10": "1.10", "7": "7"}
    for text, written in given.items():
        row = first(tmp_path, benchmark, b'{"prompt": "p", "target": "t", "x": %s}' % text.encode())
        assert row["target"] == template.format(target="t", x=written)
    assert first(tmp_path, ExactMatch(name="mine", target=" {x:.1f}"), {"prompt": "p", "target": "t", "x": 2.25})[
        "target"
    ] in (" 2.2", " 2.3")


REFUSED = [  # what cannot be meant, and the message
    (TEXT, b'{"prompt": "p", "target": NaN}', "target is nan, expected a text or a finite number"),
    (TEXT, b'{"prompt": "p", "target": -Infinity}', "target is -inf, expected"),
    (TEXT, b'{"prompt": "p", "target": 1e999}', "target is inf, expected"),
    (TEXT, {"prompt": None, "target": "t"}, "prompt is None, expected a text"),
    (TEXT, {"prompt": ["p"], "target": "t"}, "write prompt.0 for what is in it"),
    (TEXT, {"prompt": "p", "target": "\u200b"}, "the target is empty"),
    (TEXT, {"prompt": "p", "target": "\u0000"}, "the target is empty"),
    (TEXT, {"prompt": "p", "target": "\u00a0"}, "the target is empty"),
    (TEXT, ["p", "t"], "expected an object"),
    (TEXT, b'"p"', "expected an object"),
    (TEXT, b'{"prompt": "p", "target": "t"}{"prompt": "p", "target": "u"}', "not JSON"),
    (TEXT, b'{"prompt": "p", "target": "t"},', "not JSON"),
    (TEXT, b"{'prompt': 'p', 'target': 't'}", "not JSON"),
    (TEXT, b'{"prompt": "p", "prompt": "q", "target": "t"}', "the key 'prompt' comes twice"),
    (TEXT, b'{"prompt": "p", "target": 007}', "not JSON"),
    (TEXT, b'{"prompt": "p", "target": %s}' % (b"9" * 5000), "not JSON"),
    (TEXT, b'{"prompt": "p", "target": "\\ud800"}', "surrogates not allowed"),
    (TEXT, b"prompt,target\np,t", "not JSON"),
    (TEXT, {"Prompt": "p", "target": "t"}, "no column 'prompt'"),
    (TEXT, {"prompt ": "p", "target": "t"}, "no column 'prompt'"),
    (
        ExactMatch(name="mine", prompt="Q: {prompt}\nA:"),
        {"prompt": " ", "target": "t"},
        "the prompt is empty: .* in prompt",
    ),
    (
        ExactMatch(name="mine", target=" it is {target}"),
        {"prompt": "p", "target": " "},
        "the target is empty: .* target",
    ),
    (ExactMatch(name="mine", prompt_column="a.b"), {"a": {"b": None}, "target": "t"}, r"a\.b is None"),
    (ExactMatch(name="mine", prompt_column="a.b"), {"a": None, "target": "t"}, r"no 'a\.b' in the row"),
    (ExactMatch(name="mine", prompt_column="a.-1"), {"a": ["p"], "target": "t"}, r"no 'a\.-1' in the row"),
    (ExactMatch(name="mine", prompt_column="a.b"), {"a.b": "p", "a": {"b": "q"}, "target": "t"}, "rename one of them"),
    (ExactMatch(name="mine", prompt_column="a.b"), {"a.c": "p", "target": "t"}, r"no 'a\.b' in the row: found a\.c"),
    (
        NumberAnswer(name="mine", prompt="Q: {q}\nA:", target=" #### {number}", answer_column="a"),
        {"q": "", "a": 3},
        "the prompt is empty",
    ),
    *(
        (NUMBER, {"q": "p", "a": label}, "a is ")
        for label in (True, None, [4], {"x": 4}, "five", "0x1F", "1_000", "~5", "<5", "5-", "5 ± 1")
    ),
    *(
        (NUMBER, {"q": "p", "a": label}, "gives no number")
        for label in ("1.2.3", "2024-01-02", "12,3456", "x=5", "5'3\"", "1e400", "3/0")
    ),
    *(
        (choice(), {"q": "p", "o": ["x", "y"], "l": label}, "l is ")
        for label in (1.0, "1.0", True, None, -1, 2, "01", "A", "", [1], "\uff11")
    ),
    *(
        (choice("letter"), {"q": "p", "o": ["x", "y"], "l": label}, "l is ")
        for label in ("C", 1, "(B)", "AB", "\u0392", None)
    ),
    *((choice("one_based"), {"q": "p", "o": ["x", "y"], "l": label}, "l is ") for label in (0, 3, 1.0, True)),
    *(
        (choice(), {"q": "p", "o": options, "l": 0}, "o ")
        for options in (
            ["x"],
            ["x", None],
            ["x", ""],
            ["x", "\u200b"],
            "xy",
            {"a": "x"},
            [["x"]],
            [],
            None,
            '["x", "y"]',
            [{"text": "x"}],
        )
    ),
    (choice(), {"q": "  ", "o": ["x", "y"], "l": 0}, "the prompt is empty: .* question"),
    *(
        (
            choice("letter", option_columns=["c.t"], option_labels_column="c.k"),
            {"q": "p", "c": {"t": ["x", "y"], "k": labels}, "l": "A"},
            "expected 2 different labels",
        )
        for labels in (["A", None], ["A", True], ["A", "A"], "AB", None, {"x": 1})
    ),
    *((YES, {"q": "p", "l": label}, "expected a boolean") for label in (1, 0, "true", "no", None, 1.0, [True])),
    (YES, {"q": "", "l": True}, "the prompt is empty: .* question"),
    *(
        (LETTERS, {"q": "p", "o": options, "l": "A"}, "expected it to begin with 'A\\)'")
        for options in (["A.x", "B.y"], ["B)y", "A)x"], ["a)x", "b)y"])
    ),
    *(
        (LETTERS, {"q": "p", "o": ["A)x", "B)y"], "l": label}, "expected a letter")
        for label in ("a", "B ", "C", 0, None)
    ),
]


@pytest.mark.parametrize(("benchmark", "line", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(benchmark, line, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tmp_path, benchmark, line)


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (123456789012345678901234567890, "123456789012345678901234567890"),
        ("1,234,567,890,123,456,789,012,345,678,901", "1234567890123456789012345678901"),
        (b"1.00000000000000000000000000000000001", "1.00000000000000000000000000000000001"),
        (b"9007199254740993.0", "9007199254740993"),
        (b"1E2", "100"),
        ("1.0", "1"),
        ("5 \n", "5"),
        ("\u0661\u0662", "12"),
    ],
)
def test_a_number_keeps_all_its_digits(label, number, tmp_path):
    line = b'{"q": "p", "a": %s}' % label if isinstance(label, bytes) else {"q": "p", "a": label}
    assert first(tmp_path, NUMBER, line)["answer"] == number


@pytest.mark.parametrize("options", [["x", "x"], ["x", " x "], ["\u00e9", "e\u0301"], ["x y", "x  y"]])
def test_a_right_option_that_stands_there_twice_is_told(options, tmp_path):
    data = read(tmp_path, choice(), {"q": "p", "o": options, "l": 0}, {"q": "p", "o": ["x", "y", "y"], "l": 0})
    assert data.summary()["mine/test"]["twin_options"] == 1
    assert any("mine/test: 1 of 2 rows offer the right option twice" in remark for remark in data.remarks)
    data = read(tmp_path, LETTERS, {"q": "p", "o": ["A)x", "B) x"], "l": "A"})
    assert data.summary()["mine/train"]["twin_options"] == 1


def test_options_are_written_as_the_file_has_them(tmp_path):
    row = first(tmp_path, choice(), b'{"q": 5, "o": [true, 1.50, 2], "l": "2"}')
    assert "Question: 5\nanswer1: true\nanswer2: 1.50\nanswer3: 2\n" in row["prompt"]
    assert row["answer"] == "answer3"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"user": user, "items": [1, 2, 3]}], "expected a number or a text")
        for user in (1.0, True, None, "", " ", "\u200b", [1])
    ]
    + [
        ([{"user": 1, "items": items}], "items (holds|is)")
        for items in (["1", "2", "3"], [1.0, 2.0, 3.0], [0, 1, 2], [-1, 1, 2], [True, 2, 3], "1 2 3", [[1], [2]], None)
    ]
    + [
        ([{"user": 1, "items": [1, 2, 2]}], "has item 2 twice"),
        ([{"user": 1, "items": [1, 2]}], "needs at least 3"),
        ([{"user": 1, "items": [1, 2, MOST_ITEMS + 1]}], "without large gaps"),
        ([{"user": 1, "items": [1, 2, 3]}, {"user": "1", "items": [1, 2, 3]}], "user '1' already has row 1"),
        ([{"user": "a", "items": [1, 2, 3]}, {"user": "a ", "items": [1, 2, 3]}], "user 'a ' already has row 1"),
    ],
)
def test_histories_that_cannot_be_meant_are_refused(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tmp_path, NextItem(name="mine", title="Shop"), *rows)


@pytest.mark.parametrize("name", ["dev.jsonl", "val.jsonl", "valid.json", "validation.txt", "Validation.jsonl.gz"])
def test_a_validation_file_of_another_name_is_not_passed_over(name, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "p", "target": "t"}\n' * 20)
    data = TCopilotDataModule({"mine": TEXT}, path=tmp_path, rounds=1, batch_size=1)
    data.prepare(byte_tokenizer(), "left")
    (tmp_path / name).write_text('{"prompt": "p", "target": "t"}')
    with pytest.raises(DataError, match=rf"{name} in .* is not read, .* Rename it to validation\.jsonl"):
        data.prepare(byte_tokenizer(), "left")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_stream_leaves_out_stands_in_the_summary(workers, tmp_path):
    rows = [{"prompt": "p" * (1 + number % 3 * 9), "target": "t" if number % 4 else None} for number in range(12)]
    for split, lines in {"train": rows, "validation": rows[1:3], "test": rows[1:3]}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"overflow": "drop", "on_error": "skip", "max_source_length": 18, "shuffle_buffer": 1}
    benchmark = ExactMatch(name="mine", target=" {target}")
    data = TCopilotDataModule(
        {"mine": benchmark}, path=tmp_path, rounds=6, batch_size=2, streaming=True, num_workers=workers, **settings
    )
    with pytest.raises(DataError, match="the prompt has 19 tokens"):
        data.prepare(byte_tokenizer(), "left")
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(rows[1]))
    data.prepare(byte_tokenizer(), "left")
    assert "mine/train" not in data.summary()
    assert sum(len(batch.ids_B) for batch in data.train_dataloader()) == 12
    figures = data.summary()["mine/train"]
    assert figures["rows"] in (12, 13)  # two passes over the six that can be used, or the first row of a third
    assert figures["skipped"] in (6, 7)
    assert figures["dropped"] in (5, 6)


def test_a_column_may_have_a_dot_in_its_name():
    row = {"question.stem": "p", "target": "t"}
    benchmark = ExactMatch(name="e", prompt_column="question.stem")
    assert next(iter(RowSource("here", benchmark, [row]))) == row
    assert benchmark.render(row)[:2] == ("p", "t")
    assert ExactMatch(name="e", prompt="{question.stem}?").render(row).prompt == "p?"


def test_a_named_column_is_needed_only_where_a_template_has_its_word():
    benchmark = ExactMatch(name="e", prompt="{question} ({unit})", target=" {reply}")
    assert benchmark.columns == ["question", "unit", "reply"]
    assert benchmark.render({"question": "q", "unit": "m", "reply": "r"})[:3] == ("q (m)", " r", "r")


def test_a_value_of_another_kind_says_what_to_do():
    with pytest.raises(DataError, match=r"prompt is Decimal\('0.50'\), expected a text; write it as one in the data"):
        ExactMatch(name="e").render({"prompt": Decimal("0.50"), "target": "t"})


@pytest.mark.parametrize(
    ("metric", "mend"), [("macro_f1", "{_target_: tcopilot.data.metrics.MacroF1}"), ("nll", "fusion.select_by=nll")]
)
def test_the_name_of_another_metric_is_no_name_for_accuracy(metric, mend):
    with pytest.raises(DataError, match=f"metric='{metric}' would only rename accuracy; write .*{mend}"):
        ExactMatch(name="e", metric=metric)
