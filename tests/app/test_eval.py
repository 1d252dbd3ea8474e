"""Evaluation of a finished run: how λ is chosen, and what `eval.py` may change without training."""

import csv
import json

import composed
import pytest
from lightning import Trainer
from omegaconf import OmegaConf

from tcopilot.app.checks.problems import ConfigError
from tcopilot.data.metrics import Metric
from tcopilot.evaluation.evaluate import Evaluator

ACCURACY = Metric("accuracy")
SWEPT = ("fusion.weight=[0,0.5,1,2]",)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("eval.py trained"))


# How λ is chosen -------------------------------------------------------------------------------------------------


def test_the_weight_is_the_best_on_validation(finished, tmp_path, no_training):
    found = composed.results(finished.folder)

    def nll(w: float) -> float:
        return composed.value(found, "validation", "nll", w, "all")

    def merit(w: float) -> tuple[float, float]:
        return composed.value(found, "validation", "accuracy", w, finished.task), -nll(w)

    by_nll, by_metric = min((0.0, 0.5, 1.0, 2.0), key=nll), max((0.0, 0.5, 1.0, 2.0), key=merit)
    assert found["selected_weight"] == by_nll  # 60 rows are few
    assert {one["rule"]: one["weight"] for one in found["selection"]} == {"nll": by_nll, "metric": by_metric}
    again = composed.results(composed.evaluate(finished.folder, tmp_path / "eval", *SWEPT, "fusion.select_by=metric"))
    assert again["selected_weight"] == by_metric


@pytest.mark.slow
def test_the_choice_of_the_weight_does_not_see_the_test_rows(finished, tmp_path, monkeypatch):
    chosen = composed.results(finished.folder)["selected_weight"]
    judge = Evaluator.scores
    for favoured in (chosen, 0.0 if chosen else 2.0):

        def scores(self, split, name, weights, favoured=favoured):
            found = judge(self, split, name, weights)
            rows = len(found[0.0][ACCURACY])
            return found if split == "validation" else {w: {ACCURACY: [float(w == favoured)] * rows} for w in found}

        monkeypatch.setattr(Evaluator, "scores", scores)
        found = composed.results(composed.evaluate(finished.folder, tmp_path / str(favoured), *SWEPT))
        assert found["selected_weight"] == chosen
        assert found["gain"][0]["fused"] == (chosen == favoured)


# Evaluation without training -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluation_of_the_export_repeats_the_numbers_of_training(finished, tmp_path, no_training):
    before = composed.results(finished.folder)
    after = composed.results(composed.evaluate(finished.folder, tmp_path / "eval", *SWEPT))
    for key in ("gain", "selected_weight", "rounds", "train_seconds", "params", "seed"):
        assert after[key] == before[key], key
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert new["value"] == pytest.approx(old["value"], rel=1e-5), old
    for name in ("config.yaml", "predictions"):
        assert (tmp_path / "eval" / name).exists()


@pytest.mark.slow
def test_an_evaluation_keeps_the_weight_of_the_run_unless_told_otherwise(finished, tmp_path, no_training):
    before = composed.results(finished.folder)
    folder = composed.evaluate(finished.folder, tmp_path / "eval")
    after = composed.results(folder)
    assert (
        after["selected_weight"] == before["selected_weight"] == OmegaConf.load(folder / "config.yaml").fusion.weight
    )
    assert {row["weight"] for row in after["rows"]} == {0.0, before["selected_weight"]}
    assert after["gain"] == before["gain"]
    assert "λ is the one that the training run chose (fusion.weight=run)" in after["notes"]
    old = {(row["split"], row["metric"], row["weight"]): row["value"] for row in before["rows"]}
    for row in after["rows"]:
        assert row["value"] == pytest.approx(old[row["split"], row["metric"], row["weight"]], rel=1e-5)


@pytest.mark.slow
def test_a_test_file_alone_is_enough_and_chooses_nothing(tmp_path):
    def write(name: str, count: int) -> None:
        lines = [json.dumps({"q": f"{name} {i}?", "a": "yes" if i % 3 else "no"}) for i in range(count)]
        (tmp_path / name).mkdir(exist_ok=True)
        for split in ("test",) if name == "new" else ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))

    write("old", 30)
    write("new", 7)
    columns = ("data.benchmarks.jsonl.prompt_column=q", "data.benchmarks.jsonl.target_column=a")
    given = ("debug=limit", "data=jsonl", f"data.path={tmp_path}/old", *columns, "fusion.weight=[0,0.5,1]")
    run = composed.train(tmp_path / "run", *given)
    chosen = composed.results(run)["selected_weight"]
    assert any("too few to choose λ on, and λ = 0.5 is a constant" in n for n in composed.results(run)["notes"])
    folder = composed.evaluate(run, tmp_path / "alone", f"data.path={tmp_path}/new")
    found = composed.results(folder)
    assert found["selected_weight"] == chosen
    assert {(row["split"], row["n"]) for row in found["rows"] if row["metric"] == "accuracy"} == {("test", 7)}
    with (folder / "generations.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [row["prompt"] for row in answers if row["prompt"].startswith("new")] == [row["prompt"] for row in answers]
    assert len(answers) == 7
    assert {"pilot", "fused", "outcome"} <= answers[0].keys()
    given = (f"data.path={tmp_path}/new", "fusion=probability")  # the run's own rule, with the λ of its YAML
    assert composed.results(composed.evaluate(run, tmp_path / "rule", *given))["selected_weight"] == chosen
    again = composed.results(
        composed.evaluate(run, tmp_path / "few", f"data.path={tmp_path}/new", "fusion.weight=[0,2]")
    )
    assert again["selected_weight"] == chosen
    assert {0.0, 2.0, chosen} == {row["weight"] for row in again["rows"]}
    assert any("0 validation rows are too few to choose λ on, and the run's own is kept" in n for n in again["notes"])


@pytest.mark.slow
def test_weights_are_swept_without_training(finished, tmp_path, no_training, capsys):
    folder = composed.evaluate(finished.folder, tmp_path / "eval", "fusion.weight=[0.25,0.75]")
    found = composed.results(folder)
    assert {row["weight"] for row in found["rows"]} == {0.0, 0.25, 0.75}  # the Pilot is always beside
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"results: {folder / 'results.json'}"
    before = composed.results(finished.folder)
    old, new = (composed.value(x, "test", "accuracy", 0.0, finished.task) for x in (before, found))
    assert old == new


@pytest.mark.slow
def test_the_closed_form_weight_needs_no_sweep(finished, tmp_path, no_training):
    found = composed.results(composed.evaluate(finished.folder, tmp_path / "eval", "fusion.weight=auto"))
    best = found["selected_weight"]
    assert best > 0
    assert {row["weight"] for row in found["rows"]} == {0.0, best}
    sweep = composed.evaluate(finished.folder, tmp_path / "sweep", f"fusion.weight=[{best},{best / 4},{4 * best}]")
    note = f"λ* in closed form on validation: {best:.3f}"
    assert note in found["notes"]
    assert note in composed.results(sweep)["notes"]


@pytest.mark.slow
def test_fusion_space_and_feedback_can_be_changed_at_evaluation(finished, tmp_path, no_training):
    nll = {}
    for change in ("fusion=probability", "fusion=logits", "fusion.feedback=own"):
        folder = composed.evaluate(finished.folder, tmp_path / change.split("=")[1], "fusion.weight=1", change)
        nll[change] = composed.value(composed.results(folder), "test", "nll", 1.0, "all")
        key, wanted = change.split("=")
        written = OmegaConf.load(folder / "config.yaml").fusion
        rule = OmegaConf.load(composed.CONFIGS / "fusion" / f"{wanted}.yaml").rule if key == "fusion" else None
        assert written.rule == rule if rule else written.feedback == wanted
    assert len({round(value, 4) for value in nll.values()}) == 3


def test_a_run_can_be_evaluated_on_other_rows(finished, tmp_path, no_training):
    other = [
        "data=next_item",
        "data.benchmarks.next_item.train=50",
        "data.benchmarks.next_item.validation=10",
        "data.benchmarks.next_item.test=10",
    ]
    found = composed.results(composed.evaluate(finished.folder, tmp_path / "eval", *other, "fusion.weight=1"))
    assert {gain["benchmark"] for gain in found["gain"]} == {"next_item"}
    assert {row["n"] for row in found["rows"] if row["metric"] == "accuracy"} == {10}


@pytest.mark.slow
def test_a_run_can_be_evaluated_with_beams(finished, tmp_path, no_training):
    folder = composed.evaluate(finished.folder, tmp_path / "eval", "evaluation=beam4", "fusion.weight=1")
    assert OmegaConf.load(folder / "config.yaml").evaluation.num_beams == 4
    assert composed.results(folder)["gain"][0]["pilot"] > 0


@pytest.mark.slow
def test_a_run_from_the_hub_is_evaluated_without_the_hub(finished, tmp_path):
    """The export holds all that is needed, also where the Pilot's own folder is gone."""
    config = OmegaConf.load(finished.folder / "config.yaml")
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "export").symlink_to(finished.folder / "export")
    config.pilot.path, config.pilot.config = "no/such-model", None
    OmegaConf.save(config, elsewhere / "config.yaml")
    found = composed.results(composed.evaluate(elsewhere, tmp_path / "eval", "fusion.weight=0"))
    old = composed.value(composed.results(finished.folder), "test", "accuracy", 0.0, finished.task)
    assert composed.value(found, "test", "accuracy", 0.0, finished.task) == old


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run=/no/such/run"], "run=/no/such/run: no export/config.json there"),
        (["fusion.weight=-1"], "fusion.weight=-1: λ must be 0"),
        (["fusion.space=log"], "fusion.space=log: was replaced"),
        (["evaluation=beam4", "evaluation.num_beams=0"], "evaluation.num_beams=0: must be a whole number"),
        (["data=jsonl", "data.path=/no/such/rows"], "/no/such/rows"),
    ],
)
def test_evaluations_refuse_bad_input_before_weights_load(finished, overrides, said, tmp_path, monkeypatch):
    for auto in ("TCopilotForCausalLM", "TCopilotForSeq2SeqLM"):
        monkeypatch.setattr(
            f"tcopilot.models.modeling.{auto}.from_pretrained", lambda *_, **__: pytest.fail("weights loaded")
        )
    with pytest.raises(ConfigError) as refused:
        composed.evaluate(finished.folder, tmp_path / "eval", *overrides)
    assert said in str(refused.value)
    assert not (tmp_path / "eval").exists()


def test_an_evaluation_without_a_run_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"give run=<run dir> to evaluate a run, or pilot\.path"):
        composed.run.evaluate(composed.compose_config(f"paths.run_dir={tmp_path}", "traceback=true", name="eval"))
