"""What is known of the rows before training: lengths, what was cut, what is in two splits, what cannot be answered."""

import json
import logging
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pytest

from tcopilot.data import (
    Answer,
    DataError,
    ExactMatch,
    GeneratedTask,
    LetteredOptions,
    Metric,
    NumberAnswer,
    TCopilotDataModule,
    byte_tokenizer,
    word_tokenizer,
)
from tcopilot.data.samplers import RoundSampler
from tcopilot.data.summary import summary_table


def write(folder, **splits) -> None:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def asked(*prompts, target="7"):
    return [{"prompt": prompt, "target": target} for prompt in prompts]


def module(folder, benchmark=None, tokenizer=None, **settings) -> TCopilotDataModule:
    benchmark = benchmark or ExactMatch(name="mine", target=" {target}")
    data = TCopilotDataModule({benchmark.name: benchmark}, path=folder, **({"batch_size": 2, "rounds": 4} | settings))
    data.prepare(tokenizer or byte_tokenizer(), "left")
    return data


def questions(data, split):
    return {row["prompt"] for row in data.evaluation_rows(split, "mine")}


# Rows in two splits -------------------------------------------------------------------------------------------------


def test_rows_with_the_same_question_are_carved_together(tmp_path):
    prompts = [f"question {i % 30}" for i in range(60)]
    write(tmp_path, train=asked(*prompts), test=asked("other"))
    data = module(tmp_path, validation_size=10, rounds=None, epochs=1)
    assert len(data.evaluation_rows("validation", "mine")) == 10
    assert len(questions(data, "validation")) == 5
    assert data.train_rows == 50
    assert data.summary()["mine/validation"]["trained_on"] == 0


def test_the_same_question_with_other_options_is_the_same_question(tmp_path):
    columns = {"question_column": "q", "options_column": "o", "label_column": "l", "option_count": 2}
    rows = [{"q": f"How many {i // 2}?", "o": [f"A){i}", "B)none"], "l": "A"} for i in range(40)]
    write(tmp_path, train=rows, test=[rows[0] | {"o": ["A)5", "B)6"]}, rows[0] | {"q": "new"}])
    data = module(tmp_path, LetteredOptions(name="mine", target=" #### {answer}", **columns), validation_size=8)
    validation = [row["prompt"].partition("\n")[0] for row in data.evaluation_rows("validation", "mine")]
    assert sorted(validation.count(question) for question in set(validation)) == [2] * 4
    assert data.summary()["mine/validation"]["trained_on"] == 0


def test_carving_rows_without_repeats_draws_what_it_always_drew(tmp_path):
    write(tmp_path, train=asked(*(f"question {i}" for i in range(20))), test=asked("other"))
    data = module(tmp_path, validation_size=4)
    assert [row["id"] for row in data.evaluation_rows("validation", "mine")] == [1, 8, 12, 13]


def test_rows_that_all_ask_the_same_can_still_be_carved_and_are_told_of(tmp_path):
    write(tmp_path, train=asked(*["same"] * 10), test=asked("other"))
    data = module(tmp_path, validation_size=3)
    assert data.summary()["mine/validation"]["trained_on"] == 3


def test_a_question_of_most_rows_is_trained_on(tmp_path):
    write(tmp_path, train=asked(*["same"] * 40, *(f"question {i}" for i in range(20))), test=asked("other"))
    for seed in range(8):
        data = module(tmp_path, validation_size=0.1, split_seed=seed)
        assert len(data.evaluation_rows("validation", "mine")) == 6


def test_a_stream_does_not_train_on_the_questions_of_its_first_rows(tmp_path):
    write(tmp_path, train=asked("a", "b", "c", "A ", "d", "b"), test=asked("other"))
    data = module(tmp_path, validation_size=2, streaming=True, rounds=4)
    assert set(chain(*(batch.ids_B.tolist() for batch in data.train_dataloader()))) == {2, 4}


def test_a_test_file_that_is_a_copy_of_train_is_told_of(tmp_path, caplog):
    rows = asked(*(f"question {i}" for i in range(20)))
    write(tmp_path, train=rows, validation=asked("v"), test=rows)
    with caplog.at_level(logging.WARNING):
        data = module(tmp_path)
    assert data.summary()["mine/test"]["trained_on"] == 20
    (remark,) = data.remarks
    assert remark.startswith("mine/test: 20 of 20 rows ask a question that is also trained on")
    assert remark in caplog.text


def test_test_rows_of_one_benchmark_that_another_one_trains_on_are_counted(tmp_path):
    for name, tested in (("one", "shared"), ("two", "own")):
        write(tmp_path / name, train=asked(f"{name} 1", "shared" if name == "two" else "x"), test=asked(tested))
        write(tmp_path / name, validation=asked("v"))
    benchmarks = {name: ExactMatch(name=name, target=" {target}") for name in ("one", "two")}
    data = TCopilotDataModule(benchmarks, path=tmp_path, rounds=1, batch_size=2)
    data.prepare(byte_tokenizer(), "left")
    assert [data.summary()[f"{name}/test"]["trained_on"] for name in benchmarks] == [1, 0]


# Seeds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_of_other_seeds_are_judged_on_the_same_rows(tmp_path, seed):
    write(tmp_path, train=asked(*(f"question {i}" for i in range(40))), test=asked(*(f"test {i}" for i in range(40))))
    limits = {"max_eval_rows": 5, "max_train_rows": 20}
    first, other = module(tmp_path, **limits), module(tmp_path, seed=seed, **limits)
    for split in ("validation", "test"):
        assert questions(first, split) == questions(other, split)
    assert questions(first, "test") != questions(module(tmp_path, split_seed=1, **limits), "test")
    order = [[batch.ids_B.tolist() for batch in data.train_dataloader()] for data in (first, other)]
    assert (order[0] == order[1]) == (seed == 0)


def test_the_second_pass_of_a_seed_is_not_the_first_of_the_next():
    def rounds(seed):
        return list(RoundSampler(40, 8, 10, seed))

    assert rounds(0)[5:] != rounds(1)[:5]
    assert [sorted(chain(*rounds(0)[first : first + 5])) for first in (0, 5)] == [list(range(40))] * 2


# Gold answers -------------------------------------------------------------------------------------------------------


def test_gold_answers_that_the_tokenizer_cannot_write_are_told_of(tmp_path, caplog):
    """A vocabulary without braces, as T5's: whatever is generated, no answer with one is right."""
    rows = [{"prompt": "a b", "target": target} for target in ("a", "{ a }", "b", "{ b }")]
    write(tmp_path, train=rows, validation=rows[:1], test=rows)
    with caplog.at_level(logging.WARNING):
        data = module(tmp_path, tokenizer=word_tokenizer(["a", "b"]))
    assert data.summary()["mine/test"]["unreachable"] == 2
    assert "mine/test: 2 of 4 gold answers are out of reach (2 changed by tokenising and decoding" in caplog.text
    assert "such as '{ a }' as 'a'" in caplog.text


def test_gold_answers_that_were_cut_or_are_too_long_are_told_of(tmp_path):
    benchmark = NumberAnswer(
        name="mine", answer_column="a", split_on="####", target=" {reasoning}\n#### {number}", prompt="{q}"
    )
    rows = [{"q": f"q{i}", "a": f"{'so ' * (5 * i)}#### {i}7"} for i in range(4)]
    write(
        tmp_path,
        train=rows[:2],
        validation=[{"q": "v", "a": "so #### 1"}],
        test=[r | {"q": r["q"] + "t"} for r in rows],
    )
    free = module(tmp_path, benchmark)
    assert free.summary()["mine/test"]["unreachable"] == 2
    assert any("2 longer than the 26 tokens that decoding generates at most" in remark for remark in free.remarks)
    cut = module(tmp_path, benchmark, max_target_length=26, overflow="truncate")
    assert cut.summary()["mine/test"]["unreachable"] == cut.summary()["mine/test"]["cut_targets"] == 2
    told = "\n".join(cut.remarks)
    assert "mine/test: 2 of 4 targets were cut; a cut target lacks its end token" in told
    assert "2 cut by data.max_target_length" in told
    limited = TCopilotDataModule({"mine": benchmark}, path=tmp_path, rounds=1)
    limited.prepare(byte_tokenizer(), "left", max_new_tokens=4)
    assert limited.summary()["mine/test"]["unreachable"] == 4


def test_few_cut_rows_are_counted_without_a_warning(tmp_path):
    rows = asked(*(f"question {i}" for i in range(150)), "question " * 9)
    write(tmp_path, train=rows, validation=asked("v"), test=asked("t"))
    data = module(tmp_path, max_source_length=20, overflow="truncate")
    assert data.summary()["mine/train"]["cut_prompts"] == 1
    assert data.remarks == []


# The summary --------------------------------------------------------------------------------------------------------


def test_the_summary_gives_rows_and_lengths_of_every_split(tmp_path):
    lengths = [1, 2, 3, 4, 50]
    write(tmp_path, train=asked(*("x" * n for n in lengths)), validation=asked("v"), test=asked("x" * 9))
    found = module(tmp_path).summary()
    train = {name: value for name, value in found["mine/train"].items() if name.startswith(("rows", "source"))}
    assert train == {
        "rows": 5,
        "source_mean": 12,
        "source_median": 3,
        "source_p95": pytest.approx(40.8),
        "source_max": 50,
    }
    assert list(found) == ["mine/train", "mine/validation", "mine/test"]
    table = summary_table(found)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == list(found)
    assert cells[2] == ["3 / 41 / 50", "1 / 1 / 1", "9 / 9 / 9"]
    assert len(table.columns) == 4  # nothing was dropped, cut or is odd


def test_generated_tasks_have_nothing_odd():
    task = GeneratedTask(name="mine", kind="multiple_choice", train=400, validation=40, test=40)
    data = TCopilotDataModule({"mine": task}, rounds=1)
    data.prepare(word_tokenizer(task.vocabulary), "left")
    assert data.remarks == []
    odd = ("dropped", "skipped", "cut_prompts", "cut_targets", "end_tokens", "trained_on", "unreachable")
    assert not any(part.get(name) for part in data.summary().values() for name in odd)


@dataclass(frozen=True)
class Half(Metric):
    """A metric that gives a value of any type, or fails with it."""

    name: str = "half"
    given: Any = 0.5

    def score(self, answer: Answer) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (float("nan"), "the metric half gave nan for the answer '7'"),
        (np.True_, "gave .*True_? for .*must be a finite number, such as a float"),
        (KeyError("x"), r"mine: its metrics cannot score the gold answer '7' \(KeyError: 'x'\); mend them"),
    ],
)
def test_a_metric_that_fails_does_so_before_training(given, problem, tmp_path):
    write(tmp_path, train=asked("a", "b"), test=asked("c"))
    with pytest.raises(DataError, match=problem):
        module(tmp_path, ExactMatch(name="mine", more_metrics=[Half(given=given)]))


@pytest.mark.parametrize("given", [np.float32(0.5), np.float64(0.5)])
def test_a_score_may_be_a_number_of_numpys(given):
    score = ExactMatch(name="mine", metric=Half(given=given)).score("t", "t")["half"]
    assert (type(score), score) == (float, 0.5)


# Files that settings name -------------------------------------------------------------------------------------------


def test_a_validation_split_of_another_name_is_read_from_its_file(tmp_path):
    write(tmp_path, train=asked("a", "b"), my_dev=asked("dev"), test=asked("t"))
    splits = {"train": "train", "validation": "my_dev", "test": "test"}
    assert questions(module(tmp_path, ExactMatch(name="mine", splits=splits)), "validation") == {"dev"}
    (tmp_path / "my_dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"splits\.validation=my_dev: .*my_dev\.jsonl does not exist"):
        module(tmp_path, ExactMatch(name="mine", splits=splits))


def test_a_split_of_another_name_is_no_file_of_ours(tmp_path):
    write(tmp_path, train=asked("a", "b"), validation=asked("v"), test=asked("t"))
    for place, read in {"validation": {"v"}, "train[1:]": {"b"}}.items():
        splits = {"train": "train[:1]", "test": place}
        assert questions(module(tmp_path, ExactMatch(name="mine", splits=splits)), "test") == read
    for splits in ({"train": "trian", "test": "test"}, {"train": "train", "test": "rows.txt"}):
        with pytest.raises(DataError, match=r"splits\.\w+=(trian|rows\.txt): .* does not exist \(found: \['te"):
            module(tmp_path, ExactMatch(name="mine", splits=splits))


def test_files_of_ours_stand_for_the_hubs_splits_of_other_names(tmp_path):
    write(tmp_path, train=asked("a", "b"), validation=asked("v"), test=asked("t"))
    hub = {"hub": "someone/mine", "splits": {"train": "train_l", "test": "validation"}}
    data = module(tmp_path, ExactMatch(name="mine", **hub))
    assert (questions(data, "validation"), questions(data, "test")) == ({"v"}, {"t"})


def test_one_of_several_benchmarks_without_a_folder_is_refused(tmp_path):
    write(tmp_path, train=asked("root"), test=asked("root"))
    write(tmp_path / "one", train=asked("a", "b"), test=asked("t"))
    benchmarks = {name: ExactMatch(name=name) for name in ("one", "two")}
    with pytest.raises(DataError, match=r"two: there is no folder .*two, .*data\.benchmarks\.two\.folder"):
        TCopilotDataModule(benchmarks, path=tmp_path, rounds=1).prepare(byte_tokenizer(), "left")
