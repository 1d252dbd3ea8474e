import time

import pytest

from tcopilot.data import DataError, GeneratedTask, word_tokenizer
from tcopilot.data.generated_tasks import KINDS, TENS, UNITS

SPLITS = ("train", "validation", "test")


def task(kind: str, **settings) -> GeneratedTask:
    return GeneratedTask(name=kind, kind=kind, **({"train": 3000, "validation": 200, "test": 300} | settings))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_equal_seeds_give_equal_rows_and_others_do_not(self, kind):
        rows = [task(kind, seed=seed).builtin_rows("train") for seed in (1, 1, 2)]
        assert rows[0] == rows[1] != rows[2]

    def test_sizes_are_as_asked_and_no_prompt_is_in_two_splits(self, kind):
        generated = task(kind)
        rows = [generated.builtin_rows(split) for split in SPLITS]
        train, validation, test = ({row["prompt"] for row in part} for part in rows)
        assert [len(part) for part in rows] == [3000, 200, 300]
        assert (len(validation), len(test)) == (200, 300)
        assert not train & validation
        assert not train & test
        assert not validation & test

    def test_the_vocabulary_is_closed_and_every_word_once(self, kind):
        generated = task(kind)
        assert len(set(generated.vocabulary)) == len(generated.vocabulary)
        tokenizer = word_tokenizer(generated.vocabulary)
        texts = [text for split in SPLITS for row in generated.builtin_rows(split) for text in row.values()]
        assert tokenizer.unk_token_id not in {token for ids in tokenizer(texts).input_ids for token in ids}

    def test_the_gold_target_is_correct(self, kind):
        generated = task(kind)
        examples = [generated.render(row) for row in generated.builtin_rows("test")]
        assert all(generated.correct(example.target, example.answer) for example in examples)

    def test_the_default_size_is_drawn_within_seconds(self, kind):
        start = time.perf_counter()
        assert len(GeneratedTask(name=kind, kind=kind).builtin_rows("train")) == 32_000
        assert time.perf_counter() - start < 5


def test_word_problems_are_solved_by_arithmetic():
    for row in task("word_problems").builtin_rows("train"):
        first, second = (int(word) for word in row["prompt"].split() if word.isdigit())
        assert int(row["target"]) in (first + second, first - second)


def test_signed_differences_are_solved_by_subtraction_and_turn_with_the_order_of_the_numbers():
    numbers = dict(zip([*UNITS, *TENS], [*range(20), *range(20, 100, 10)], strict=True))

    def read(said: str) -> int:
        words = said.split()
        sign = -1 if words[0] == "minus" else 1
        return sign * sum(numbers[word] for word in words if word != "minus")

    for row in task("signed_difference").builtin_rows("train"):
        first, second = row["prompt"].removeprefix("what is ").removesuffix(" ?").split(" minus ")
        assert read(row["target"]) == read(first) - read(second)
        assert 0 <= read(second) < 100


def test_the_gold_option_of_multiple_choice_is_among_the_three():
    for row in task("multiple_choice").builtin_rows("train"):
        assert row["target"].split()[-1] in row["prompt"].split()[-3:]


def test_prompts_that_run_out_are_an_error(monkeypatch):
    monkeypatch.setitem(KINDS, "word_problems", KINDS["word_problems"]._replace(draw=lambda random: ("same", "1")))
    with pytest.raises(DataError, match="only 1 have new prompts"):
        task("word_problems").builtin_rows("test")


def test_an_unknown_kind_is_refused():
    with pytest.raises(DataError, match="the known ones are word_problems"):
        task("sudoku")
