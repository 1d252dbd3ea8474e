import json

import pytest
from tokenizers.processors import TemplateProcessing

from tcopilot.data import (
    DataError,
    ExactMatch,
    MultipleChoice,
    TCopilotDataModule,
    YesNo,
    byte_tokenizer,
    word_tokenizer,
)
from tcopilot.data.prepare import RowPreparer, option_rows

BENCHMARK = ExactMatch(name="mine")
ROWS = [(0, {"prompt": "a b c", "target": "d"}), (1, {"prompt": "a", "target": "b c d"})]


def framed_tokenizer():
    """A tokenizer that puts <pad> before and <eos> after a text: ids a=3, b=4, c=5, d=6."""
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    frame = TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer


def prepare(side="left", tokenizer=None, rows=ROWS, training=True, **limits):
    preparer = RowPreparer(tokenizer or word_tokenizer(["a", "b", "c", "d"]), side, **limits)
    complaints = []
    prepared = list(preparer(rows, BENCHMARK, 1, 2, training, complaints.append))
    return [(row["source_ids"], row["target_ids"]) for row in prepared], complaints, preparer.counts["dropped"]


def test_targets_end_with_the_end_token_and_prompts_do_not():
    assert prepare()[0] == [([3, 4, 5], [6, 1]), ([3], [4, 5, 6, 1])]


def test_decoder_only_prompts_get_the_start_and_encoder_decoders_both_ends():
    assert prepare("left", framed_tokenizer())[0][1] == ([0, 3], [4, 5, 6, 1])
    assert prepare("right", framed_tokenizer())[0][1] == ([0, 3, 1], [4, 5, 6, 1])


@pytest.mark.parametrize(("side", "source"), [("left", [0, 3]), ("right", [0, 3, 1])])
@pytest.mark.parametrize("prompt", ["a", "<pad> a", "<pad> a <eos>"])
def test_special_tokens_that_the_prompt_spells_out_are_not_doubled(prompt, side, source):
    if side == "left" and "<eos>" in prompt:
        source = [*source, 1]  # a chat's end of turn, which the tokenizer itself does not write here
    assert prepare(side, framed_tokenizer(), [(0, {"prompt": prompt, "target": "d"})])[0][0] == (source, [6, 1])


def test_a_tokenizer_without_an_end_token_is_told_where_to_name_one():
    tokenizer = word_tokenizer(["a"])
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end token.*give eos_token in the tokenizer_config\.json of pilot\.path"):
        RowPreparer(tokenizer, "left")


def test_ids_are_unique_across_benchmarks_and_texts_are_kept_for_evaluation():
    row = next(RowPreparer(framed_tokenizer(), "left")(ROWS[1:], BENCHMARK, 1, 2, False, print))
    assert (row["id"], row["benchmark"], row["length"]) == (3, 1, 6)
    assert (row["prompt"], row["target"], row["answer"]) == ("a", "b c d", "b c d")
    assert (row["options"], row["seen"]) == ((), ())
    assert "option_ids" not in row


def test_error_names_row_length_and_limit():
    rows, complaints, _ = prepare(max_source_length=2, max_target_length=3)
    assert rows == []
    assert complaints == [
        "row 1: the prompt has 3 tokens, data.max_source_length is 2; raise it or set data.overflow=drop|truncate",
        "row 2: the target has 4 tokens, data.max_target_length is 3; raise it or set data.overflow=drop|truncate",
    ]


def test_drop_leaves_train_rows_out_and_refuses_evaluation_rows():
    assert prepare(max_source_length=2, overflow="drop") == ([([3], [4, 5, 6, 1])], [], 1)
    _, complaints, dropped = prepare(max_source_length=2, overflow="drop", training=False)
    assert dropped == 0
    assert len(complaints) == 1


def test_truncate_cuts_the_prompts_start_and_the_targets_end_which_then_has_no_end_token():
    limits = {"max_source_length": 2, "max_target_length": 3, "overflow": "truncate"}
    assert prepare(**limits)[0] == [([4, 5], [6, 1]), ([3], [4, 5, 6])]
    assert prepare("right", framed_tokenizer(), **(limits | {"max_source_length": 4}))[0][0][0] == [0, 4, 5, 1]


def test_what_was_cut_is_counted():
    preparer = RowPreparer(word_tokenizer(["a", "b", "c", "d"]), "left", 2, 3, "truncate")
    list(preparer(ROWS, BENCHMARK, 0, 1, True, print))
    assert preparer.counts == {"cut_prompts": 1, "cut_targets": 1}


def test_a_long_prompt_loses_its_middle():
    rows = [(0, {"prompt": "a " * 8 + "b " * 8 + "c", "target": "d"})]
    ((source, _),), _, _ = prepare(rows=rows, max_source_length=8, overflow="truncate")
    assert source == [3, 3, *[4] * 5, 5]


@pytest.mark.parametrize("question", ["Why? " * 40, "Why?"])
def test_options_and_what_follows_them_are_cut_last(question):
    row, ending = CHOICE | {"q": question}, "answer1: so\nanswer2: thus\nReply with one of answer1/answer2.\nReply:"
    whole = choice_rows([row])[0][0]["source_ids"]
    limits = {"max_source_length": len(ending) + 20, "overflow": "truncate"}
    (cut,), complaints, _ = choice_rows([row], **limits)
    text = byte_tokenizer().decode(cut["source_ids"])
    assert text.endswith(ending)
    assert text.startswith("Quest" if len(whole) > len(ending) + 20 else "Question: Why?")
    assert len(cut["source_ids"]) == min(len(whole), len(ending) + 20)
    assert not complaints


def test_options_that_do_not_fit_are_counted():
    columns = {"question_column": "q", "option_columns": ["o"], "label_column": "l", "label": "letter"}
    preparer = RowPreparer(byte_tokenizer(), "left", max_source_length=20, overflow="truncate")
    (row,) = preparer(enumerate([CHOICE]), MultipleChoice(name="mine", **columns), 0, 1, False, print)
    assert preparer.counts == {"cut_prompts": 1, "cut_options": 1}
    assert byte_tokenizer().decode(row["source_ids"]).endswith("1/answer2.\nReply:")


def test_a_prompt_that_truncation_empties_is_refused():
    _, complaints, _ = prepare("right", framed_tokenizer(), max_source_length=2, overflow="truncate")
    assert complaints[0] == "row 1: the prompt is empty after truncation; raise the limit"


def chat_tokenizer():
    """A tokenizer of digits that knows two end tokens, as those of chat models do, and ends texts with the first."""
    tokenizer = word_tokenizer([*"0123", "Q"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|end|>"]})
    return tokenizer


@pytest.mark.parametrize(("ending", "kept"), [("<|im_end|>", []), (" <|im_end|> ", []), ("<|end|>", ["<|end|>"])])
def test_an_end_token_in_the_target_is_not_doubled_and_no_part_of_the_answer(ending, kept):
    tokenizer = chat_tokenizer()
    preparer = RowPreparer(tokenizer, "left")
    (row,) = preparer([(0, {"prompt": "Q", "target": f"2{ending}"})], BENCHMARK, 0, 1, False, print)
    assert tokenizer.convert_ids_to_tokens(row["target_ids"]) == ["2", *kept, "<|im_end|>"]
    assert (row["answer"], row["target"].strip()) == ("2", "2")
    assert preparer.counts == {"end_tokens": 1}
    assert BENCHMARK.correct(tokenizer.decode(row["target_ids"], skip_special_tokens=True), row["answer"])


def test_an_unknown_word_is_no_end_token():
    preparer = RowPreparer(word_tokenizer(["a"]), "left")
    list(preparer([(0, {"prompt": "a", "target": "zebra"})], BENCHMARK, 0, 1, True, print))
    assert not preparer.counts


def test_text_that_spells_an_end_token_without_being_one_stays():
    (row,) = RowPreparer(byte_tokenizer(), "left")(
        [(0, {"prompt": "Q", "target": "2<eos>"})], BENCHMARK, 0, 1, False, print
    )
    assert row["answer"] == "2<eos>"


@pytest.mark.parametrize("column", ["prompt", "target"])
def test_an_empty_text_is_refused(column):
    _, complaints, _ = prepare(rows=[(6, {"prompt": "a", "target": "b"} | {column: " "})])
    assert complaints == [f"row 7: the {column} is empty: there is no text in {column}"]


def test_an_unknown_overflow_is_refused():
    with pytest.raises(DataError, match="error, drop or truncate"):
        prepare(overflow="shrink")


def choice_rows(rows, training=False, skips=False, **limits):
    columns = {"question_column": "q", "option_columns": ["o"], "label_column": "l", "label": "letter"}
    benchmark = MultipleChoice(name="mine", target=" {answer}", **columns)
    preparer, complaints, skipped = RowPreparer(byte_tokenizer(), "left", **limits), [], []
    numbered = enumerate(rows)
    found = list(preparer(numbered, benchmark, 0, 1, training, complaints.append, skipped.append if skips else None))
    return found, complaints, skipped


CHOICE = {"q": "Why?", "o": ["so", "thus"], "l": "B"}


def test_evaluation_rows_hold_options_tokenised_as_targets_are():
    (row,), _, _ = choice_rows([CHOICE])
    assert row["options"] == (" answer1", " answer2")
    assert row["option_ids"][1] == row["target_ids"]
    assert byte_tokenizer().decode(row["option_ids"][0][:-1]) == " answer1"
    assert {ids[-1] for ids in row["option_ids"]} == {byte_tokenizer().eos_token_id}


def test_training_rows_stay_lean():
    (row,), _, _ = choice_rows([CHOICE], training=True)
    assert sorted(row) == ["benchmark", "id", "length", "source_ids", "target_ids"]


def test_training_rows_have_their_options_where_a_fit_compares_them():
    limits = {"train_options": True}
    (row,), _, _ = choice_rows([CHOICE], training=True, **limits)
    (asked,), _, _ = choice_rows([CHOICE], training=False)
    assert sorted(row) == ["benchmark", "id", "length", "option_ids", "source_ids", "target_ids"]
    assert row["option_ids"] == asked["option_ids"]
    assert row["target_ids"] in row["option_ids"]


def test_in_a_mixture_only_rows_with_options_have_them(tmp_path):
    for name, rows in (("open", [{"q": f"{n}?", "a": f"{n}"} for n in range(9)]), ("closed", [CHOICE] * 9)):
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question_column": "q", "option_columns": ["o"], "label_column": "l", "label": "letter"}
    benchmarks = {
        "open": ExactMatch(name="open", prompt_column="q", target_column="a"),
        "closed": MultipleChoice(name="closed", target=" {answer}", **columns),
    }
    data = TCopilotDataModule(benchmarks, path=tmp_path, rounds=1)
    data.prepare(byte_tokenizer(), "left", train_options=True)
    found = [(row["benchmark"], len(option_rows(row))) for row in data.rows_of("train")]
    assert sorted(found) == [(0, 0)] * 9 + [(1, 2)] * 9


def test_a_wrong_option_that_is_too_long_is_not_compared():
    benchmark = YesNo(name="mine", question_column="q", label_column="l", target="{answer}")
    limits = {"max_target_length": 5, "overflow": "drop", "train_options": True}
    (row,) = RowPreparer(byte_tokenizer(), "left", **limits)(
        [(0, {"q": "?", "l": True})], benchmark, 0, 1, True, pytest.fail
    )
    assert row["option_ids"] == [row["target_ids"]]


@pytest.mark.parametrize("training", [True, False])
def test_a_target_that_is_an_option_is_refused_and_never_cut(training):
    limits = {"max_target_length": 8, "overflow": "truncate"}
    rows, complaints, skipped = choice_rows([CHOICE], training, skips=True, **limits)
    assert (rows, skipped) == ([], [])
    assert complaints[0].startswith("row 1: the target has 9 tokens, data.max_target_length is 8; raise it")
    assert "truncate" not in complaints[0]


def test_an_option_that_is_longer_than_its_rows_target_is_refused():
    benchmark = YesNo(name="mine", question_column="q", label_column="l", target="{answer}")
    preparer, complaints = RowPreparer(byte_tokenizer(), "left", max_target_length=5, overflow="truncate"), []
    assert list(preparer([(3, {"q": "?", "l": True})], benchmark, 0, 1, False, complaints.append)) == []
    assert complaints == ["row 4: its longest option has 6 tokens, data.max_target_length is 5; raise it"]


BAD = [
    (CHOICE | {"l": "C"}, "l is 'C', expected A to B"),
    (CHOICE | {"o": ["so"]}, "o gives 1 options"),
    ({"q": "Why?", "o": ["so", "thus"]}, "no 'l' in the row"),
    (CHOICE | {"q": None}, "q is None, expected a text"),
    (CHOICE | {"q": "\ud800"}, "could not be rendered (UnicodeEncodeError"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
@pytest.mark.parametrize("skips", [True, False])
def test_a_bad_row_is_named_and_the_others_stay(row, message, skips):
    rows, complaints, skipped = choice_rows([CHOICE, row, CHOICE], skips=skips)
    (complaint,) = skipped if skips else complaints
    assert complaint.startswith(f"row 2: {message}")
    assert (complaints if skips else skipped) == []
    assert [row["id"] for row in rows] == [0, 2]


def test_any_error_while_rendering_becomes_a_complaint():
    class Careless(ExactMatch):
        def render(self, row):
            return row["prompt"] + 1

    complaints = []
    rows = list(RowPreparer(byte_tokenizer(), "left")(ROWS, Careless(name="c"), 0, 1, True, complaints.append))
    assert rows == []
    assert complaints[1].startswith("row 2: could not be rendered (TypeError: ")


def test_overlong_rows_are_not_skipped_but_reported():
    rows, complaints, skipped = choice_rows([CHOICE], skips=True, max_source_length=5)
    assert (rows, skipped) == ([], [])
    assert complaints[0].startswith("row 1: the prompt has")
