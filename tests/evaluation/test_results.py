"""The contract of `results.json`, and the tables made from it."""

import io
import json
import math
import os
from dataclasses import fields, replace

import pytest
from rich.console import Console

from tcopilot.data.metrics import NLL, Metric
from tcopilot.evaluation.outcomes import read_predictions
from tcopilot.evaluation.results import (
    Control,
    Gain,
    Results,
    Row,
    direction_and_unit,
    gain_table,
    git_revision,
    weight_table,
)
from tcopilot.evaluation.significance import compare


@pytest.fixture
def results() -> Results:
    def row(metric: str, split: str, weight: float, value: float) -> Row:
        described = direction_and_unit(NLL) if metric == "nll" else {}
        return Row("gsm8k", split, metric, weight, value, 1319, (value - 0.02, value + 0.02), **described)

    return Results(
        seed=3,
        git="abc-dirty",
        config="config.yaml",
        params={"pilot": 100, "copilot": 20, "pilot_trainable": 100, "copilot_trainable": 20},
        rounds=500,
        train_seconds=61.7,
        selected_weight=0.5,
        selected_on="validation",
        reported_on="test",
        rows=[
            row("accuracy", "validation", 0.0, 0.4012),
            row("accuracy", "validation", 0.5, 0.4534),
            row("accuracy", "test", 0.0, 0.4125),
            row("accuracy", "test", 0.5, 0.4375),
            row("nll", "test", 0.0, 1.23456),
            row("nll", "test", 0.5, 1.11111),
        ],
        gain=[
            Gain("gsm8k", "accuracy", 0.4125, 0.4375, 0.025, (0.0101, 0.0399), 60, 27, 0.00052),
            Gain("gsm8k", "nll", 1.23456, 1.11111, -0.12345, (-0.2, -0.05), 900, 419, 0.0002, False, "nats"),
        ],
        notes=["λ was swept on 500 rows."],
    )


@pytest.fixture
def control() -> Control:
    figure = ("gsm8k", "test", "accuracy", 0.4425, 1319, (0.41, 0.47))
    return Control(*figure, name="Pilot, equal time", rounds=812, train_seconds=61.2)


def text(table) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table)
    return console.export_text()


def line(table, *words: str) -> str:
    """Return the only printed line that holds all the words."""
    (found,) = (line for line in text(table).splitlines() if all(word in line for word in words))
    return found


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


def test_gain_table_shows_percent_points_and_verdict(results):
    shown = line(gain_table(results), "accuracy")
    for cell in ("41.25 %", "43.75 %", "+2.50 [+1.01, +3.99]", "60 / 27", "0.00052", "1319", " 0.5 ", " better"):
        assert cell in shown
    assert "500 rounds, 62 s; λ chosen on validation" in text(gain_table(results))


def test_rows_that_were_trained_on_are_named_beneath_the_gain(results):
    assert "trained on" not in text(gain_table(results))
    parts = {"gsm8k/test": {"rows": 1319, "trained_on": 20}, "gsm8k/validation": {"rows": 500, "trained_on": 3}}
    results.data = parts
    assert "gsm8k: 20 of 1319 rows ask what was trained on" in text(gain_table(results))


def test_the_number_of_rows_is_that_of_the_reported_split_also_where_the_weight_was_chosen(results):
    results.rows = [replace(row, n=77) if row.split == "validation" else row for row in results.rows]
    assert " 1319 " in line(gain_table(results), "accuracy")
    results.reported_on = "validation"
    assert " 77 " in line(gain_table(results), "accuracy")


def test_nats_are_plain_numbers_and_lower_is_better(results):
    shown = line(gain_table(results), "nll")
    for cell in ("1.2346", "1.1111", "-0.1235 [-0.2000, -0.0500]", " better"):
        assert cell in shown
    assert "%" not in shown


def test_controls_stand_beneath_with_their_cost(results, control):
    results.controls.append(control)
    table = gain_table(results)
    shown = line(table, "Pilot, equal time")
    for cell in ("41.25 %", "44.25 %", "+3.00", "812", "61", "1319"):
        assert cell in shown
    assert text(table).index("nll") < text(table).index("seconds") < text(table).index("Pilot, equal time")


def test_tables_survive_missing_rows(results, control):
    results.rows, results.selected_weight, results.controls = [], {}, [control]
    assert "43.75 %" in line(gain_table(results), "43.75")
    assert "44.25 %" in line(gain_table(results), "equal time")
    assert "λ" in text(weight_table(results))


def test_weight_table_is_the_curve_with_the_selected_weight_marked(results):
    table = weight_table(results)
    for split, metric, cell in (
        ("validation", "acc", "45.34 %"),
        ("test", "acc", "43.75 %"),
        ("test", "nll", "1.1111"),
    ):
        assert cell in line(table, split, metric, cell)
    assert column_of(table, "45.34 %") == column_of(table, "λ = 0.5") == column_of(table, "(selected)")
    assert column_of(table, "40.12 %") == column_of(table, "λ = 0 ") != column_of(table, "(selected)")


def column_of(table, cell: str) -> int:
    """In which column a text stands, by the borders before it."""
    found = next(row for row in text(table).splitlines() if cell in row)
    return found[: found.index(cell)].replace("┃", "│").count("│")


def test_weight_table_marks_each_benchmark(results):
    results.rows.append(Row("svamp", "validation", "accuracy", 0.3, 0.77, 100, (0.7, 0.8)))
    results.selected_weight = {"gsm8k": 0.5, "svamp": 0.3}
    table = weight_table(results)
    assert column_of(table, "(svamp)") == column_of(table, "77.00 %") == column_of(table, "λ = 0.3")
    assert column_of(table, "(gsm8k)") == column_of(table, "45.34 %") == column_of(table, "λ = 0.5")


def test_a_weight_table_of_many_weights_keeps_names_and_figures_whole(results):
    weights = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0)
    nll = [Row("all", "test", "nll", w, 0.5029, 9000, (0.4, 0.6), False, "nats") for w in weights]
    results.rows = [Row("word_problems", "test", "accuracy", w, 0.8685, 2000, (0.8, 0.9)) for w in weights] + nll
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(weight_table(results))
    printed = console.export_text()
    assert "word_problems" in printed
    assert printed.count("86.85 %") == printed.count("0.5029") == len(weights)
    assert "nll, nats" in printed


@pytest.fixture
def fake_git(tmp_path, monkeypatch):
    """Put a `git` first on the path that knows one commit and prints the given changes."""

    def install(changes: str) -> None:
        git = tmp_path / "git"
        git.write_text(f'#!/bin/sh\ncase "$*" in *rev-parse*) echo abc;; *status*) printf "{changes}";; esac\n')
        git.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


@pytest.mark.parametrize(("changes", "expected"), [("", "abc"), (" M train.py", "abc-dirty")])
def test_git_revision_says_whether_files_differ(fake_git, changes, expected):
    fake_git(changes)
    assert git_revision() == expected


def test_git_revision_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "unknown"


def test_git_revision_is_unknown_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)  # set while a commit hook runs
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision(tmp_path) == "unknown"


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
