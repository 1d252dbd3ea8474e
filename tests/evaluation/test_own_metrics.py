"""Metrics of one's own, from the benchmark's YAML to the table: an error, where lower is better, and macro-F1."""

import math
from dataclasses import dataclass

import hydra
import pytest
from rich.console import Console
from small_training import source_side, tiny_model

from tcopilot.data import DataError, ExactMatch, TCopilotDataModule, word_tokenizer
from tcopilot.data.metrics import Answer, MacroF1, Metric, show
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.generation import Generation
from tcopilot.evaluation.outcomes import outcome, read_predictions
from tcopilot.evaluation.results import Results
from tcopilot.evaluation.selection import by_metric
from tcopilot.evaluation.significance import corpus_bootstrap
from tcopilot.reporting.run_tables import gain_table, weight_table

ROWS = 40


@dataclass(frozen=True)
class Distance(Metric):
    """How far the number given is from the right one."""

    name: str = "distance"
    higher_is_better: bool = False
    unit: str = "apples"

    def score(self, answer: Answer) -> float:
        return abs(float(answer.extracted or 100) - float(answer.gold))


def benchmark(**settings) -> ExactMatch:
    """A benchmark of numbers, as `configs/data/*.yaml` would describe it."""
    described = {"_target_": "tcopilot.data.ExactMatch", "name": "count", "max_new_tokens": 2, **settings}
    return hydra.utils.instantiate(described, _convert_="all")


@pytest.fixture
def judge(tmp_path):
    def build(**settings) -> Evaluator:
        task = benchmark(**settings)
        rows = [{"prompt": f"{i} and 1", "target": str(i % 4)} for i in range(ROWS)]
        task.builtin_rows = lambda split: rows
        data = TCopilotDataModule({"count": task}, batch_size=4, rounds=1)
        tokenizer = word_tokenizer([*map(str, range(ROWS)), "and"])
        tokenizer.padding_side = source_side("t5")
        data.prepare(tokenizer, source_side("t5"))
        model, folder = tiny_model("t5", vocab=len(tokenizer)), tmp_path / "predictions"
        return Evaluator(model, tokenizer, data, folder, select_by="metric")

    return build


def answered_by(monkeypatch, say) -> list[int]:
    """Replace decoding by `say(gold, weight, row id)`; the list returned grows by a number at each batch."""
    asked = []

    def answer(self, rows, weights):
        asked.append(len(rows))
        return {
            weight: [
                self.judged(row | {"prediction": str(say(int(row["target"]), weight, row["id"]))}) for row in rows
            ]
            for weight in weights
        }

    monkeypatch.setattr(Generation, "answer", answer)
    return asked


def results_of(found) -> Results:
    return Results(
        seed=0, git="", config="", params={}, rounds=1, train_seconds=0.0, selected_weight=found.selected_weight,
        selected_on="validation", reported_on="test", rows=found.rows, gain=found.gain,
    )  # fmt: skip


def printed(table) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def further_off(gold: int, weight: float, row: int) -> int:
    """3 off at λ = 0, exact at 0.5 but for every fifth row, 9 off at 1."""
    return gold + {0.0: 3, 0.5: 0 if row % 5 else 4, 1.0: 9}[weight]


DISTANCE = {"_target_": f"{__name__}.Distance"}


def test_an_error_is_minimised_and_its_falls_are_improvements(judge, monkeypatch, tmp_path):
    answered_by(monkeypatch, further_off)
    found = judge(metric=DISTANCE).run([0.5, 1.0])
    assert found.selected_weight == 0.5
    first = found.gain[0]
    assert (first.metric, first.pilot, first.fused, first.fixed, first.broken) == ("distance", 3.0, 0.8, 32, 8)
    assert first.verdict == "better"
    assert found.verdicts[0].startswith("count, distance: fused is better")
    assert [gain.metric for gain in found.gain] == ["distance", "accuracy"]
    assert found.gain[1].fixed == 32


def test_an_error_is_printed_as_a_number_with_its_unit(judge, monkeypatch, tmp_path):
    answered_by(monkeypatch, further_off)
    results_of(judge(metric=DISTANCE).run([0.5, 1.0])).save(tmp_path / "results.json")
    results = Results.load(tmp_path / "results.json")
    table = printed(gain_table(results))
    (line,) = (line for line in table.splitlines() if "distance" in line)
    for cell in ("3.0000 apples", "0.8000 apples", "-2.2000 [", "32 / 8", " better"):
        assert cell in line
    assert "%" not in line
    (curve, *_) = (line for line in printed(weight_table(results)).splitlines() if "distance, apples" in line)
    assert "9.0000" in curve
    assert show(3.0, "share") == "300.00 %"  # which is what it used to say


def test_outcomes_follow_the_direction(judge, monkeypatch, tmp_path):
    answered_by(monkeypatch, further_off)
    results = results_of(judge(metric=DISTANCE).run([0.5]))
    folder, gain = tmp_path / "predictions", results.row_wise()["count"]
    pilot, fused = (read_predictions(results, folder, "count", weight) for weight in (0.0, 0.5))
    assert [outcome(pilot[row], fused[row], gain) for row in (0, 1)] == ["broken", "fixed"]
    assert outcome(fused[1], fused[1], gain) == "both right"
    assert outcome(pilot[1], pilot[1], gain) == "both wrong"


def test_metrics_of_different_units_are_weighed_by_the_place_of_each_weight():
    off, right = Distance(), Metric("accuracy")
    outcomes = {
        "count": {0.0: {off: [50.0]}, 0.5: {off: [49.0]}, 1.0: {off: [48.0]}},
        "yes": {0.0: {right: [0.6]}, 0.5: {right: [0.7]}, 1.0: {right: [0.5]}},
    }
    assert by_metric(outcomes, dict.fromkeys((0.0, 0.5, 1.0), 1.0)) == 0.5


def test_macro_f1_is_of_all_rows_together_and_decides_if_it_is_asked_to(judge, monkeypatch):
    # At λ = 1 the rare class is found at the price of two rows of a common one: accuracy falls, macro-F1 rises.
    answered_by(monkeypatch, lambda gold, weight, row: gold if weight else (0 if gold == 3 else gold))
    found = judge(metric={"_target_": "tcopilot.data.MacroF1"}).run([1.0])
    f1, accuracy = found.gain
    assert (f1.metric, f1.fixed, f1.broken) == ("macro_f1", None, None)
    assert f1.pilot == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    assert f1.fused == 1.0
    assert f1.verdict == "better"
    assert f1.ci95[0] <= f1.difference <= f1.ci95[1]
    assert accuracy.fixed == 10
    row = next(row for row in found.rows if (row.metric, row.split, row.weight) == ("macro_f1", "test", 0.0))
    assert row.ci95[0] < row.value == f1.pilot < row.ci95[1]
    assert "macro_f1" in printed(gain_table(results_of(found)))
    assert results_of(found).row_wise()["count"].metric == "accuracy"


def test_more_metrics_are_reported_behind_the_usual_ones(judge, monkeypatch):
    answered_by(monkeypatch, further_off)
    found = judge(more_metrics=[DISTANCE]).run([0.5])
    assert [(gain.metric, gain.unit) for gain in found.gain] == [("accuracy", "share"), ("distance", "apples")]


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(DataError, match="two metrics are called 'accuracy'; give one of them another name"):
        ExactMatch(name="count", more_metrics=[Metric("accuracy")])
    with pytest.raises(DataError, match="metric=7: expected a text or a metric"):
        ExactMatch(name="count", metric=7)
    with pytest.raises(DataError, match=r"more_metrics=.*: expected a list of metrics with their _target_"):
        ExactMatch(name="count", more_metrics=["macro_f1"])
    with pytest.raises(DataError, match="more_metrics=5: expected a list of metrics with their _target_"):
        ExactMatch(name="count", more_metrics=5)


@dataclass(frozen=True)
class Broken(Metric):
    name: str = "broken"

    def score(self, answer: Answer) -> float:
        return float("nan")


def test_a_figure_of_all_rows_that_is_not_finite_names_its_metric():
    class Undefined(MacroF1):
        def value(self, scores):
            return math.nan

    with pytest.raises(ValueError, match=r"Undefined\.value must be a finite number for every sample of the rows"):
        corpus_bootstrap(Undefined().value, [Answer("a", "a", "a", True)])


def test_a_score_that_is_no_finite_number_is_refused_at_the_first_row():
    with pytest.raises(DataError, match=r"the metric broken gave nan .*'four'; a score must be a finite number"):
        ExactMatch(name="count", metric=Broken()).score("four", "4")


def test_macro_f1_weighs_classes_alike():
    golds, found = "aaaaaaaaab", "aaaaaaaaaa"
    answers = [Answer("", said, gold, said == gold) for said, gold in zip(found, golds, strict=True)]
    assert MacroF1().value(answers) == pytest.approx((18 / 19 + 0) / 2)
