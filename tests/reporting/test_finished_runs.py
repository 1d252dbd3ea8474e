"""Reading a run directory: what counts, and what is refused."""

import json
from dataclasses import replace

import pytest
from written_runs import write_run

from tcopilot.evaluation.results import Results
from tcopilot.reporting.finished_runs import FinishedRun, RunError
from tcopilot.reporting.report.page import gain_lines
from tcopilot.reporting.seed_groups import group_runs
from tcopilot.reporting.summaries import summarise
from tcopilot.reporting.tables import FORMATS, Found

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
