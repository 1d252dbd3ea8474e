"""`make gpu`: a visit keeps what it has found, whatever happens to it, and its dry run passes."""

import json
import subprocess

import composed
import pytest

FOLDER = composed.ROOT / "performance"
REAL_RUN = subprocess.run
SCRIPTS = {
    "good": "import json, sys; json.dump({'cases': []}, open(sys.argv[-1], 'w')); print('done')",
    "bad": "raise SystemExit('it broke')",
    "endless": "import time; print('begun', flush=True); time.sleep(60)",
}


@pytest.fixture
def script(monkeypatch):
    """performance/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@pytest.fixture
def gpu(script, monkeypatch, tmp_path):
    """The same with steps that take no time."""
    gpu = script
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    steps = [gpu.Step(name, 1, [f"{name}.py"], [str(tmp_path / f"{name}.py")]) for name in SCRIPTS]
    monkeypatch.setattr(gpu, "STEPS", [*steps, gpu.Step("large", 1, ["large.py"])])
    monkeypatch.setattr(gpu, "SLOWER", 2)
    return gpu


def visited(gpu, monkeypatch, out, *options):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--out", str(out), *options])
    failed = gpu.main()
    return failed, json.loads((out / "visit.json").read_text())["steps"]


def test_every_step_leaves_its_state_and_output_and_one_that_passed_is_not_run_again(gpu, monkeypatch, tmp_path):
    out = tmp_path / "out"
    failed, steps = visited(gpu, monkeypatch, out)
    assert {name: step["state"] for name, step in steps.items()} == {
        "good": "passed", "bad": "failed", "endless": "out of time", "large": "needs a GPU",
    }  # fmt: skip
    assert failed == 2
    assert "it broke" in steps["bad"]["tail"]
    assert "begun" in steps["endless"]["tail"]
    assert json.loads((out / "good.json").read_text()) == {"cases": []}
    (tmp_path / "bad.py").write_text(SCRIPTS["good"])
    (tmp_path / "good.py").unlink()
    failed, steps = visited(gpu, monkeypatch, out, "--only", "good", "bad")
    assert (failed, steps["good"]["state"], steps["bad"]["state"]) == (1, "passed", "passed")


def test_what_the_visit_has_no_time_for_is_not_begun(gpu, monkeypatch, tmp_path):
    _, steps = visited(gpu, monkeypatch, tmp_path / "out", "--minutes", "0.1", "--only", "good")
    assert steps == {"good": {"state": "not begun"}}


def test_figures_of_a_gpu_join_the_page(gpu, monkeypatch, tmp_path):
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("<!-- gpu_round_t5 -->\n<!-- /gpu_round_t5 -->\n<!-- gpu_device -->\n<!-- /gpu_device -->\n")
    found.write_text('{"round": []}')
    monkeypatch.setattr(gpu, "PAGE", page)
    monkeypatch.setattr(gpu, "FOUND", found)
    monkeypatch.setattr(gpu, "STEPS", [gpu.Step("gpu_round_t5", 1, ["round.py"])])
    row = {"pilot": "t5", "copilot": "12 layers", "source": 150, "target": 10, "ratio": 1.04, "floor": 1.0}
    (tmp_path / "gpu_round_t5.json").write_text(json.dumps([{**row, "overhead": 1.04, "trainer": 0.98}]))
    gpu.publish({"machine": {"device": "some card", "torch": "2.11", "transformers": "5.17"}}, tmp_path)
    assert "| t5 | 12 layers | 150 | 10 | 1.04 | 1.00 | 1.04 | 0.98 |" in page.read_text()
    assert "some card, torch 2.11, transformers 5.17" in page.read_text()
    assert json.loads(found.read_text()).keys() == {"round", "gpu_round_t5", "gpu"}


def forked(command, timeout, env, stdout, **options):
    """A measurement in a process that has done its imports; pytest begins a new interpreter."""
    if command[1] == "-m":
        return REAL_RUN(command, timeout=timeout, env=env, stdout=stdout, **options)
    done = composed.start(*command[1:], PYTHONPATH=env["PYTHONPATH"]).wait(timeout)
    stdout.write(done.stdout + done.stderr)
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_dry_run_passes_every_step(script, monkeypatch, tmp_path):
    """But for the one that only collects the tests that need a GPU, as the suite does whenever it runs."""
    (collects, *others) = script.STEPS
    assert collects.on_cpu == [*collects.on_gpu, "--collect-only"]
    monkeypatch.setattr(script.subprocess, "run", forked)
    failed, steps = visited(
        script, monkeypatch, tmp_path, "--minutes", "14", "--only", *(step.name for step in others)
    )
    assert failed == 0, [step for step in steps.values() if step["state"] == "failed"]
    assert {step["state"] for step in steps.values()} == {"passed", "needs a GPU"}
    assert steps.keys() == {step.name for step in others}
    for name in ("gpu_round_llama", "gpu_round_t5"):
        assert all(row["ratio"] > 0 for row in json.loads((tmp_path / f"{name}.json").read_text()))
    assert len(json.loads((tmp_path / "gpu_decode_t5.json").read_text())["cases"]) == 2
