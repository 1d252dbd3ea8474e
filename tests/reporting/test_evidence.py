"""The evidence page: its figures are those of the run directories, and its script goes on where it was."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from typing import ClassVar

import composed
import pytest
import yaml
from written_runs import write_run

from tcopilot.app import jobs as job_runner
from tcopilot.app import run
from tcopilot.app.checks.config import config_problems
from tcopilot.app.checks.problems import ConfigError
from tcopilot.evaluation.evaluate import PER
from tcopilot.evaluation.results import Results
from tcopilot.evaluation.significance import compare
from tcopilot.reporting import evidence
from tcopilot.reporting.finished_runs import FinishedRun
from tcopilot.run_directory import RunDirectory

TINY = ["rounds=1", "trainer.val_check_interval=1", "data.max_eval_rows=8", "copilot.steps_per_round=1"]
BRIEF = f"{evidence.BRIEF[0]}\n| cpu, other: task | 1 | 2 | +1 |  |  |  |  |\n{evidence.BRIEF[1]}"
OTHER = "## cpu, other\n\n| kept |\n"
PAGE = f"# Before\n{BRIEF}\n{evidence.BEGIN}\n{OTHER}## smoke, builtin\nold\n{evidence.END}\nafter\n"


@pytest.fixture(scope="module")
def script():
    """scripts/evidence.py as a module."""
    spec = importlib.util.spec_from_file_location("evidence_script", composed.ROOT / "scripts" / "evidence.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(script):
    return yaml.safe_load(script.GRID.read_text())


def carry_out(job):
    """Do in this process what a job does in one of its own."""
    if job.program == "eval.py":
        run.evaluate(composed.compose_config(*job.overrides, f"paths.run_dir={job.folder}", name="eval"))
    else:
        composed.train(job.folder, *job.overrides, *TINY)


@pytest.fixture(scope="module")
def smoke(script, settings, tmp_path_factory):
    """The smoke preset's runs, trained in this process, but for one that is left to do."""
    folder = tmp_path_factory.mktemp("evidence")
    preset = settings["presets"]["smoke"]
    jobs = list(script.grid(preset, settings["arms"], ["builtin"], folder / "smoke", {}))
    for job in jobs[:-1]:
        carry_out(job)
        job.notes.start()
        job.notes.finish()
    return folder, jobs


def found(job):
    return composed.results(job.folder)


@pytest.mark.slow
def test_the_table_has_the_figures_of_the_runs(script, settings, smoke):
    folder, jobs = smoke
    (*_, task), missing = script.evidence(settings, "smoke", folder)
    jobs = [job for job in jobs if job.task == "word_problems"]
    default = [job for job in jobs if job.arm == "default"]
    names = ["default", "literal", "token_gate", "offline", "two Pilots averaged"]
    assert [line.name for line in task.lines] == names
    assert missing == ["smoke/builtin/word_problems/offline (seed 1)"]
    line = task.line("default")
    assert line.seeds == [0, 1]
    gains = [found(job)["gain"][0] for job in default]
    assert line.gain.pilot == pytest.approx(sum(gain["pilot"] for gain in gains) / 2)
    assert line.gain.fused == pytest.approx(sum(gain["fused"] for gain in gains) / 2)
    assert (line.gain.fixed, line.gain.broken) == tuple(
        sum(gain[key] for gain in gains) for key in ("fixed", "broken")
    )
    assert line.seconds == pytest.approx(sum(found(job)["train_seconds"] for job in default) / 2)
    assert line.flops == pytest.approx(sum(found(job)["train_flops"] for job in default) / 2)
    assert line.best_weight == pytest.approx(sum(found(job)["best_weight"] for job in default) / 2)
    assert task.line("offline").seeds == [0]
    gate = task.line("token_gate")  # the default arm's models
    assert (gate.seconds, gate.flops, gate.gain.pilot) == (line.seconds, line.flops, line.gain.pilot)
    control = task.line("two Pilots averaged")
    values = [c["value"] for job in default for c in found(job)["controls"] if c["metric"] == "accuracy"]
    assert control.gain.fused == pytest.approx(sum(values) / 2)
    assert control.against.pilot == pytest.approx(line.gain.fused)


@pytest.mark.slow
def test_comparisons_are_paired_over_pooled_seeds(script, settings, smoke):
    folder, jobs = smoke
    (*_, task), _ = script.evidence(settings, "smoke", folder)
    before, after, rows, ahead = [], [], [], []
    for seed in (0, 1):
        arms = {job.arm: job for job in jobs if (job.task, job.seed) == ("word_problems", seed)}
        one, two = (found(arms[arm])["gain"][0]["fused"] for arm in ("default", "literal"))
        ahead += [seed] if two > one else []
        for arm, into in (("default", before), ("literal", after)):
            weight = found(arms[arm])["selected_weight"]
            said = composed.predictions(arms[arm].folder, "test", weight)
            into += [row["scores"]["accuracy"] for row in said]
        rows += [(row["id"], row["prompt"]) for row in said]
    assert task.line("literal").against == compare(before, after, groups=rows)
    assert task.line("literal").ahead == ahead


def finished(folder, figures, predictions, suffix="", seed=0):
    """A finished run of one benchmark with these predictions by λ, each of a row's scores, prompt and target."""
    write_run(folder, figures, seed)
    (folder / "predictions").mkdir()
    for weight, rows in predictions.items():
        file = folder / "predictions" / f"test-gsm8k{suffix}-weight={weight:g}.jsonl"
        file.write_text("".join(json.dumps({"id": number, **row}) + "\n" for number, row in enumerate(rows)))
    results = Results.load(folder / "results.json")
    results.gain = results.gain[:1]
    results.save(folder / "results.json")
    return FinishedRun.read(folder)


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_that_seeds_share_counts_once(shared, tmp_path):
    right = {0.0: [0.0] * 200, 0.5: [1.0] * 6 + [0.0] * 194}
    runs = []
    for seed in (0, 1, 2):
        figures = {("gsm8k", "accuracy"): (0.0, 0.03), ("all", "nll"): (1.0, 0.9)}
        texts = {"prompt": "p" if shared else f"p of {seed}", "target": "t"}
        said = {weight: [{"scores": {"accuracy": one}, **texts} for one in scores] for weight, scores in right.items()}
        runs.append(finished(tmp_path / str(seed), figures, said, seed=seed))
    (task,) = evidence.gather("task", {"default": runs}, {})
    found, alone = task.lines[0].gain, compare(*right.values())
    assert (found.difference, found.n, found.fixed) == (pytest.approx(0.03), 600, 18)
    if shared:  # three copies of a row say no more than one of them
        assert found.p_value == pytest.approx(alone.p_value) == pytest.approx(2 / 2**6)
        assert found.ci95 == pytest.approx(alone.ci95, abs=0.0051)
    else:
        assert found == compare(*(3 * list(scores) for scores in right.values()))
        assert found.p_value == pytest.approx(2 / 2**18)


def test_an_arm_that_answers_in_another_way_is_shown_by_its_own_metric(tmp_path):
    arms = {"default": ("exact", [0.0, 1.0, 1.0]), "reranking": ("accuracy", [0.0, 0.0, 1.0])}
    runs = {}
    for arm, (metric, right) in arms.items():
        figures = {("gsm8k", metric): (0.0, sum(right) / 3), ("all", "nll"): (1.0, 0.9)}
        by_weight = {0.0: [0.0, 0.0, 0.0], 0.5: right}
        said = {
            weight: [{"scores": {metric: one}, "prompt": "p", "target": "t"} for one in scores]
            for weight, scores in by_weight.items()
        }
        runs[arm] = [finished(tmp_path / arm, figures, said)]
    (task,) = evidence.gather("task", runs, {})
    assert [line.name for line in task.lines] == ["default", "reranking"]
    assert [line.gain.fixed for line in task.lines] == [2, 1]
    assert task.lines[1].against.difference == pytest.approx(-1 / 3)


def test_likelihoods_are_compared_row_by_row_where_targets_were_scored(tmp_path):
    figures = {("gsm8k", "exact"): (0.0, 0.0), ("all", "nll"): (1.0, 0.9)}
    likelihoods = {"default": [1.0, 2.0, 3.0], "other": [0.5, 1.75, 3.0], "generated": [None] * 3}
    runs = {}
    for arm, of_rows in likelihoods.items():
        scores = [{"exact": 0.0} | ({} if one is None else {"nll": one}) for one in of_rows]
        rows = [{"scores": one, "prompt": f"p {i}", "target": "t"} for i, one in enumerate(scores)]
        runs[arm] = [finished(tmp_path / arm, figures, {0.0: rows, 0.5: rows}, "-targets")]
    (task,) = evidence.gather("task", runs, {})
    found = task.line("other").nll_against
    assert found == compare([1.0, 2.0, 3.0], [0.5, 1.75, 3.0], higher_is_better=False)
    assert found.difference == pytest.approx(-0.25)
    assert task.line("default").nll_against is None is task.line("generated").nll_against
    table = evidence.as_markdown([task])
    assert table.count("-0.250 [") == 1


def test_a_part_names_its_own_missing_runs_only():
    line = evidence.Line("default", [0], {}, {}, (1.0, 0.9), None, None, [0.5], 1, 1.0, None)
    line.gain = compare([0.0, 0.0], [1.0, 0.0])
    task, missing = (
        evidence.TaskEvidence("smoke, builtin: task", "accuracy", [line]),
        ["smoke/builtin/task/a (seed 1)"],
    )
    page = evidence.put_between_markers(PAGE, [task], [*missing, "smoke/builtin_2/task/b (seed 1)"])
    assert "Not run, or not finished: smoke/builtin/task/a (seed 1)." in page


def test_a_tuned_pilot_stands_for_equal_flops_where_there_is_one():
    names = ("default", "Pilot, equal FLOPs", "Pilot, tuned")
    lines = [evidence.Line(name, [0], {}, {}, (1.0, 0.9), None, None, [0.5], 1, 1.0, None) for name in names]
    for line, right in zip(lines, (4, 2, 3), strict=True):
        line.ahead = []
        line.gain = compare(8 * [0.0], right * [1.0] + (8 - right) * [0.0])
        line.against = compare(4 * [1.0] + 4 * [0.0], right * [1.0] + (8 - right) * [0.0])
    more = replace(lines[1], seeds=[0, 1])
    for found, points in ((lines[:2], "+25.0"), (lines, "+12.5"), ([lines[0], more, lines[2]], "+25.0")):
        task = evidence.TaskEvidence("smoke, builtin: task", "accuracy", found)
        page = evidence.put_between_markers(PAGE, [task], [])
        (row,) = [line for line in page.splitlines() if line.startswith("| smoke, builtin: task ")]
        assert row.split(" | ")[-1].startswith(points)
    alike = replace(lines[1], against=compare(8 * [1.0], 8 * [1.0]))
    page = evidence.put_between_markers(
        PAGE, [evidence.TaskEvidence("smoke, builtin: task", "accuracy", [lines[0], alike])]
    )
    assert "| +0.0 [+0.0, +0.0] |" in page


@pytest.mark.slow
def test_a_mixture_has_a_table_for_each_of_its_benchmarks(script, settings, smoke):
    folder, jobs = smoke
    tasks, _ = script.evidence(settings, "smoke", folder)
    both = {task.name: task for task in tasks if "mixture" in task.name}
    assert list(both) == [f"smoke, builtin: mixture/{name}" for name in ("word_problems", "multiple_choice")]
    for place, task in enumerate(both.values()):
        for arm in ("default", "benchmark_weights"):
            fused = [found(job)["gain"][place]["fused"] for job in jobs if (job.task, job.arm) == ("mixture", arm)]
            assert task.line(arm).gain.fused == pytest.approx(sum(fused) / 2)
        chosen = [found(job)["selected_weight"] for job in jobs if job.arm == "benchmark_weights"]
        assert task.line("benchmark_weights").weights == [list(one.values())[place] for one in chosen]


@pytest.mark.slow
def test_the_overview_and_the_conclusions_follow_from_the_tables(script, settings, smoke):
    folder, _ = smoke
    tasks, _ = script.evidence(settings, "smoke", folder)
    text = evidence.as_markdown(tasks)
    names = ["mixture/word_problems", "mixture/multiple_choice", "word_problems"]
    assert f"|  | {' | '.join(names)} |" in text
    points = 100 * tasks[-1].line("literal").against.difference
    (row,) = [line for line in text.splitlines() if line.startswith("| `literal` − `default` |")]
    assert row.strip("| *").endswith(f"{points:+.1f}")
    assert f"`default` is not distinguishable on {len(tasks)} of {len(tasks)} tables" in text
    for line, change in (("better", 0.3), ("worse", -0.3)):  # as if a control had come out so on every row
        control = tasks[-1].line("two Pilots averaged")
        seen = {key: 0.5 for key in tasks[-1].lines[0].scores}
        control.against = compare(list(seen.values()), [value + change for value in seen.values()])
        assert f"Two Pilots averaged: {line} on 1" in evidence.conclusions(tasks[-1:])
    ahead = tasks[-1].line("token_gate")
    ahead.ahead = list(ahead.seeds)
    assert "most tables: `token_gate` (1 of 1 tables)" in evidence.conclusions(tasks[-1:])


@pytest.mark.slow
def test_the_page_keeps_what_stands_around_the_tables(script, settings, smoke, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):
        script.write_page(settings, "smoke", smoke[0], page)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| default |") == 3
    assert "Not run, or not finished: smoke/builtin/word_problems/offline (seed 1)." in text
    brief = [line for line in text.partition(evidence.BEGIN)[0].splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in brief} == {len(evidence.BRIEF_HEAD) + 1}
    assert [line.split(":")[0] for line in brief[2:]] == ["| cpu, other", *3 * ["| smoke, builtin"]]
    assert text.count(OTHER) == 1
    overview, *tables = text.split("### ")[1:]
    for part, columns in ((overview, 1 + len(tables)), *((table, len(evidence.HEAD)) for table in tables)):
        assert {line.count("|") for line in part.splitlines() if line.startswith("| ")} == {columns + 1}
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no"):
        script.write_page(settings, "smoke", smoke[0], page)


class Program:
    """Stands in for a process of train.py that ends at once."""

    started: ClassVar[list[list[str]]] = []
    returncode = 0

    def __init__(self, command, **options):
        self.started.append(command[2:])

    def wait(self, timeout=None):
        """It is over."""


@pytest.mark.slow
def test_finished_runs_are_not_run_again_and_a_stopped_one_goes_on(script, smoke, tmp_path, monkeypatch, capsys):
    folder, jobs = smoke
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    jobs[-1].notes.start()
    composed.train(jobs[-1].folder, *jobs[-1].overrides, *TINY)  # with a checkpoint, but not noted as finished
    monkeypatch.setattr(job_runner.subprocess, "Popen", Program)
    given = ["smoke", "--folder", str(folder), "--page", str(page)]
    capsys.readouterr()
    assert script.main([*given, "--list"]) == 0
    *done, left = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert (set(done), left) == ({"done"}, "started")
    for _ in range(2):
        assert script.main(given) == 0
    assert Program.started == [[f"resume={jobs[-1].folder}"]]
    assert "12 finished, 0 stopped, 0 failed of 12" in capsys.readouterr().out
    assert "Not run" not in page.read_text()
    new = replace(jobs[0], folder=tmp_path / "new")
    assert new.run() == "finished"
    assert Program.started[1:] == [[*new.overrides, f"paths.run_dir={new.folder}"]]
    with pytest.raises(ConfigError, match=r"another config: .*overrides=.* there, \['seed=9'\] now"):
        replace(new, overrides=("seed=9",)).notes.state()
    other = replace(jobs[0], overrides=("seed=9",))
    monkeypatch.setattr(script, "grid", lambda *_: [other])
    with pytest.raises(SystemExit, match="another config"):
        script.main(given)
    for code, outcome in ((job_runner.STOPPED, "stopped"), (1, "failed")):
        monkeypatch.setattr(Program, "returncode", code)
        assert replace(jobs[0], folder=tmp_path / outcome).run() == outcome
    assert not RunDirectory(tmp_path / "stopped").failed.exists()
    assert "exit status 1" in RunDirectory(tmp_path / "failed").failed.read_text()


def test_a_call_whose_time_is_over_starts_nothing(script, settings, tmp_path):
    job = next(script.grid(settings["presets"]["smoke"], settings["arms"], ["builtin"], tmp_path / "new", {}))
    assert job.run(deadline=0.0) == "stopped"
    assert not job.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu", "gpu")), "smoke"])
def test_every_run_of_the_grid_composes(script, settings, tmp_path, preset):
    about = settings["presets"][preset]
    places = {"{pilots}": str(tmp_path), "{data}": str(tmp_path)}
    jobs = list(
        script.grid({**about, "seeds": [0]}, settings["arms"], list(about["parts"]), tmp_path / "[a], b", places)
    )
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        if job.program == "eval.py":
            cfg = composed.compose_config(*job.overrides, name="eval")
            assert cfg.run.endswith("default/0")
            assert cfg.fusion.per in PER or cfg.evaluation.modes == ["reranking"]
            continue
        cfg = composed.compose_config(*job.overrides, "trainer=cpu")
        problems = [text for text in config_problems(cfg) if "CUDA" not in text]
        assert problems == [], job.folder


def test_what_cannot_run_is_said_before_anything_does(script, capsys):
    for given, said in (
        (["cpu", "--parts", "imaginary"], "builtin, real"),
        (["cpu", "--parts", "real"], "--pilots, --data"),
    ):
        with pytest.raises(SystemExit):
            script.main(given)
        assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_as_a_user_runs_it(smoke, tmp_path):
    """Of each program one job is left: an evaluation, and a training on an export; the fixture has done all others."""
    folder, jobs = smoke
    left = [
        job for job in jobs if (job.task, job.seed) == ("word_problems", 1) and job.arm in ("token_gate", "offline")
    ]
    assert [job.program for job in left] == ["eval.py", "train.py"]
    for job in left:
        shutil.rmtree(job.folder, ignore_errors=True)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    given = ["scripts/evidence.py", "smoke", "--folder", str(folder), "--page", str(page)]
    done = composed.forked(*given, timeout=800)  # its jobs begin new interpreters
    assert done.returncode == 0, done.stderr
    assert "12 finished" in done.stdout
    assert all(composed.results(job.folder)["gain"] for job in left)
    assert "| two Pilots averaged |" in page.read_text()
