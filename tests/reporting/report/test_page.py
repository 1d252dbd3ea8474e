"""Trace and report of a small real run: what is written agrees with the run's own files, and bad input is answered."""

import csv
import gzip
import json
import re
import shutil
from pathlib import Path

import composed
import pytest
from reports import BROKEN, FIXED, TRACED, traced_run, with_outcomes
from written_runs import write_run

from tcopilot.app.checks.problems import ConfigError
from tcopilot.reporting.finished_runs import FinishedRun
from tcopilot.reporting.report import drawing
from tcopilot.reporting.report.page import examples, gain_lines, main
from tcopilot.reporting.report.plots import theorem_bound, weight_curves

BENCHMARKS = ("word_problems", "multiple_choice")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An evaluation with a trace."""
    return traced_run(tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="module", autouse=True)
def _coarse():
    """Plots of few pixels, which are drawn in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 30)
        yield


@pytest.fixture(scope="module")
def reported(run, tmp_path_factory):
    """The same with known outcomes, and its report."""
    folder = with_outcomes(run, tmp_path_factory.mktemp("known") / "eval")
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture
def unplotted(monkeypatch):
    """Reports without plots, which take most of the time."""
    monkeypatch.setattr(drawing, "render", lambda draw: (b"", '<svg viewBox="0 0 1 1"></svg>'))


def page_of(folder):
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


def lines_of(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def text_of(tokens):
    """What a tokenizer of words makes of them."""
    return " ".join(token for token in tokens if token not in ("<pad>", "<eos>"))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_trace_holds_rows_spread_over_the_split_along_right_and_emitted_answers(run, benchmark):
    weight = composed.results(run)["selected_weight"]
    answers = {row["id"]: row for row in composed.predictions(run, "test", weight, benchmark)}
    before = {row["id"]: row for row in composed.predictions(run, "test", 0, benchmark)}
    with gzip.open(run / "trace" / f"{benchmark}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len({row["id"] for row in rows}) == TRACED
    for row in rows:
        said = [position["token"] for position in row["emitted"]]
        assert text_of(said) == answers[row["id"]]["prediction"]
        assert text_of(row["pilot_emitted"]) == before[row["id"]]["prediction"]
        assert [p["token"] for p in row["gold"]] == [*answers[row["id"]]["target"].split(), "<eos>"]
        assert all(set(position["feedback"]) == {"observed", "own"} for position in row["gold"])
        assert all(position["after"][0][0] == position["token"] for position in row["emitted"])  # greedy
    meta = json.loads((run / "trace" / "meta.json").read_text())
    assert (meta["benchmarks"]["word_problems"]["weight"], meta["split"]) == (weight, "test")
    assert meta["benchmarks"][benchmark]["traced"] == TRACED
    assert meta["benchmarks"][benchmark]["decoding"]["pilot"] > 0


@pytest.mark.slow
def test_the_gain_table_is_results_json_and_fixed_minus_broken_is_the_difference(reported):
    found = composed.results(reported)["gain"]
    lines = gain_lines(FinishedRun.read(reported))
    for key in ("benchmark", "metric", "pilot", "fused", "difference", "fixed", "broken", "p_value"):
        assert [line[key] for line in lines] == [gain[key] for gain in found]
    assert [line["adds_up"] for line in lines] == [True, True]
    assert (lines[0]["fixed"], lines[0]["broken"]) == (len(FIXED), len(BROKEN))
    shown = re.findall(r'data-key="difference" data-value="([^"]*)"', page_of(reported))
    assert [float(value) for value in shown] == [gain["difference"] for gain in found]


@pytest.mark.slow
def test_a_count_that_does_not_add_up_is_shown(reported):
    run = FinishedRun.read(reported)
    run.results.gain[0] = run.results.gain[0].__class__(**vars(run.results.gain[0]) | {"fixed": 7})
    assert gain_lines(run)[0]["adds_up"] is False


@pytest.mark.slow
def test_the_explorer_has_every_example_with_its_outcome_and_traced_ones_first(reported):
    found = json.loads(DATA.search(page_of(reported))[1])
    assert len(found["examples"]) == 60
    views = [example[-1] is not None for example in found["examples"]]
    assert views == [True] * 2 * TRACED + [False] * (60 - 2 * TRACED)
    of_problems = [example[2] for example in found["examples"] if example[0] == "word_problems"]
    assert (of_problems.count("fixed"), of_problems.count("broken")) == (len(FIXED), len(BROKEN))
    gold = found["examples"][0][-1]["gold"]
    assert " ".join(found["tokens"][position[0]] for position in gold[:-1]) == found["examples"][0][4]


@pytest.mark.slow
def test_a_full_page_keeps_the_answers_that_changed(reported, monkeypatch):
    run = FinishedRun.read(reported)
    changed = sum(e[2] in ("fixed", "broken") and e[-1] is not None for e in examples(run)["examples"])
    monkeypatch.setattr("tcopilot.reporting.report.page.MOST_POSITIONS", 12 * max(1, changed))
    less = examples(run)
    kept = [example[2] for example in less["examples"] if example[-1] is not None]
    assert changed
    assert len(kept) < less["traced"]
    assert sum(outcome in ("fixed", "broken") for outcome in kept) == changed


def test_any_name_of_a_metric_makes_a_name_of_a_file(tmp_path):
    for metric in ("rouge/l", "exact match"):
        run = FinishedRun.read(write_run(tmp_path / metric[:5], {("mine", metric): (0.4, 0.5)}))
        assert [plot.name for plot in weight_curves(run)] == [f"weight_mine_{metric[:5]}_{metric[6:]}"]


@pytest.mark.slow
def test_each_plot_is_a_png_with_its_numbers_as_csv(reported):
    figures, page = reported / "report" / "figures", page_of(reported)
    plots = {file.stem for file in figures.glob("*.png")}
    assert plots >= {
        "weight_word_problems_accuracy", "weight_all_nll", "reliability_all_benchmarks", "correction_share",
        "correction_magnitude", "drift_norm_multiple_choice", "drift_cosine_multiple_choice", "training_pilot_loss",
        "training_copilot_loss", "training_cosine", "training_norms", "training_log_age", "training_log_repeats",
        "training_log_energy", "efficiency",
    }  # fmt: skip
    for name in plots:
        assert (figures / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert len(lines_of(figures / f"{name}.csv")) >= 1
        assert f'<figure id="{name}">' in page
    curve = lines_of(figures / "weight_word_problems_accuracy.csv")
    rows = [row for row in composed.results(reported)["rows"] if row["benchmark"] == "word_problems"]
    rows = [row for row in rows if row["metric"] == "accuracy"]
    assert [(line["split"], float(line["weight"]), float(line["value"])) for line in curve] == [
        (row["split"], row["weight"], row["value"]) for row in rows
    ]
    mistakes = lines_of(figures / "mistakes.csv")
    assert sum(int(line["count"]) for line in mistakes) > 0


@pytest.mark.slow
def test_the_page_loads_nothing_and_names_the_weights(reported):
    page = page_of(reported)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "default-src 'none'" in page
    assert (star := re.search(r"λ\* in closed form on validation: ([\d.]+)", page))
    assert FinishedRun.read(reported).results.best_weight == pytest.approx(float(star[1]), abs=5e-4)


@pytest.mark.slow
def test_a_weight_for_each_benchmark_reaches_the_trace_and_the_page(run, tmp_path, unplotted):
    trained = json.loads((run / "trace" / "meta.json").read_text())["trained"]
    given = ["fusion.per=benchmark", "trace=true", f"trace_rows={TRACED}"]
    folder = composed.evaluate(trained, tmp_path / "eval", *given)
    chosen = composed.results(folder)["selected_weight"]
    meta = json.loads((folder / "trace" / "meta.json").read_text())
    assert {name: about["weight"] for name, about in meta["benchmarks"].items()} | {"all": chosen["all"]} == chosen
    (folder / "theorem.json").write_text('{"lambda_0": 0.75}')
    assert main([str(folder)]) == 0
    page = (folder / "report" / "index.html").read_text()
    assert f"word_problems {chosen['word_problems']:g}, multiple_choice" in page
    assert "theorem's λ₀" not in page  # it is of all benchmarks together


@pytest.mark.slow
def test_a_bound_that_knows_no_gate_is_not_drawn_for_one(run):
    read = FinishedRun.read(run)
    trained = Path(read.trace.meta["trained"])
    try:
        (trained / "theorem.json").write_text('{"lambda_0": 0.75}')
        assert theorem_bound(read) == 0.75
        read.config["fusion.per"] = "token"
        assert theorem_bound(read) is None
    finally:
        (trained / "theorem.json").unlink()


@pytest.mark.slow
def test_ids_of_all_plots_are_unique(reported):
    svgs = re.findall(r"<svg.*?</svg>", page_of(reported), re.DOTALL)
    ids = [name for svg in svgs for name in set(re.findall(r'\bid="([^"]+)"', svg))]
    assert len(svgs) > 10
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_text_of_a_model_cannot_become_markup(reported, tmp_path, unplotted):
    folder = tmp_path / "eval"
    shutil.copytree(reported, folder)
    for file in (folder / "predictions").glob("test-word_problems-weight=*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0]["prediction"] = "</script><script>alert(1)</script>"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(folder)]) == 0
    assert "<script>alert" not in page_of(folder)
    data = json.loads(DATA.search(page_of(folder))[1])
    assert any(example[6] == "</script><script>alert(1)</script>" for example in data["examples"])


@pytest.mark.slow
def test_the_theorems_bound_is_read_from_the_run_or_its_training_run(run, tmp_path):
    folder = tmp_path / "eval"
    shutil.copytree(run, folder)
    assert theorem_bound(FinishedRun.read(folder)) is None
    (run.parent / "train" / "theorem.json").write_text('{"lambda_0": 0.875}')
    assert theorem_bound(FinishedRun.read(folder)) == 0.875
    (folder / "theorem.json").write_text('{"lambda_0": null}')
    assert theorem_bound(FinishedRun.read(folder)) is None
    (run.parent / "train" / "theorem.json").unlink()


@pytest.mark.slow
def test_the_evidence_tables_are_shown_once_there_are_some(reported, tmp_path, unplotted):
    text = "# Evidence\n<!-- evidence: tables -->\n{}\n<!-- evidence: end of tables -->\n"
    table = "### Commonsense\n\n| arm | gain |\n| --- | --- |\n| `literal` | <b>+1.5</b> |\n"
    shown = []
    for content in ("Nothing was run yet.", table):
        (tmp_path / "evidence.md").write_text(text.format(content))
        assert main([str(reported), "--out", str(tmp_path), "--evidence", str(tmp_path / "evidence.md")]) == 0
        shown.append((tmp_path / "index.html").read_text())
    assert 'id="evidence"' not in shown[0]
    assert "<td><code>literal</code></td>" in shown[1]
    assert "<h4>Commonsense</h4>" in shown[1]
    assert "<b>+1.5</b>" not in shown[1]


@pytest.mark.slow
def test_a_training_run_is_reported_without_a_trace_and_told_how_to_get_one(run, tmp_path, unplotted):
    trained = run.parent / "train"
    assert main([str(trained), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert f"python eval.py run={trained} trace=true" in page
    assert (tmp_path / "figures" / "training_copilot_loss.png").exists()
    assert not (tmp_path / "figures" / "correction_share.png").exists()


def test_results_alone_are_reported(tmp_path, unplotted):
    fusion = {"fusion__rule": {"_target_": "tcopilot.models.fusion.ProbabilityFusion"}, "fusion__feedback": "own"}
    folder = write_run(tmp_path / "run", {("gsm8k", "accuracy"): (0.4, 0.5)}, **fusion)
    assert main([str(folder)]) == 0
    assert lines_of(folder / "report" / "figures" / "gain.csv")[0]["fixed"] == "9"


def test_a_run_of_another_version_is_not_reported_on(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {("gsm8k", "accuracy"): (0.4, 0.5)}, version="0.1.0")
    assert main([str(folder)]) == 1
    assert "made by version 0.1.0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_cannot_be_reported_on_is_answered_with_the_mend(run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no results.json there; give the directory of a finished" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "eval")
    (tmp_path / "eval" / "trace" / "word_problems.jsonl.gz").write_bytes(b"no gzip")
    assert main([str(tmp_path / "eval")]) == 1
    assert "write it again with eval.py trace=true" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trace=yes_please"], "trace=yes_please: give true or false"),
        (["trace=true", "trace_rows=0"], "trace_rows=0: give a whole number of rows, at least 1, or null"),
    ],
)
def test_a_bad_setting_of_the_trace_is_refused_before_anything_runs(run, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        composed.evaluate(run.parent / "train", tmp_path / "eval", *overrides)
    assert not (tmp_path / "eval").exists()


@pytest.mark.slow
def test_a_run_without_a_copilot_has_nothing_to_trace(run, tmp_path):
    trained = tmp_path / "train"
    shutil.copytree(run.parent / "train", trained, ignore=shutil.ignore_patterns("checkpoints"))
    config = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(config.replace("enabled: true", "enabled: false", 1))
    with pytest.raises(ConfigError, match=r"trace=true: this run has no Copilot \(copilot=none\)"):
        composed.evaluate(trained, tmp_path / "eval", "trace=true")


def test_a_page_of_evidence_that_is_named_and_not_there_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--evidence", str(tmp_path / "none.md")]) == 1
    assert f"--evidence {tmp_path}/none.md" in capsys.readouterr().err
