"""Sweeps: a folder and `done.json` per job, jobs done once and failing alone, launchers and Optuna."""

import contextlib
import importlib.util
import json
import os
import pickle
import random
import re
import shlex
import shutil
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import composed
import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from tcopilot.app import joint, run, sweep
from tcopilot.app.jobs import STOPPED
from tcopilot.evaluation.results import Gain, Results, Row
from tcopilot.training.checkpoints import checkpoints

SHORT = [*composed.SMALL, "fusion.weight=[0,1]", "trainer.enable_progress_bar=false", "~callbacks.progress"]
DOCS = composed.ROOT / "docs" / "sweeps.md"
LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}


def installed(package: str) -> bool:
    """Whether a plugin of the groups `cluster` and `sweep` is here."""
    return bool(importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{package}"))


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(f"hydra_{package}"), reason=f"hydra_{package} is not installed")


def with_hydra(*overrides: str, name: str = "train") -> DictConfig:
    return pickle.loads(_with_hydra(*overrides, name=name))


@cache
def _with_hydra(*overrides: str, name: str) -> bytes:
    return pickle.dumps(composed.compose_whole(*overrides, name=name, with_hydra=True))


@contextlib.contextmanager
def job(folder: Path, *overrides: str):
    """A job of a sweep as Hydra's launchers start it, in this process; yields its config."""
    cfg = with_hydra(*SHORT, *overrides, "hydra.mode=MULTIRUN")
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir, cfg.hydra.job.num, cfg.hydra.job.id = str(folder), 0, "0"
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        task = cfg.copy()
        with open_dict(task):
            del task["hydra"]
            task.paths.run_dir = str(folder)
        with initialize_config_dir(str(composed.CONFIGS), version_base="1.3"):
            yield task
    finally:
        HydraConfig.instance().cfg = before


def train(folder: Path, *overrides: str) -> float | None:
    with job(folder, *overrides) as cfg:
        return run.train(cfg)


def failure(folder: Path) -> str:
    return json.loads((folder / "failed.json").read_text())["error"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Folders named by the time are made where nobody minds; programs that are forked estimate no memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "budget", lambda *_: None)


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """One entry for each training."""
    started, fit = [], joint._fit
    monkeypatch.setattr(joint, "_fit", lambda *args: (started.append(1), fit(*args))[1])
    return started


# As a user starts it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> SimpleNamespace:
    """Two jobs, the first of them impossible; then the same sweep again with a third."""
    folder = tmp_path_factory.mktemp("sweep") / "jobs"
    with composed.without_estimate():
        given = ["train.py", "-m", *SHORT, "rounds=2", f"hydra.sweep.dir={folder}"]
        first = composed.forked(*given, "copilot.layers=99,0.5")
        times = {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")}
        again = composed.forked(*given, "copilot.layers=99,0.5,2")
    return SimpleNamespace(folder=folder, first=first, again=again, times=times)


@pytest.mark.slow
def test_a_failing_job_stops_no_other_and_the_sweep_ends_with_status_1(swept):
    assert swept.first.returncode == 1
    assert {path.parent.name for path in swept.times} == {"copilot.layers-0.5"}
    assert "copilot.layers=99: the t5 decoder of pilot has 2 layers" in failure(swept.folder / "copilot.layers-99")
    assert "Traceback" not in swept.first.stderr
    assert f"1 job failed:\n  - {swept.folder}/copilot.layers-99: 1 problem" in swept.first.stderr
    assert f"hydra.sweep.dir={swept.folder}" in swept.first.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["0.5", "2"])
def test_every_job_has_a_complete_folder_named_by_what_is_swept(swept, layers):
    folder = swept.folder / f"copilot.layers-{layers}"
    for name in ("config.yaml", "metrics.csv", "results.json", "predictions", "export/config.json"):
        assert (folder / name).exists(), name
    assert not (folder / "failed.json").exists()
    done = json.loads((folder / "done.json").read_text())
    assert set(done) == {"config", "gain", "time"}
    assert done["gain"] == sweep.validation_gain(Results.load(folder / "results.json"))
    assert OmegaConf.load(folder / "config.yaml").copilot.layers == float(layers)


@pytest.mark.slow
def test_a_sweep_started_again_trains_only_what_is_missing(swept):
    assert swept.again.returncode == 1  # one job still fails
    assert {path: path.stat().st_mtime_ns for path in swept.times} == swept.times
    for path in swept.times:
        assert f"done before: {path.parent} (gain on validation" in swept.again.stdout
    trained = re.findall(r"^results: .*/copilot\.layers-(.*)/results\.json$", swept.again.stdout, re.MULTILINE)
    assert trained == ["2"]


@pytest.mark.slow
def test_a_sweep_on_two_devices_is_refused_with_the_commands_to_use(tmp_path):
    two = ["trainer=two_ranks"]
    done = composed.forked("train.py", "-m", *two, "seed=0,1", "data.path=a b", f"hydra.sweep.dir={tmp_path}/jobs")
    assert done.returncode == 1
    assert not (tmp_path / "jobs").exists()
    for line in (
        "python train.py trainer=two_ranks seed=0 'data.path=a b'",
        "python train.py trainer=two_ranks seed=1 'data.path=a b'",
        "python train.py -m trainer=two_ranks seed=0,1 'data.path=a b' launcher=submitit_slurm "
        "hydra.launcher.tasks_per_node=2",
    ):
        assert f"      {line}\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_and_starting_it_again_goes_on(tmp_path):
    stop = ["+callbacks.interrupt._target_=composed.InterruptAfter", "+callbacks.interrupt.rounds=2"]
    command = ["train.py", "-m", *SHORT, *stop, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    folders = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    for finished, started in ((0, 1), (1, 2)):  # every start ends in the second round of the next job
        left = composed.forked(*command)
        assert left.returncode == STOPPED, left.stderr
        assert f"hydra.sweep.dir={tmp_path}" in left.stderr
        assert [(folder / "done.json").exists() for folder in folders] == [finished > 0, False]
        assert [folder.exists() for folder in folders] == [True, started > 1]
    assert composed.forked(*command).returncode == 0
    assert [composed.results(folder)["rounds"] for folder in folders] == [4, 4]


@pytest.mark.slow
def test_evaluations_are_swept_too(tmp_path):
    source = composed.train(tmp_path / "run", *composed.SMALL, "fusion.weight=[0,1]")
    given = [f"run={source},/no/such/run", "fusion.weight=[0,0.5]", f"hydra.sweep.dir={tmp_path}/jobs"]
    done = composed.forked("eval.py", "-m", *given)
    assert done.returncode == 1
    (found,) = (tmp_path / "jobs").glob("*/done.json")
    (failed,) = (tmp_path / "jobs").glob("*/failed.json")
    assert "no export/config.json there" in failure(failed.parent)
    assert f"done before: {found.parent}" in composed.forked("eval.py", "-m", *given).stdout


# One job -------------------------------------------------------------------------------------------------------------


def test_five_values_of_the_weight_cost_one_training(tmp_path, fits):
    train(tmp_path, "fusion.weight=[0,0.3,0.5,1,2]")
    assert len(fits) == 1
    assert {row["weight"] for row in composed.results(tmp_path)["rows"]} == {0.0, 0.3, 0.5, 1.0, 2.0}
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1


@pytest.fixture(scope="module")
def finished_job(tmp_path_factory) -> SimpleNamespace:
    """The folder of a job that is done, to be copied, and the gain that it gave."""
    folder = tmp_path_factory.mktemp("job") / "done"
    with composed.without_estimate():
        return SimpleNamespace(folder=folder, gain=train(folder))


@pytest.fixture
def done_before(finished_job, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished_job.folder, tmp_path, dirs_exist_ok=True))


def test_a_job_done_before_gives_its_gain_without_training(done_before, finished_job, tmp_path, fits, capsys):
    again = train(tmp_path, "logger=[]", "traceback=true")  # neither changes what a job finds
    assert again == finished_job.gain
    assert fits == []
    assert f"done before: {tmp_path}" in capsys.readouterr().out


def test_another_config_in_the_folder_of_a_job_is_refused_and_both_are_named(done_before, tmp_path, fits):
    before = json.loads((tmp_path / "done.json").read_text())["config"]
    assert train(tmp_path, "rounds=3", "copilot=half") is None
    assert fits == []
    said = failure(tmp_path)
    for part in (str(tmp_path), f"{before} there", "rounds=4 there, 3 now", "copilot.layers=None there, 0.5 now"):
        assert part in said
    assert json.loads((tmp_path / "done.json").read_text())["config"] == before


@pytest.mark.slow
def test_a_job_that_was_left_goes_on_from_its_newest_checkpoint(tmp_path, monkeypatch, caplog):
    stop = ["+callbacks.interrupt._target_=composed.InterruptAfter", "+callbacks.interrupt.rounds=2"]
    with pytest.raises(SystemExit) as left:
        train(tmp_path, *stop)
    assert left.value.code == STOPPED
    assert not (tmp_path / "done.json").exists()
    starts, newest = [], joint._newest_checkpoint
    monkeypatch.setattr(joint, "_newest_checkpoint", lambda *args: (starts.append(newest(*args)), starts[-1])[1])
    state = checkpoints(tmp_path / "checkpoints")[-1]
    assert train(tmp_path, *stop) is not None
    assert [Path(start) for start in starts] == [state]
    assert composed.results(tmp_path)["rounds"] == 4
    assert (tmp_path / "done.json").exists()
    assert "not used" not in caplog.text  # the config is the same one


@pytest.mark.slow
def test_checkpoints_of_another_config_are_not_mixed_with_new_ones(done_before, tmp_path):
    (tmp_path / "done.json").unlink()
    kept = checkpoints(tmp_path / "checkpoints")
    assert train(tmp_path, "seed=5") is None
    assert "seed=0 there, 5 now" in failure(tmp_path)
    assert checkpoints(tmp_path / "checkpoints") == kept
    (tmp_path / "job.yaml").unlink()
    assert train(tmp_path) is None
    assert "remove that folder" in failure(tmp_path)


@pytest.mark.slow
def test_a_folder_that_holds_only_a_failure_is_used_anew(tmp_path, fits):
    assert train(tmp_path, "copilot.layers=99") is None
    assert fits == []
    assert train(tmp_path, "copilot.layers=1") is not None
    assert not (tmp_path / "failed.json").exists()


@pytest.mark.slow
def test_an_error_that_no_message_explains_is_noted_with_its_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(joint, "_fit", lambda *_: 1 / 0)
    assert train(tmp_path) is None
    assert failure(tmp_path) == "ZeroDivisionError: division by zero"
    assert "in _train" in json.loads((tmp_path / "failed.json").read_text())["traceback"]
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "done.json").exists()


@pytest.mark.slow
def test_nothing_of_a_failed_job_reaches_the_next(tmp_path, monkeypatch):
    def spoil(*_):
        os.environ["TCOPILOT_LEFT_OVER"] = os.environ["PATH"] = "spoilt"
        warnings.simplefilter("error")
        torch.use_deterministic_algorithms(True)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(99)
        raise RuntimeError("spoilt")

    def state():
        draws = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        return dict(os.environ), list(warnings.filters), torch.are_deterministic_algorithms_enabled(), draws

    monkeypatch.setattr(joint, "_fit", spoil)
    before = state()
    assert train(tmp_path) is None
    assert state() == before


def test_outside_a_sweep_errors_end_the_program_and_nothing_is_noted(tmp_path):
    cfg = composed.compose_config(*SHORT, "copilot.layers=99", f"paths.run_dir={tmp_path}")
    with pytest.raises(SystemExit) as left:
        run.train(cfg)
    assert left.value.code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_gain_that_sweepers_see_is_of_the_rows_that_the_weight_was_chosen_on():
    rows = [
        Row("a", split, metric, weight, value, 10, (0.0, 1.0), metric == "accuracy")
        for split, metric, weight, value in (
            ("validation", "accuracy", 0.0, 0.25), ("validation", "accuracy", 1.0, 0.75),
            ("test", "accuracy", 0.0, 0.1), ("test", "accuracy", 1.0, 1.0),
            ("validation", "perplexity", 0.0, 3.0), ("validation", "perplexity", 1.0, 2.5),
        )
    ]  # fmt: skip

    def gain(metric):
        return [Gain("a", metric, 0.1, 1.0, 0.9, (0.0, 1.0), 9, 0, 0.01, metric == "accuracy")]

    shared = {"seed": 0, "git": "", "config": "", "params": {}, "rounds": 1, "train_seconds": 1.0, "rows": rows}
    for metric in ("accuracy", "perplexity"):
        found = Results(selected_weight=1.0, selected_on="validation", reported_on="test", gain=gain(metric), **shared)
        assert sweep.validation_gain(found) == 0.5


# Names and refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        "experiment-paper/base",
        "data.path-../../etc",
        "a-..",
        "..",
        "/",
        "fusion.weight-[0,1]",
        "a-λ",
        "a-" + "b" * 500,
    ],
)
def test_a_folder_stays_inside_the_sweep_and_needs_no_quotes(overrides):
    name = sweep.job_folder(overrides)
    assert re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", name)
    assert name not in (".", "..")
    assert len(name) <= 110
    assert name == sweep.job_folder(overrides) != sweep.job_folder(overrides.replace("/", "_") + "x")


def test_names_that_differ_only_in_what_is_replaced_stay_apart():
    assert sweep.job_folder("experiment-a/b") != sweep.job_folder("experiment-a_b")


def multirun(*overrides: str, name: str = "train") -> DictConfig:
    """The config of a whole sweep, as Hydra gives it to callbacks."""
    cfg = with_hydra(*(text for text in overrides if "," not in text), name=name)
    with open_dict(cfg):
        cfg.hydra.overrides.task = list(overrides)
    return cfg


@pytest.mark.slow
def test_jobs_of_different_names_share_the_folder_of_their_sweep():
    cfg = multirun("experiment=demo,demo_decoder_only")
    sweep.SweepCallback().on_multirun_start(cfg)
    found = with_hydra("experiment=demo_decoder_only", *cfg.hydra.overrides.hydra)
    assert found.name != cfg.name
    assert found.hydra.sweep.dir == cfg.hydra.sweep.dir
    again = multirun("experiment=demo,demo_decoder_only")
    with open_dict(again):
        again.hydra.sweep.dir = cfg.hydra.sweep.dir.replace("runs", "${now:r}uns")  # in the same second
    sweep.SweepCallback().on_multirun_start(again)
    assert again.hydra.sweep.dir == f"{cfg.hydra.sweep.dir}_2"
    assert again.hydra.overrides.hydra[0] == f"hydra.sweep.dir='{again.hydra.sweep.dir}'"
    given = multirun("experiment=demo,demo_decoder_only", "hydra.sweep.dir=/jobs")
    with open_dict(given):
        given.hydra.overrides.hydra = ["hydra.sweep.dir=/jobs"]
    sweep.SweepCallback().on_multirun_start(given)
    assert [text for text in given.hydra.overrides.hydra if text.startswith("hydra.sweep.dir")] == [
        "hydra.sweep.dir=/jobs"
    ]


def test_folders_are_named_by_what_is_swept():
    given = ["rounds=4", "adapter@pilot.adapter=lora", "adapter@copilot.adapter=lora,none", "seed=0,1"]
    cfg = multirun(*given)
    sweep.SweepCallback().on_multirun_start(cfg)
    assert cfg.hydra.overrides.hydra[-1] == "hydra.job.config.override_dirname.exclude_keys=['rounds']"
    shared = ["rounds=4", "adapter@pilot.adapter=lora", "adapter@copilot.adapter=none", "seed=0"]
    found = with_hydra(*shared, cfg.hydra.overrides.hydra[-1])
    assert found.hydra.sweep.subdir.startswith("adapter_copilot.adapter-none__adapter_pilot.adapter-lora__seed-0-")


@pytest.mark.parametrize("values", ["0.3,0.5", "choice(0.3,0.5)", "[0,1],auto"])
def test_the_weight_is_not_swept_by_training_again(values, capsys):
    with pytest.raises(SystemExit):
        sweep.SweepCallback().on_multirun_start(multirun(f"fusion.weight={values}"))
    assert f"fusion.weight={values}: every value would train the same models again" in capsys.readouterr().err
    cfg = multirun("run=x", f"fusion.weight={values}", name="eval")
    assert sweep.sweep_problems(cfg, cfg.hydra) == []  # evaluations do not train


def test_devices_that_only_a_job_asks_for_are_refused_there(tmp_path, fits):
    assert train(tmp_path, "trainer=two_ranks") is None
    assert "trainer.devices=2 in a sweep with launcher=basic" in failure(tmp_path)
    assert fits == []


@needs("submitit_launcher")
@pytest.mark.parametrize(
    ("launcher", "tasks", "works"), [("slurm", 2, True), ("slurm", 1, False), ("local", 2, False)]
)
def test_slurm_starts_the_processes_of_a_job(launcher, tasks, works):
    given = ["trainer=two_ranks", f"launcher=submitit_{launcher}", f"hydra.launcher.tasks_per_node={tasks}"]
    cfg = multirun(*given)
    problems = sweep.sweep_problems(cfg, cfg.hydra)
    assert (problems == []) == works
    assert works or "hydra.launcher.tasks_per_node=2" in problems[0]
    assert works or ("Start one run per command" in problems[0]) == (launcher == "local")


# Launchers, sweepers, documentation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(n, marks=needs(f"{p}_launcher")) for n, p in LAUNCHERS.items())]
)
def test_every_launcher_composes(launcher):
    cfg = with_hydra(f"launcher={launcher}")
    assert cfg.hydra.runtime.choices["hydra/launcher"] == launcher
    assert OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert set(cfg.hydra.callbacks) == {"sweep"}


@pytest.mark.parametrize(
    ("name", "sweeper", "keys"),
    [
        ("default", "basic", set()),
        ("seeds", "basic", {"seed"}),
        pytest.param(
            "weight_optuna",
            "optuna",
            {"copilot.optimizer.lr", "copilot.steps_per_round", "mistake_log"},
            marks=needs("optuna_sweeper"),
        ),
    ],
)
def test_every_sweep_composes_and_trains_for_no_weight(name, sweeper, keys):
    cfg = with_hydra(f"sweep={name}")
    assert cfg.hydra.runtime.choices["hydra/sweeper"] == sweeper
    assert set(cfg.hydra.sweeper.params or {}) == keys
    assert sweep.sweep_problems(cfg, cfg.hydra) == []
    for key in keys - {"mistake_log"}:
        assert OmegaConf.select(cfg, key) is not None


def test_no_launcher_or_sweep_is_left_untested():
    names = {
        group: {path.stem for path in (composed.CONFIGS / group).glob("*.yaml")} for group in ("launcher", "sweep")
    }
    assert names == {"launcher": {"basic", *LAUNCHERS}, "sweep": {"default", "seeds", "weight_optuna"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=needs("joblib_launcher")),
        pytest.param("submitit_local", marks=needs("submitit_launcher")),
    ],
)
def test_jobs_in_processes_of_their_own_are_kept_like_any_other(launcher, tmp_path):
    given = ["train.py", "-m", *SHORT, "rounds=2", f"launcher={launcher}", f"hydra.sweep.dir={tmp_path}"]
    first = composed.program(*given, "copilot.layers=1,99")
    assert first.returncode == 1
    assert "1 job failed:" in first.stderr, first.stderr
    assert {path.parent.name for path in tmp_path.glob("*/done.json")} == {"copilot.layers-1"}
    assert "copilot.layers=99" in failure(tmp_path / "copilot.layers-99")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert composed.program(*given, "copilot.layers=1,99").returncode == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")} == times


@pytest.mark.slow
@needs("optuna_sweeper")
def test_optuna_maximises_the_gain_and_a_study_started_again_repeats_no_trial(tmp_path):
    space = ["sweep=weight_optuna", "copilot.layers=choice(1,2,99)"]
    given = [*SHORT, "rounds=2", *space, f"hydra.sweep.dir={tmp_path}"]
    first = composed.forked("train.py", *given, "hydra.sweeper.n_trials=4")
    assert first.returncode == 1, first.stderr  # 99 layers fail, the study goes on
    gains = {path.parent.name: json.loads(path.read_text())["gain"] for path in tmp_path.glob("*/done.json")}
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == max(gains.values())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    again = composed.forked("train.py", *given, "hydra.sweeper.n_trials=5")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "Traceback" not in again.stderr


def commands() -> list[list[str]]:
    """Overrides of every `train.py` command in the documentation."""
    lines = DOCS.read_text().replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python train.py")]
    return [[re.sub(r"<[^>]*>", "x", part) for part in parts if part != "-m"] for parts in found]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", commands(), ids=" ".join)
def test_every_documented_command_composes(overrides):
    packages = {"launcher=joblib": "joblib_launcher", "sweep=weight_optuna": "optuna_sweeper"}
    for part in overrides:
        package = "submitit_launcher" if part.startswith("launcher=submitit") else packages.get(part)
        if package and not installed(f"hydra_{package}"):
            pytest.skip(f"hydra_{package} is not installed")
    parsed = OverridesParser.create().parse_overrides(overrides)
    first = [f"{o.get_key_element()}={next(o.sweep_string_iterator())}" for o in parsed if o.is_sweep_override()]
    cfg = with_hydra(*(o.input_line for o in parsed if not o.is_sweep_override()), *first)
    assert sweep.sweep_problems(cfg, cfg.hydra) == []
