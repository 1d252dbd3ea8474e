"""Prediction files: cut lines, other keys, and several processes that share the rows."""

import json
import time
from functools import cache

import pytest
import torch
from processes import run_in_processes
from small_training import tiny_model

from tcopilot.data import GeneratedTask, TCopilotDataModule, word_tokenizer
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.modes import Decoding
from tcopilot.evaluation.predictions import PredictionFiles, claim, fingerprint
from tcopilot.processes import rank, world_size


def line(number: int, **more) -> dict:
    return {"id": number, "scores": {"accuracy": 1.0}, **more}


def test_rows_are_joined_once_each_in_the_order_asked(tmp_path):
    files = PredictionFiles(tmp_path, "test-a", [0.0, 0.5])
    for weight in (0.0, 0.5):
        files.append({weight: [line(3), line(1), line(3), line(2)]})
    found = files.finish([1, 2, 3])
    assert [prediction["id"] for prediction in found[0.5]] == [1, 2, 3]
    assert len((tmp_path / "test-a-weight=0.5.jsonl").read_text().splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"test-a-weight=0.jsonl", "test-a-weight=0.5.jsonl"}


def test_a_line_that_was_cut_is_left_out_and_does_not_spoil_the_next(tmp_path):
    files = PredictionFiles(tmp_path, "test-a", [1.0])
    files.append({1.0: [line(1), line(2, prediction="some text")]})
    file = tmp_path / "test-a-weight=1.jsonl"
    file.write_text(file.read_text()[:-5])
    assert set(files.done()[1.0]) == {1}
    files.append({1.0: [line(2)]})
    assert set(files.done()[1.0]) == {1, 2}


def test_the_lines_of_other_processes_are_read_too(tmp_path):
    files = PredictionFiles(tmp_path, "test-a", [1.0])
    files.append({1.0: [line(1)]})
    (tmp_path / "test-a-weight=1.jsonl.rank1").write_text(json.dumps(line(2)) + "\n")
    assert [p["id"] for p in files.finish([2, 1])[1.0]] == [2, 1]
    assert not list(tmp_path.glob("*.rank*"))


def test_another_key_removes_what_was_predicted(tmp_path):
    file = tmp_path / "test-a-weight=1.jsonl"
    for key, kept in (({"model": "a"}, False), ({"model": "a"}, True), ({"model": "b"}, False)):
        claim(tmp_path, "test-a", key)
        assert file.exists() == kept
        file.write_text("{}\n")
    other = tmp_path / "test-b-weight=1.jsonl"
    other.write_text("{}\n")
    claim(tmp_path, "test-a", {"model": "c"})
    assert (file.exists(), other.exists()) == (False, True)


def test_a_key_that_cannot_be_read_keeps_nothing(tmp_path):
    for text in ("", "{", '{"model": "a"}', "{}"):
        (tmp_path / "key.json").write_text(text)
        (tmp_path / "test-a-weight=1.jsonl").write_text("{}\n")
        claim(tmp_path, "test-a", {"model": "a"})
        assert not (tmp_path / "test-a-weight=1.jsonl").exists()


@pytest.mark.parametrize("change", ["one value", "two rows exchanged", "two columns exchanged", "type"])
def test_the_fingerprint_follows_every_weight(change):
    model = tiny_model("t5", head_std=0.1)
    before = fingerprint(model)
    assert fingerprint(tiny_model("t5", head_std=0.1)) == before
    for name, parameter in list(model.named_parameters()):
        kept = parameter.data.clone()
        if change == "one value":
            parameter.data.view(-1)[0] += 0.1
        elif change == "type":
            parameter.data = kept.bfloat16()
        elif parameter.dim() > 1:
            parameter.data = kept.roll(1, dims=("rows" not in change) * 1)
        else:
            continue
        assert (fingerprint(model) == before) == torch.equal(parameter, kept) * (parameter.dtype == kept.dtype), name
        parameter.data = kept
    assert fingerprint(model) == before


def test_the_fingerprint_follows_the_config_but_for_the_weight_of_the_copilot():
    model = tiny_model("llama", head_std=0.1)
    before = fingerprint(model)
    model.weight = 0.3
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == before
    model.config.feedback = "own"
    assert fingerprint(model) != before
    model.config.feedback = "observed"
    model.pilot.config.rms_norm_eps = model.config.pilot.rms_norm_eps = 1e-3
    assert fingerprint(model) != before


# Two processes ---------------------------------------------------------------------------------------------------


@cache
def parts(family: str):
    task = GeneratedTask(name="word_problems", kind="word_problems", train=16, validation=9, test=11, max_new_tokens=4)
    data = TCopilotDataModule({"word_problems": task}, batch_size=8, rounds=1)
    tokenizer = word_tokenizer(data.vocabulary)
    tokenizer.padding_side = "right" if family == "t5" else "left"
    data.prepare(tokenizer, tokenizer.padding_side)
    return tiny_model(family, vocab=len(tokenizer), head_std=0.1), tokenizer, data


def evaluate_job(folder):
    for family in ("t5", "llama"):
        evaluator = Evaluator(*parts(family), folder / family, Decoding(batch_size=4))
        found = evaluator.run([0.5, 1.0])
        rows = [[row.metric, row.split, row.weight, row.value, row.n, list(row.ci95)] for row in found.rows]
        (folder / f"{family}-{rank()}-of-{world_size()}.json").write_text(json.dumps([rows, found.selected_weight]))


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_answer_each_row_once(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    evaluate_job(tmp_path / "one")
    run_in_processes(evaluate_job, tmp_path / "two")
    for family in ("t5", "llama"):
        rows, selected = json.loads((tmp_path / "one" / f"{family}-0-of-1.json").read_text())
        for number in (0, 1):
            others, chosen = json.loads((tmp_path / "two" / f"{family}-{number}-of-2.json").read_text())
            assert chosen == selected
            for one, two in zip(rows, others, strict=True):
                assert one[:3] == two[:3]
                assert one[3] == pytest.approx(two[3], rel=1e-6)
                assert one[4] == two[4]
        one, two = (
            {path.name: path.read_text() for path in (tmp_path / n / family).iterdir()} for n in ("one", "two")
        )
        assert one == two


def scores_job(folder):
    Evaluator(*parts("t5"), folder, Decoding(batch_size=4)).scores("test", "word_problems", [1.0])


def test_two_processes_go_on_where_one_stopped(tmp_path):
    scores_job(tmp_path)
    file = tmp_path / "test-word_problems-weight=1.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line.replace('"prediction": "', '"prediction": "kept: ') for line in lines[:5]) + "\n")
    run_in_processes(scores_job, tmp_path)
    joined = file.read_text().splitlines()
    assert ["kept: " in line for line in joined] == [True] * 5 + [False] * 6
    assert joined[5:] == lines[5:]


def late_scores_job(folder):
    """Scores, while process 0 reads what is answered only after process 1 could have answered its share."""
    read = PredictionFiles.done

    def late(files):
        time.sleep(1.0 if rank() == 0 else 0.0)
        return read(files)

    PredictionFiles.done = late
    scores_job(folder)


@pytest.mark.slow
def test_processes_that_start_at_different_times_share_the_rows_all_the_same(tmp_path):
    run_in_processes(late_scores_job, tmp_path)
    assert len((tmp_path / "test-word_problems-weight=1.jsonl").read_text().splitlines()) == 11
