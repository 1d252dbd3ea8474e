import pytest
from tokenizers.processors import TemplateProcessing

from tcopilot.data import DataError, ExactMatch, word_tokenizer
from tcopilot.data.prepare import RowPreparer

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
    return [(row["source_ids"], row["target_ids"]) for row in prepared], complaints, preparer.dropped


def test_targets_end_with_the_end_token_and_prompts_do_not():
    assert prepare()[0] == [([3, 4, 5], [6, 1]), ([3], [4, 5, 6, 1])]


def test_decoder_only_prompts_get_the_start_and_encoder_decoders_both_ends():
    assert prepare("left", framed_tokenizer())[0][1] == ([0, 3], [4, 5, 6, 1])
    assert prepare("right", framed_tokenizer())[0][1] == ([0, 3, 1], [4, 5, 6, 1])


def test_ids_are_unique_across_benchmarks_and_texts_are_kept_for_evaluation():
    row = next(RowPreparer(framed_tokenizer(), "left")(ROWS[1:], BENCHMARK, 1, 2, False, print))
    assert (row["id"], row["benchmark"], row["length"]) == (3, 1, 6)
    assert (row["prompt"], row["target"], row["answer"]) == ("a", "b c d", "b c d")


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


def test_truncate_cuts_the_prompts_start_and_the_targets_end():
    limits = {"max_source_length": 2, "max_target_length": 3, "overflow": "truncate"}
    assert prepare(**limits)[0] == [([4, 5], [6, 1]), ([3], [4, 5, 1])]
    assert prepare("right", framed_tokenizer(), **(limits | {"max_source_length": 4}))[0][0][0] == [0, 4, 5, 1]


def test_a_target_that_truncation_empties_is_refused():
    _, complaints, _ = prepare(max_target_length=1, overflow="truncate")
    assert complaints[0] == "row 1: the target is empty after truncation; raise the limit"


@pytest.mark.parametrize("column", ["prompt", "target"])
def test_an_empty_text_is_refused(column):
    _, complaints, _ = prepare(rows=[(6, {"prompt": "a", "target": "b"} | {column: " "})])
    assert complaints == [f"row 7: the {column} is empty"]


def test_an_unknown_overflow_is_refused():
    with pytest.raises(DataError, match="error, drop or truncate"):
        prepare(overflow="shrink")
