"""The evaluator on tiny models with random weights: what is decoded, judged, written and chosen."""

import json
import math
from dataclasses import fields

import pytest
import torch
from small_training import source_side, tiny_model

from tcopilot.data import GeneratedTask, TCopilotDataModule, word_tokenizer
from tcopilot.data.metrics import Metric
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.generation import Generation
from tcopilot.evaluation.modes import Decoding
from tcopilot.evaluation.selection import by_metric
from tcopilot.models.gates import build_gate

FAMILIES = ("t5", "llama")
WEIGHTS = [0.5, 1.0]
ACCURACY = Metric("accuracy")


def rows_of(family: str, *kinds: str) -> TCopilotDataModule:
    """Generated rows: 12 to validate on, 10 to test on."""
    tasks = {k: GeneratedTask(name=k, kind=k, train=16, validation=12, test=10, max_new_tokens=5) for k in kinds}
    data = TCopilotDataModule(tasks, batch_size=8, rounds=1)
    data.prepare(word_tokenizer(data.vocabulary), source_side(family))
    return data


def evaluator(family, folder, *kinds, decoding=None, per="all", select_by="metric", **options) -> Evaluator:
    """An evaluator of an untrained model whose Copilot has a say."""
    data = rows_of(family, *(kinds or ("word_problems",)))
    tokenizer = word_tokenizer(data.vocabulary)
    tokenizer.padding_side = source_side(family)
    model = tiny_model(family, vocab=len(tokenizer), **({"head_std": 0.1} | options))
    return Evaluator(model, tokenizer, data, folder, decoding or Decoding(), per, select_by)


def written(folder, split="test", weight=1.0, benchmark="word_problems") -> list[dict]:
    text = (folder / f"{split}-{benchmark}-weight={weight:g}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def outcomes(monkeypatch, right) -> None:
    """Replace decoding by `right(split, weight, row number)`."""

    def scores(self, split, benchmark, weights):
        places = range(len(self.data.evaluation_rows(split, benchmark)))
        return {weight: {ACCURACY: [float(right(split, weight, i)) for i in places]} for weight in weights}

    monkeypatch.setattr(Evaluator, "scores", scores)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_batch_they_are_decoded_in(family, tmp_path):
    said = []
    for size in (1, 5, 64):
        judge = evaluator(family, tmp_path / str(size), decoding=Decoding(batch_size=size))
        judge.scores("test", "word_problems", [1.0])
        rows = written(tmp_path / str(size))
        said.append({row["id"]: row["prediction"] for row in rows})
    assert len(said[0]) == 10
    assert said[0] == said[1] == said[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_static_decoding_gives_the_same_answers(family, tmp_path):
    said = []
    for name in ("dynamic", "static"):
        judge = evaluator(family, tmp_path / name, decoding=Decoding(batch_size=7, decoding=name, compile=False))
        judge.scores("test", "word_problems", [0.0, 1.0])
        said.append([row["prediction"] for weight in (0.0, 1.0) for row in written(tmp_path / name, weight=weight)])
        assert (judge.model.static_decoder is not None) == (name == "static")
    assert said[0] == said[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_come_in_the_order_of_the_rows(family, tmp_path, monkeypatch):
    judge = evaluator(family, tmp_path, decoding=Decoding(batch_size=3))
    rows = judge.data.evaluation_rows("test", "word_problems")
    right = {row["id"]: i % 3 == 0 for i, row in enumerate(rows)}
    answered_by(monkeypatch, lambda row, weight: right[row["id"]])
    assert judge.scores("test", "word_problems", [0.0]) == {0.0: {ACCURACY: [float(i % 3 == 0) for i in range(10)]}}


def answered_by(monkeypatch, right, before=lambda rows: None) -> None:
    """Replace decoding by `right(row, weight)`; `before` is told of each batch."""

    def answer(self, rows, weights):
        before(rows)
        return {
            weight: [self.judged(row | {"prediction": row["target"] if right(row, weight) else ""}) for row in rows]
            for weight in weights
        }

    monkeypatch.setattr(Generation, "answer", answer)


def test_what_is_decoded_is_on_disk_at_once(tmp_path, monkeypatch):
    judge = evaluator("t5", tmp_path, decoding=Decoding(batch_size=4))
    batches = []

    def stop_at_the_third(rows):
        batches.append(rows)
        if len(batches) == 3:
            raise KeyboardInterrupt

    answered_by(monkeypatch, lambda row, weight: True, stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        judge.scores("test", "word_problems", [1.0])
    assert len(written(tmp_path)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["between rows", "inside a line"])
def test_a_stopped_evaluation_goes_on_and_ends_as_if_it_had_not_stopped(tmp_path, cut, monkeypatch):
    whole = evaluator("t5", tmp_path / "whole").scores("test", "word_problems", [0.0, 1.0])
    decode, batches = Generation.answer, []

    def answer(self, rows, weights):
        batches.append([row["id"] for row in rows])
        if len(batches) == 3:
            raise KeyboardInterrupt
        return decode(self, rows, weights)

    monkeypatch.setattr(Generation, "answer", answer)
    stopped = lambda: evaluator("t5", tmp_path / "stopped", decoding=Decoding(batch_size=4))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        stopped().scores("test", "word_problems", [0.0, 1.0])
    if cut == "inside a line":
        file = tmp_path / "stopped" / "test-word_problems-weight=1.jsonl"
        file.write_text(file.read_text()[:-20])
    answered = {number for batch in batches[:2] for number in batch}
    assert stopped().scores("test", "word_problems", [0.0, 1.0]) == whole
    again = {number for batch in batches[3:] for number in batch}
    assert len(answered & again) == (1 if cut == "inside a line" else 0)
    for weight in (0.0, 1.0):
        assert written(tmp_path / "stopped", weight=weight) == written(tmp_path / "whole", weight=weight)


@pytest.mark.parametrize("change", ["model", "decoding", "feedback", "version", "benchmark"])
def test_predictions_of_another_setting_are_not_taken_up(tmp_path, change, monkeypatch):
    asked = []
    answered_by(monkeypatch, lambda row, weight: True, asked.append)
    evaluator("t5", tmp_path).scores("test", "word_problems", [1.0])
    evaluator("t5", tmp_path).scores("test", "word_problems", [1.0])
    assert len(asked) == 1
    options = {"model": {"seed": 1}, "feedback": {"feedback": "own"}}.get(change, {})
    judge = evaluator("t5", tmp_path, decoding=Decoding(num_beams=2) if change == "decoding" else None, **options)
    if change == "benchmark":
        judge.data.benchmarks["word_problems"].max_new_tokens = 3
    if change == "version":
        judge.data.benchmarks["word_problems"].version = 2
    judge.scores("test", "word_problems", [1.0])
    assert len(asked) == 2


ANSWERS_DEPEND_ON = {
    "prompt": "Q: {prompt}", "target": " ({target})", "prompt_column": "question", "target_column": "solution",
    "version": 2, "max_new_tokens": 3, "name": "other", "kind": "next_item", "seed": 1, "train": 17, "test": 11,
    "validation": 13,
}  # fmt: skip
NO_ANSWER_DEPENDS_ON = {
    "source": "another licence", "hub": "owner/name", "config": "main", "revision": "abc", "folder": "elsewhere",
    "splits": {"train": "train", "test": "dev"}, "metric": "exact_match", "more_metrics": [Metric("exact_match")],
}  # fmt: skip


def test_every_setting_of_a_benchmark_is_known_to_change_answers_or_not():
    names = {field.name for field in fields(GeneratedTask)}
    assert names == ANSWERS_DEPEND_ON.keys() | NO_ANSWER_DEPENDS_ON.keys()


@pytest.mark.parametrize("setting", [*ANSWERS_DEPEND_ON, *NO_ANSWER_DEPENDS_ON])
def test_stored_predictions_stay_unless_a_setting_changes_answers(setting):
    # What was asked of a Pilot for an hour must not be asked again because a licence note was edited.
    task = GeneratedTask(name="a", kind="word_problems", max_new_tokens=5)
    before = task.answer_settings()
    setattr(task, setting, (ANSWERS_DEPEND_ON | NO_ANSWER_DEPENDS_ON)[setting])
    assert (task.answer_settings() == before) == (setting in NO_ANSWER_DEPENDS_ON)


def test_editing_a_remark_answers_no_row_again(tmp_path, monkeypatch):
    asked = []
    answered_by(monkeypatch, lambda row, weight: row["id"] % 2, asked.append)
    evaluator("t5", tmp_path).scores("test", "word_problems", [1.0])
    judge = evaluator("t5", tmp_path)
    judge.data.benchmarks["word_problems"].source = "another licence"
    judge.data.benchmarks["word_problems"].metric = "exact_match"  # scored anew from what was stored
    (scores,) = judge.scores("test", "word_problems", [1.0]).values()
    assert len(asked) == 1
    rows = judge.data.evaluation_rows("test", "word_problems")
    assert scores == {Metric("exact_match"): [float(row["id"] % 2) for row in rows]}
    assert list(written(tmp_path)[0]["scores"]) == ["exact_match"]


def test_a_change_asks_only_those_rows_again_whose_answers_depend_on_it(tmp_path, monkeypatch):
    asked = []
    answered_by(monkeypatch, lambda row, weight: True, lambda rows: asked.append(rows[0]["benchmark"]))
    names = ("word_problems", "multiple_choice")

    def judged(**changes) -> list[int]:
        asked.clear()
        judge = evaluator("t5", tmp_path, *names)
        judge.data.benchmarks["word_problems"].max_new_tokens = changes.get("max_new_tokens", 5)
        judge.decoding.ranking_beams = changes.get("ranking_beams", 100)
        judge.model.weight = changes.get("weight", 1.0)
        for name in names:
            judge.scores("test", name, [1.0])
        return asked

    assert judged() == [0, 1]
    assert judged(ranking_beams=7, weight=0.5) == []  # nothing is ranked, and answers are at the λ that is asked for
    assert judged(max_new_tokens=3) == [0]


def test_repeating_an_evaluation_replaces_its_predictions(tmp_path):
    judge = evaluator("t5", tmp_path)
    for _ in range(2):
        judge.scores("test", "word_problems", [1.0])
    assert len(written(tmp_path)) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_end_at_the_limit_of_the_benchmark_unless_another_is_given(family, tmp_path):
    for limit, tokens in ((None, 5), (2, 2)):
        judge = evaluator(family, tmp_path, decoding=Decoding(max_new_tokens=limit))
        longest = []
        generate = judge.model.generate
        judge.model.generate = lambda **options: longest.append(options["max_new_tokens"]) or generate(**options)  # noqa: B023
        judge.scores("test", "word_problems", [1.0])
        assert set(longest) == {tokens}
        assert max(len(row["prediction"].split()) for row in written(tmp_path)) <= tokens


@pytest.mark.parametrize("feedback", ["observed", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_is_that_of_the_fused_model_per_target_token(family, feedback, tmp_path):
    judge = evaluator(family, tmp_path, feedback=feedback)
    found = judge.run(WEIGHTS)
    model, rows = judge.model, judge.data.evaluation_rows("test", "word_problems")
    for weight in (0.0, 0.5, 1.0):
        model.weight = weight
        total = count = 0
        for row in rows:  # one row at a time, through the model's own loss
            source, target = (torch.tensor([row[key]]) for key in ("source_ids", "target_ids"))
            with torch.no_grad():
                if family == "t5":
                    loss = model(input_ids=source, labels=target).loss
                else:
                    text = torch.cat([source, target], dim=1)
                    loss = model(
                        input_ids=text, labels=text.masked_fill(torch.arange(text.shape[1]) < source.shape[1], -100)
                    ).loss
            total, count = total + loss.item() * target.shape[1], count + target.shape[1]
        (row,) = [r for r in found.rows if (r.split, r.metric, r.weight) == ("test", "nll", weight)]
        assert row.value == pytest.approx(total / count, rel=1e-4)
        assert row.n == count


def test_the_pilot_is_always_among_the_weights_and_each_is_scored_once(tmp_path):
    found = evaluator("t5", tmp_path).run([1.0, 0.5, 1.0])
    assert [r.weight for r in found.rows if (r.split, r.metric) == ("test", "accuracy")] == [0.0, 0.5, 1.0]


def test_the_weight_is_chosen_on_validation_and_compared_on_test(tmp_path, monkeypatch):
    outcomes(monkeypatch, lambda split, w, i: i < {0.0: 3, 0.5: 7, 1.0: 5}[w] if split == "validation" else i < 10 * w)
    judge = evaluator("t5", tmp_path)
    found = judge.run(WEIGHTS)
    assert found.selected_weight == 0.5
    (gain,) = found.gain
    assert (gain.pilot, gain.fused, gain.fixed, gain.broken) == (0.0, 0.5, 5, 0)
    assert judge.model.weight == 0.5  # what is exported and used next


def test_each_benchmark_may_have_a_weight_of_its_own(tmp_path, monkeypatch):
    def scores(self, split, benchmark, weights):
        favoured = {"word_problems": 1.0, "multiple_choice": 0.5}[benchmark]
        count = len(self.data.evaluation_rows(split, benchmark))
        return {weight: {ACCURACY: [float(weight == favoured)] * count} for weight in weights}

    monkeypatch.setattr(Evaluator, "scores", scores)
    judge = evaluator("t5", tmp_path, "word_problems", "multiple_choice", per="benchmark")
    found = judge.run(WEIGHTS)
    assert found.selected_weight == {"word_problems": 1.0, "multiple_choice": 0.5, "all": judge.model.weight}
    assert [gain.fused for gain in found.gain] == [1.0, 1.0]
    assert judge.model.weight in WEIGHTS
    assert any("multiple_choice 0.5" in verdict for verdict in found.verdicts)
    assert set(judge.run([0.5]).selected_weight.values()) == {0.5}


@pytest.mark.slow
def test_the_closed_form_weight_of_each_benchmark_is_of_its_own_rows(tmp_path):
    names = ("word_problems", "multiple_choice")
    judge = evaluator("t5", tmp_path / "both", *names, per="benchmark")
    found = judge.run(None)
    statistics = judge._statistics("validation", [0.0])
    own = {name: round(statistics[name].best_weight, 3) for name in names}
    assert found.selected_weight == {**own, "all": judge.model.weight}
    assert {gain.benchmark for gain in found.gain} == set(names)
    assert len({row.weight for row in found.rows}) == len({0.0, *found.selected_weight.values()})


@pytest.mark.parametrize("favoured", [0.0, 0.5, 1.0])
def test_the_choice_is_the_same_whatever_the_test_rows_say(favoured, tmp_path, monkeypatch):
    outcomes(monkeypatch, lambda split, w, i: i < 6 * w if split == "validation" else w == favoured)
    assert evaluator("llama", tmp_path).run(WEIGHTS).selected_weight == 1.0


def test_ties_go_to_the_likelier_and_then_to_the_smaller_weight():
    even = {"a": {w: {ACCURACY: [1.0, 0.0]} for w in (0.0, 0.5, 1.0)}}
    assert by_metric(even, {0.0: 2.0, 0.5: 1.0, 1.0: 1.5}) == 0.5
    assert by_metric(even, {0.0: 2.0, 0.5: 1.0, 1.0: 1.0}) == 0.5
    assert by_metric(even, dict.fromkeys(even["a"], 1.0)) == 0.0
    better = {"a": even["a"] | {1.0: {ACCURACY: [1.0, 1.0], Metric("another"): [0.0, 0.0]}}}
    assert by_metric(better, {0.0: 1.0, 0.5: 1.0, 1.0: 9.0}) == 1.0


# λ of an earlier run ----------------------------------------------------------------------------------------------


def test_the_known_weight_is_taken_where_none_is_given(tmp_path, monkeypatch):
    outcomes(monkeypatch, lambda split, weight, i: weight == 0)
    judge = evaluator("t5", tmp_path)
    found = judge.run([], known=0.3)
    assert found.selected_weight == judge.model.weight == 0.3
    assert {row.weight for row in found.rows} == {0.0, 0.3}
    assert not any("too few" in line or "largest" in line for line in found.verdicts)


@pytest.mark.parametrize("weights", [[0.5, 1.0], None])
@pytest.mark.parametrize("known", [0.3, None])
def test_a_handful_of_rows_chooses_nothing_where_a_weight_is_known(tmp_path, monkeypatch, weights, known):
    outcomes(monkeypatch, lambda split, weight, i: weight > 0.4)
    found = evaluator("t5", tmp_path).run(weights, known=known)
    (warning,) = [line for line in found.verdicts if "12 validation rows are too few to choose λ on" in line]
    if known is None:
        assert found.selected_weight != 0.3
        assert "it may be luck" in warning
    else:
        assert found.selected_weight == 0.3
        assert {0.0, 0.3, *(weights or [])} == {row.weight for row in found.rows}
        assert "the run's own is kept" in warning


def test_enough_rows_choose_whatever_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("tcopilot.evaluation.selection.ENOUGH", {"metric": 12})
    outcomes(monkeypatch, lambda split, weight, i: weight == 0.5)
    found = evaluator("t5", tmp_path).run(WEIGHTS, known=0.3)
    assert found.selected_weight == 0.5
    assert {row.weight for row in found.rows} == {0.0, 0.5, 1.0}
    assert not any("too few" in line for line in found.verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[], [0.5, 1.0]])
def test_the_known_weights_of_benchmarks_are_taken_each_and_a_new_one_takes_that_for_all(tmp_path, weights):
    judge = evaluator("t5", tmp_path, "word_problems", "multiple_choice", per="benchmark")
    found = judge.run(weights, known={"word_problems": 0.2, "all": 0.4, "elsewhere": 0.9})
    assert found.selected_weight == {"word_problems": 0.2, "multiple_choice": 0.4, "all": 0.4}
    assert judge.model.weight == 0.4


@pytest.mark.slow
def test_the_known_weight_keeps_its_gate(tmp_path):
    judge = evaluator("t5", tmp_path, per="token")
    gate = {"per": "token", "coefficients": [0.5, -1.0, 0.3, 2.0]}
    judge.model.set_gate(build_gate(gate))
    judge.run([], known=0.3)
    assert judge.model.copilot.gate.settings() == build_gate(gate).settings()
    judge.run([0.3])
    assert judge.model.copilot.gate.settings() != build_gate(gate).settings()
    judge.model.set_gate(build_gate(gate))
    judge.per = "all"
    judge.run([0.5, 1.0], known=0.3)  # too few rows to choose on, but no gate was asked for
    assert judge.model.copilot.gate is None


def test_benchmarks_count_alike_in_the_choice_however_many_rows_they_have():
    shares = {"big": {0.0: [1.0] * 90 + [0.0] * 10, 1.0: [1.0] * 80 + [0.0] * 20}, "small": {0.0: [0.0], 1.0: [0.5]}}
    outcomes = {name: {w: {ACCURACY: v} for w, v in by_weight.items()} for name, by_weight in shares.items()}
    assert by_metric(outcomes, {0.0: 1.0, 1.0: 1.0}) == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_weight_is_scored_beside_the_pilot_and_selected(family, tmp_path):
    judge = evaluator(family, tmp_path)
    head = judge.model.copilot.head.weight
    found = {}
    for sign in (1, -1):  # corrections that point the other way
        torch.nn.init.normal_(head, std=0.02, generator=torch.Generator().manual_seed(0)).data.mul_(sign)
        found[sign] = judge.run(None)
    against, towards = sorted(found.values(), key=lambda evaluation: evaluation.best_weight)
    assert (against.selected_weight, {row.weight for row in against.rows}) == (0.0, {0.0})
    assert towards.selected_weight == pytest.approx(towards.best_weight, abs=5e-4)
    assert towards.selected_weight > 0
    assert {row.weight for row in towards.rows} == {0.0, towards.selected_weight}


@pytest.mark.parametrize("weights", [[0.5, 1.0], None])
def test_without_a_copilot_there_is_one_weight_to_score(weights, tmp_path):
    found = evaluator("t5", tmp_path, copilot=False, head_std=0.0).run(weights)
    assert {r.weight for r in found.rows} == {0.0}
    assert found.selected_weight == 0.0
    assert found.gain[0].difference == 0.0
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        f"{split}-word_problems-weight=0.jsonl" for split in ("validation", "test")
    }


def test_a_mixture_is_reported_benchmark_by_benchmark(tmp_path):
    found = evaluator("t5", tmp_path, "word_problems", "multiple_choice").run([1.0])
    assert [gain.benchmark for gain in found.gain] == ["word_problems", "multiple_choice"]
    named = {(r.benchmark, r.metric) for r in found.rows}
    assert named == {("word_problems", "accuracy"), ("multiple_choice", "accuracy"), ("all", "nll")}
    assert [v.split(":")[0] for v in found.verdicts] == ["word_problems, accuracy", "multiple_choice, accuracy"]


def test_data_with_one_split_reports_the_rows_that_the_weight_was_chosen_on_once(tmp_path):
    found = evaluator("t5", tmp_path).run([1.0], ("validation", "validation"))
    assert [(r.metric, r.weight) for r in found.rows] == [
        ("accuracy", 0.0), ("accuracy", 1.0), ("nll", 0.0), ("nll", 1.0),
    ]  # fmt: skip


def test_dropout_is_off_while_answers_are_decoded(tmp_path):
    judge = evaluator("t5", tmp_path, dropout=0.5)
    judge.model.train()
    judge = Evaluator(judge.model, judge.tokenizer, judge.data, tmp_path)
    first, second = (judge.run([1.0]).rows for _ in range(2))
    assert first == second
    assert all(math.isfinite(row.value) for row in first)


def test_beam_search_is_used_where_it_is_asked_for(tmp_path):
    said = []
    for beams in (1, 4):
        judge = evaluator("llama", tmp_path / str(beams), decoding=Decoding(num_beams=beams, max_new_tokens=3))
        judge.scores("test", "word_problems", [1.0])
        said.append([row["prediction"] for row in written(tmp_path / str(beams))])
    assert said[0] != said[1]


def test_a_single_weight_is_reported_even_where_it_does_harm(monkeypatch, tmp_path):
    outcomes(monkeypatch, lambda split, weight, i: weight == 0)
    judge = evaluator("t5", tmp_path)
    found = judge.run([1.0])
    assert found.selected_weight == judge.model.weight == 1.0
    assert (found.gain[0].pilot, found.gain[0].fused, found.gain[0].broken) == (1.0, 0.0, 10)


def test_a_choice_at_the_edge_of_the_weights_says_so(monkeypatch, tmp_path):
    outcomes(monkeypatch, lambda split, weight, i: weight >= 1)
    assert any("largest one tried" in line for line in evaluator("t5", tmp_path).run([0.5, 1.0]).verdicts)
    outcomes(monkeypatch, lambda split, weight, i: weight == 0.5)
    assert not any("largest one tried" in line for line in evaluator("t5", tmp_path).run([0.5, 1.0]).verdicts)


def test_without_a_limit_decoding_waits_for_the_longest_training_target(tmp_path):
    judge = evaluator("llama", tmp_path)
    judge.data.benchmarks["word_problems"].max_new_tokens = None
    longest = judge.data.summary()["word_problems/train"]["target_max"]
    assert judge.modes("word_problems")[0].max_new_tokens == longest + 2
