"""Reading a run directory: what counts, and what is refused."""

import csv
import html
import io
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from written_runs import write_run

from tcopilot.app.jobs import Job
from tcopilot.evaluation.results import Results
from tcopilot.reporting.dashboards import log_evaluation
from tcopilot.reporting.finished_runs import FinishedRun, RunError
from tcopilot.reporting.report.page import gain_lines
from tcopilot.reporting.report.page import main as report
from tcopilot.reporting.seed_groups import group_runs
from tcopilot.reporting.summaries import summarise
from tcopilot.reporting.tables import FORMATS, Found, main
from tcopilot.run_directory import override

FIGURES = {("gsm8k", "accuracy"): (0.4, 0.5)}


@pytest.mark.parametrize(("split", "rows"), [("validation", 77), ("test", 1319)])
def test_split_and_number_of_rows_are_those_that_are_reported(tmp_path, split, rows):
    folder = write_run(tmp_path, FIGURES, evaluation__report_on=split)
    results = Results.load(folder / "results.json")
    results.rows = [replace(row, n={"validation": 77, "test": 1319}[row.split]) for row in results.rows]
    results.save(folder / "results.json")
    run = FinishedRun.read(folder)
    assert [line["n"] for line in gain_lines(run)] == [rows]
    summary = summarise(*group_runs([run]))
    (line,) = json.loads(FORMATS["json"]([summary], Found()))["groups"][0]["lines"]
    assert (line["split"], line["n"]) == (split, str(rows))
    head, values = FORMATS["csv"]([summary], Found()).splitlines()
    record = dict(zip(head.split(","), values.split(","), strict=True))
    assert (record["split"], record["n"]) == (split, str(rows))
    markdown = FORMATS["markdown"]([summary], Found())
    assert f"| gsm8k | accuracy | {rows} | 0 | 0.5 |" in markdown
    assert f"{split} rows" in markdown


def test_a_run_of_another_version_is_named_so_whatever_its_results_look_like(tmp_path):
    folder = write_run(tmp_path, FIGURES, version="0.1.0")
    (folder / "results.json").write_text('{"version": 1}')
    with pytest.raises(RunError, match=r"made by version 0\.1\.0"):
        FinishedRun.read(folder)


def test_figures_that_are_no_numbers_are_refused(tmp_path):
    folder = write_run(tmp_path, FIGURES)
    data = json.loads((folder / "results.json").read_text())
    data["rows"][1]["value"] = "high"
    (folder / "results.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"results\.json: rows\[1\]: 'value' is 'high'"):
        FinishedRun.read(folder)


def test_metrics_keep_every_digit_and_are_empty_where_nothing_was_logged(tmp_path):
    folder = write_run(tmp_path, FIGURES)
    assert FinishedRun.read(folder).metrics.empty
    (folder / "metrics.csv").write_text("round,val/nll\n1,0.30000000000000004\n2,\n")
    metrics = FinishedRun.read(folder).metrics
    assert metrics["val/nll"].dropna().tolist() == [0.1 + 0.2]
    assert metrics["round"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("where", "key", "value", "told"),
    [
        (None, "rows", None, "'rows' is None, not a list"),
        (None, "seed", None, "'seed' is None, not a whole number"),
        (None, "selected_weight", "0.5", "'selected_weight' is '0.5', not a number or an object of numbers"),
        (None, "selected_weight", {"gsm8k": None}, "not a number or an object of numbers"),
        ("rows", "value", float("nan"), "rows[0]: 'value' is nan, not a number"),
        ("rows", "value", True, "rows[0]: 'value' is True, not a number"),
        ("rows", "weight", "0", "rows[0]: 'weight' is '0', not a number"),
        ("rows", "n", None, "rows[0]: 'n' is None, not a whole number"),
        ("rows", "unit", 1, "rows[0]: 'unit' is 1, not a text"),
        ("rows", "ci95", None, "rows[0]: 'ci95' is None, not two numbers"),
        ("rows", "ci95", [0.1], "rows[0]: 'ci95' is (0.1,), not two numbers"),
        ("gain", "p_value", None, "gain[0]: 'p_value' is None, not a number"),
        ("gain", "fixed", 0.5, "gain[0]: 'fixed' is 0.5, not a whole number or null"),
    ],
)
def test_one_odd_file_among_many_is_named_and_the_others_are_shown(tmp_path, capsys, where, key, value, told):
    write_run(tmp_path / "good", FIGURES)
    odd = write_run(tmp_path / "odd", FIGURES, 1)
    data = json.loads((odd / "results.json").read_text())
    (data if where is None else data[where][0])[key] = value
    (odd / "results.json").write_text(json.dumps(data))
    assert main([str(tmp_path), "--json", str(tmp_path / "table.json")]) == 0
    assert f"unreadable: {odd}: results.json: " in (out := capsys.readouterr().out)
    assert told in out
    assert [group["runs"] for group in json.loads((tmp_path / "table.json").read_text())["groups"]] == [
        [str(tmp_path / "good")]
    ]


@pytest.mark.parametrize("key", ["pilot__path", "copilot__path", "copilot__layers", "paths__run_dir", "name"])
def test_an_odd_value_in_a_config_does_not_end_the_table(tmp_path, key):
    write_run(tmp_path / "good", FIGURES)
    for value in (0.5, [1], {"a": None}):
        write_run(tmp_path / "odd", FIGURES, 1, **{key: value})
        assert main([str(tmp_path), "--json", str(tmp_path / "table.json")]) == 0


NAMES = ["runs/[a]", "a,b/[x]=1", "it's", "a b", "ü/λ", "trailing\\", "a\\'b", "#1", "{x}"]


@pytest.mark.parametrize("name", NAMES)
def test_hydra_reads_any_name_of_a_run_directory_as_it_was_written(name):
    assert OverridesParser.create().parse_override(override("run", name)).value() == name


def test_a_run_directory_may_have_brackets_and_spaces(tmp_path, capsys):
    folder = write_run(
        tmp_path / "[bold] it's [/x], λ", FIGURES, fusion__rule={"_target_": "a.B"}, fusion__feedback="own"
    )
    (folder / "export").mkdir()
    assert main([str(folder)]) == 0
    assert "gsm8k" in capsys.readouterr().out
    assert report([str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report' / 'index.html'}\n"
    page = html.unescape((folder / "report" / "index.html").read_text(encoding="utf-8"))
    (command,) = re.findall(r"<code>python (eval\.py .*) trace=true</code>", page)
    _, given = shlex.split(command)
    assert OverridesParser.create().parse_override(given).value() == str(folder)
    job = Job(folder=folder, overrides=())
    assert [OverridesParser.create().parse_override(one).value() for one in job.given("new")] == [str(folder)]
    assert [OverridesParser.create().parse_override(one).value() for one in job.given("started")] == [str(folder)]


def test_signs_that_the_output_cannot_write_are_escaped_and_a_file_on_it_is_utf8(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "λ", FIGURES)

    def printed(*arguments):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([str(folder), *arguments]) == 0
        stdout.flush()
        return stdout.buffer.getvalue()

    assert b"\\u03bb" in printed()
    assert json.loads(printed("--json", "-").decode("utf-8"))["groups"][0]["runs"] == [str(folder)]
    assert "λ" in printed("--markdown", "-").decode("utf-8")


def test_no_cell_of_a_csv_file_is_a_formula(tmp_path):
    folder = write_run(tmp_path, FIGURES, pilot__path="=HYPERLINK(A1)")
    assert main([str(folder), "--csv", str(tmp_path / "table.csv")]) == 0
    (line,) = csv.DictReader((tmp_path / "table.csv").open(newline=""))
    assert line["pilot"] == "'=HYPERLINK(A1)"
    assert line["group"].startswith("'=")
    assert float(line["gain_mean"]) == pytest.approx(10)
    results = Results.load(folder / "results.json")
    (folder / "predictions").mkdir()
    said = ["=1+1", "+cmd|' /C calc'!A0", "-3", "-3 apples", "@SUM(A1)", "12"]
    for weight in (0, 0.5):
        rows = ({"id": i, "prompt": "p", "target": "t", "prediction": text} for i, text in enumerate(said))
        lines = [json.dumps(row | {"scores": {"accuracy": 0.0}}) for row in rows]
        (folder / "predictions" / f"test-gsm8k-weight={weight:g}.jsonl").write_text("\n".join(lines) + "\n")
    log_evaluation([], results, folder)
    shown = [line["fused"] for line in csv.DictReader((folder / "generations.csv").open(newline=""))]
    assert shown == ["'=1+1", "'+cmd|' /C calc'!A0", "-3", "'-3 apples", "'@SUM(A1)", "12"]
