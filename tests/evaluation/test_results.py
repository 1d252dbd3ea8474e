"""The contract of `results.json`."""

import json
import math
import os
from dataclasses import fields, replace

import pytest
from written_results import equal_time_control, some_results

from tcopilot.data.metrics import Metric
from tcopilot.evaluation.outcomes import read_predictions
from tcopilot.evaluation.results import Control, Gain, Results, Row
from tcopilot.evaluation.significance import compare


@pytest.fixture
def results() -> Results:
    return some_results()


@pytest.fixture
def control() -> Control:
    return equal_time_control()


def test_save_and_load_are_inverse(results, control, tmp_path):
    results.controls.append(control)
    path = tmp_path / "run" / "results.json"
    results.save(path)
    assert Results.load(path) == results
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_weights_per_benchmark_survive_the_file(results, tmp_path):
    results.selected_weight = {"gsm8k": 0.5, "svamp": 0.3}
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").selected_weight == {"gsm8k": 0.5, "svamp": 0.3}


def test_file_has_the_keys_of_the_contract(results, tmp_path):
    results.save(tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    contract = "version seed git config params rounds train_seconds selected_weight selected_on reported_on rows gain"
    assert set(contract.split()) <= set(data)
    assert data["version"] == 2
    described = {"higher_is_better", "unit"}
    assert set(data["rows"][0]) == {"benchmark", "split", "metric", "weight", "value", "n", "ci95"} | described
    gain = "benchmark metric pilot fused difference ci95 fixed broken p_value higher_is_better unit"
    assert set(data["gain"][0]) == set(gain.split())


@pytest.mark.parametrize("poison", [object(), math.nan, math.inf])
def test_failed_serialisation_leaves_the_old_file(results, tmp_path, poison):
    path = tmp_path / "results.json"
    results.save(path)
    old = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        replace(results, train_seconds=poison).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_no_litter(results, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.save(path)
    old = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace(results, seed=4).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def edited(results, path, edit) -> str:
    """Save, change the parsed file, and return the message with which it is refused."""
    results.save(path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Results.load(path)
    return str(caught.value)


def test_load_names_file_and_key(results, tmp_path):
    path = tmp_path / "results.json"
    assert edited(results, path, lambda data: data.pop("rounds")) == f"{path}: missing 'rounds'"
    assert edited(results, path, lambda data: data.pop("rows")) == f"{path}: missing 'rows'"
    assert edited(results, path, lambda data: data["rows"][2].pop("ci95")) == f"{path}: rows[2]: missing 'ci95'"
    assert edited(results, path, lambda data: data.update(version=1)).startswith(f"{path}: 'version' is 1")
    assert edited(results, path, lambda data: data.pop("version")).startswith(f"{path}: 'version' is None")
    assert edited(results, path, lambda data: data.update(gain=[7])) == f"{path}: gain[0]: expected an object, found 7"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_load_refuses_what_is_no_result(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        Results.load(path)


def test_load_reads_the_contract_without_our_extensions_and_ignores_foreign_keys(results, tmp_path):
    path = tmp_path / "results.json"
    results.save(path)
    data = json.loads(path.read_text())
    del data["controls"], data["notes"]
    path.write_text(json.dumps(data | {"dashboard": "x"}))
    assert Results.load(path) == replace(results, notes=[], controls=[])


def test_gain_is_the_comparison_by_name():
    comparison = compare([0, 0, 1, 0], [1, 1, 0, 0])
    gain = Gain.of("gsm8k", Metric("accuracy"), comparison)
    assert (gain.benchmark, gain.metric) == ("gsm8k", "accuracy")
    for name in [f.name for f in fields(Gain)][2:-2]:
        assert getattr(gain, name) == getattr(comparison, name)
    assert (gain.higher_is_better, gain.unit) == (True, "share")


def test_the_predictions_of_a_run_are_those_of_the_mode_that_decided(tmp_path):
    gain = Gain("choice", "accuracy_sum", 0.0, 1.0, 1.0, (1.0, 1.0), 1, 0, 1.0)
    rows = [Row("choice", split, "accuracy_sum", 0.5, 1.0, 1, (1.0, 1.0)) for split in ("validation", "test")]
    results = Results(
        seed=0, git="abc", config="config.yaml", params={}, rounds=1, train_seconds=1.0,
        selected_weight=0.5, selected_on="validation", reported_on="test", rows=rows, gain=[gain],
    )  # fmt: skip
    for suffix, metric in (("", "accuracy"), ("-likelihood", "accuracy_sum")):
        line = json.dumps({"id": 3, "scores": {metric: 1.0}})
        (tmp_path / f"test-choice{suffix}-weight=0.5.jsonl").write_text(line + "\n")
    assert read_predictions(results, tmp_path, "choice", 0.5)[3]["scores"] == {"accuracy_sum": 1.0}
    results.gain = [replace(gain, metric="accuracy")]
    assert read_predictions(results, tmp_path, "choice", 0.5)[3]["scores"] == {"accuracy": 1.0}
    assert read_predictions(results, tmp_path, "choice", 0.3) == {}
