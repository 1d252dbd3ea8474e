"""Which rule chooses λ: the likelihood, the metric, a constant; and what the results say of the others."""

import composed
import pytest
from small_training import source_side, tiny_model

from tcopilot.data import GeneratedTask, TCopilotDataModule, word_tokenizer
from tcopilot.data.metrics import Metric
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.results import Results, Selection
from tcopilot.evaluation.selection import METRIC_ROWS, by_likelihood, by_metric
from tcopilot.models.fusion import LogitFusion
from tcopilot.reporting.run_tables import selection_table

ACCURACY, MISTAKES = Metric("accuracy"), Metric("mistakes", higher_is_better=False, unit="")
WEIGHTS = [0.0, 0.3, 0.5, 1.0, 2.0]


def evaluator(
    folder, validation: int | dict[str, int], select_by="auto", per="all", family="t5", **options
) -> Evaluator:
    """An evaluator of a model with random weights; `validation` is the number of rows to choose on."""
    counts = validation if isinstance(validation, dict) else {"word_problems": validation}
    tasks = {
        kind: GeneratedTask(name=kind, kind=kind, train=16, validation=max(1, rows), test=10, max_new_tokens=5)
        for kind, rows in counts.items()
    }
    data = TCopilotDataModule(tasks, batch_size=8, rounds=1)
    data.prepare(word_tokenizer(data.vocabulary), source_side(family))
    for kind, rows in counts.items():
        if not rows:  # a test file alone
            del data._evaluation["validation", kind], data._summary[f"{kind}/validation"]
    tokenizer = word_tokenizer(data.vocabulary)
    tokenizer.padding_side = source_side(family)
    model = tiny_model(family, vocab=len(tokenizer), **({"head_std": 0.1} | options))
    return Evaluator(model, tokenizer, data, folder, per=per, select_by=select_by)


def favour(monkeypatch, weight: float, metric: Metric = ACCURACY) -> None:
    """Replace decoding by answers of which those at one λ are the best."""

    def scores(self, split, benchmark, weights):
        rows = len(self.data.evaluation_rows(split, benchmark))
        return {w: {metric: [float((w == weight) == metric.higher_is_better)] * rows} for w in weights}

    monkeypatch.setattr(Evaluator, "scores", scores)


def likelihoods(found, split="validation") -> dict[float, float]:
    return {row.weight: row.value for row in found.rows if (row.split, row.metric) == (split, "nll")}


# The rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [ACCURACY, MISTAKES])
@pytest.mark.parametrize(("rows", "select_by", "rule"), [
    (30, "auto", "nll"), (60, "metric", "metric"), (METRIC_ROWS, "auto", "metric"), (METRIC_ROWS, "nll", "nll"),
    (5, "nll", "nll"), (5, "metric", "metric"),
])  # fmt: skip
def test_the_rule_follows_the_number_of_rows_unless_it_is_named(metric, rows, select_by, rule, tmp_path, monkeypatch):
    favour(monkeypatch, 2.0, metric)
    found = evaluator(tmp_path, rows, select_by).run(WEIGHTS)
    nll = likelihoods(found)
    likeliest = min(nll, key=nll.get)
    assert likeliest != 2.0  # or the rules could not be told apart
    assert found.selected_weight == (likeliest if rule == "nll" else 2.0)
    assert [one.rule for one in found.selection if one.taken] == [rule]
    assert any("it may be luck" in line for line in found.verdicts) == (rows == 5)


def test_the_likelihood_takes_the_smaller_of_equal_weights():
    assert by_likelihood({1.0: 2.0, 0.5: 2.0, 2.0: 3.0}) == 0.5


def test_weights_that_rounding_alone_tells_apart_are_equal_to_either_rule(tmp_path):
    rounded = {0.0: 2.0, 0.5: 2.0 - 1e-8, 1.0: 2.0 - 3e-8}
    assert by_likelihood(rounded) == 0.0
    assert by_likelihood(rounded | {1.0: 2.0 - 2e-6}) == 1.0
    outcomes = {"a": {0.0: {ACCURACY: [0.0]}, 0.5: {ACCURACY: [1.0]}, 1.0: {ACCURACY: [1.0]}}}
    assert by_metric(outcomes, rounded) == 0.5
    silent = evaluator(tmp_path, 60, head="soft", head_std=0.0)  # a new soft head, which corrects nothing
    found = silent.run([0.0, 0.3, 1.0])
    assert len(set(likelihoods(found).values())) > 1
    assert found.selected_weight == 0.0


def test_a_metric_in_which_lower_is_better_is_minimised():
    outcomes = {"a": {0.0: {MISTAKES: [1.0, 0.0]}, 0.5: {MISTAKES: [0.0, 0.0]}, 1.0: {MISTAKES: [1.0, 1.0]}}}
    assert by_metric(outcomes, dict.fromkeys((0.0, 0.5, 1.0), 1.0)) == 0.5


def test_each_benchmark_has_a_rule_of_its_own_and_few_rows_take_the_weight_of_all(tmp_path, monkeypatch):
    favour(monkeypatch, 2.0)
    found = evaluator(tmp_path, {"word_problems": 40, "multiple_choice": 5}, per="benchmark").run(WEIGHTS)
    assert {one.benchmark: one.rule for one in found.selection if one.taken} == {
        "all": "nll", "word_problems": "nll", "multiple_choice": "shared",
    }  # fmt: skip
    assert (
        found.selected_weight["multiple_choice"] == found.selected_weight["all"] == by_likelihood(likelihoods(found))
    )
    (line,) = [line for line in found.verdicts if "too few" in line]
    assert line.startswith("multiple_choice: 5 validation rows are too few to choose λ on, and λ = ")


# Too few rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("options", [{}, {"head": "soft"}, {"fusion": LogitFusion()}])
def test_a_constant_stands_where_there_are_too_few_rows(rows, options, tmp_path, monkeypatch):
    favour(monkeypatch, 1.0)
    judge = evaluator(tmp_path, rows, **options)
    found = judge.run([0.0, 1.0])
    constant = 4.0 if "fusion" in options else 0.5
    assert found.selected_weight == judge.model.weight == constant
    assert {row.weight for row in found.rows} == {0.0, 1.0, constant}
    (taken,) = [one for one in found.selection if one.taken]
    assert (taken.rule, taken.weight, taken.validation is None) == ("constant", constant, rows == 0)
    (line,) = [line for line in found.verdicts if "too few" in line]
    assert f"{rows} validation rows" in line
    assert f"λ = {constant:g} is a constant" in line


@pytest.mark.parametrize("select_by", ["auto", "nll", "metric"])
def test_without_rows_no_rule_chooses_not_even_the_closed_form(select_by, tmp_path, monkeypatch):
    favour(monkeypatch, 1.0)
    assert evaluator(tmp_path, 0, select_by).run(None).selected_weight == 0.5
    assert evaluator(tmp_path, 0, select_by).run([0.0, 1.0], known=0.3).selected_weight == 0.3


def test_what_another_rule_would_have_given_is_left_open_where_rows_were_not_answered_at_it(tmp_path, monkeypatch):
    favour(monkeypatch, 2.0)
    found = evaluator(tmp_path, 5, "nll").run(WEIGHTS, known=0.7)  # too few to choose on, so test is answered at 0.7
    kept, other = sorted(found.selection, key=lambda one: not one.taken)
    assert (kept.rule, kept.weight, other.rule) == ("kept", 0.7, "nll")
    assert other.weight == by_likelihood(likelihoods(found)) != 0.7
    assert (other.reported, other.reported_nll) == (None, None)
    assert None not in (kept.reported, kept.reported_nll, other.validation_nll)


def test_twenty_rows_are_enough_for_the_likelihood_and_too_few_for_the_metric(tmp_path, monkeypatch):
    favour(monkeypatch, 2.0)
    chosen = evaluator(tmp_path, 20).run(WEIGHTS, known=0.7)
    assert chosen.selected_weight == by_likelihood(likelihoods(chosen)) != 0.7
    assert evaluator(tmp_path, 20, "metric").run(WEIGHTS, known=0.7).selected_weight == 0.7


# λ of a soft head --------------------------------------------------------------------------------------------------


def test_a_soft_head_is_not_tried_above_one(tmp_path, monkeypatch):
    favour(monkeypatch, 1.0)
    found = evaluator(tmp_path, 20, "metric", head="soft").run(WEIGHTS)
    assert {row.weight for row in found.rows} == {0.0, 0.3, 0.5, 1.0}
    assert found.selected_weight == 1.0
    assert "λ = 2 left out: above 1 this Copilot's p̃ may be no distribution" in found.verdicts
    assert not any("largest one tried" in line for line in found.verdicts)


@pytest.mark.parametrize("options", [{}, {"head": "soft", "fusion": LogitFusion()}])
def test_other_heads_and_rules_may_go_beyond_one(options, tmp_path, monkeypatch):
    favour(monkeypatch, 2.0)
    assert evaluator(tmp_path, 20, "metric", **options).run(WEIGHTS).selected_weight == 2.0


def test_a_single_weight_is_taken_whatever_the_head(tmp_path, monkeypatch):
    favour(monkeypatch, 1.0)
    assert evaluator(tmp_path, 20, head="soft").run([1.5]).selected_weight == 1.5


def test_the_closed_form_of_a_soft_head_ends_at_one(tmp_path, monkeypatch):
    favour(monkeypatch, 1.0)
    monkeypatch.setattr("tcopilot.training.error_statistics.best_weight", lambda inner, energy: 1.7)
    found = evaluator(tmp_path, 20, head="soft").run(None)
    assert (found.selected_weight, found.best_weight) == (1.0, 1.7)
    assert evaluator(tmp_path / "linear", 20).run(None).selected_weight == 1.7


# What the results say ----------------------------------------------------------------------------------------------


def test_the_results_say_what_each_rule_would_have_chosen_and_given(tmp_path, monkeypatch):
    favour(monkeypatch, 2.0)
    found = evaluator(tmp_path, 30).run(WEIGHTS)
    values = {(row.benchmark, row.split, row.metric, row.weight): row.value for row in found.rows}
    assert {one.rule: one.weight for one in found.selection} == {"nll": found.selected_weight, "metric": 2.0}
    for one in found.selection:
        assert (one.benchmark, one.metric, one.taken) == ("all", "accuracy", one.rule == "nll")
        assert one.validation == values["word_problems", "validation", "accuracy", one.weight]
        assert one.reported == values["word_problems", "test", "accuracy", one.weight]
        assert one.validation_nll == pytest.approx(values["all", "validation", "nll", one.weight])
        assert one.reported_nll == pytest.approx(values["all", "test", "nll", one.weight])


def test_nothing_is_said_of_a_choice_where_there_was_none(tmp_path, monkeypatch):
    favour(monkeypatch, 1.0)
    assert evaluator(tmp_path, 30).run([1.0]).selection == []
    assert evaluator(tmp_path, 30, copilot=False, head_std=0.0).run(WEIGHTS).selection == []


def test_the_selection_survives_the_file_and_is_printed(tmp_path):
    chosen = Selection("nll", "all", 0.5, True, "mistakes", 3.0, 2.5, 1.25, 1.5, False, "")
    without_rows = Selection("constant", "svamp", 0.5, True, None, None, None, None, 1.5)
    results = Results(
        seed=0, git="", config="", params={}, rounds=1, train_seconds=0.0, selected_weight=0.5, rows=[], gain=[],
        selected_on="validation", reported_on="test", selection=[chosen, without_rows],
    )  # fmt: skip
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    cells = [list(column.cells) for column in selection_table(results).columns]
    assert [column[0] for column in cells] == [
        "all", "nll", "0.5", "mistakes", "3.0000", "2.5000", "1.2500", "1.5000", "yes",
    ]  # fmt: skip
    assert [column[1] for column in cells][3:8] == ["", "", "", "", "1.5000"]


@pytest.mark.parametrize("rule", ["probability", "logits"])
def test_the_configs_let_the_rows_decide(rule):
    assert composed.compose_config(f"fusion={rule}").fusion.select_by == "auto"


@pytest.mark.slow
def test_who_names_the_likelihood_gets_no_answers_but_those_reported(tmp_path):
    by_rule = {rule: evaluator(tmp_path / rule, 30, rule).run(WEIGHTS) for rule in ("auto", "nll")}
    found, whole = by_rule["nll"], by_rule["auto"]
    assert found.selected_weight == whole.selected_weight
    answered = {file.name for file in (tmp_path / "nll").glob("*.jsonl")}
    assert answered == {f"test-word_problems-weight={weight:g}.jsonl" for weight in {0.0, found.selected_weight}}
    assert found.gain == whole.gain
    (taken,) = found.selection
    assert (taken.rule, taken.validation, taken.taken) == ("nll", None, True)
    nll = [(row.weight, row.value) for row in whole.rows if (row.split, row.metric) == ("validation", "nll")]
    assert [(row.weight, row.value) for row in found.rows if (row.split, row.metric) == ("validation", "nll")] == nll
    assert taken.validation_nll == pytest.approx(dict(nll)[found.selected_weight])
