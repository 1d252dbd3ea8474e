"""A run directory belongs to one program at a time, wherever it lies and whatever happens to it meanwhile."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import composed
import pytest
from filelock import Timeout
from lightning import Callback
from omegaconf import OmegaConf

from tcopilot.app import build
from tcopilot.app.checks.config import config_problems
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.failures import what_happened
from tcopilot.app.jobs import STOPPED
from tcopilot.app.sweep import new_folder
from tcopilot.processes import address_problem
from tcopilot.run_directory import RunDirectory

SHORT = [*composed.SMALL, "fusion.weight=[0,1]"]
CLOCKS = ("time/", "speed/", "memory/")


def stop_at(*rounds: int) -> list[str]:
    return ["+callbacks.interrupt._target_=composed.InterruptAfter", f"+callbacks.interrupt.rounds={list(rounds)}"]


def stop(folder: Path, *overrides: str) -> Path:
    """A run that is stopped by Ctrl-C, or goes on until it is stopped again."""
    with pytest.raises(SystemExit) as left:
        composed.train(folder, *overrides) if overrides else composed.resume(folder)
    assert left.value.code == STOPPED
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files but those in which wandb's own process notes what it does, also after a run has ended."""
    notes = {"debug-core.log", "debug-internal.log"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in notes)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def figures(folder: Path) -> list[dict[str, str]]:
    """The lines of `metrics.csv` without what clocks and memory say."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in line.items() if value and not key.startswith(CLOCKS)}
            for line in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped after its second round; to be copied, not to be touched."""
    given = ["logger=wandb", "mistake_log.log.capacity_rounds=2"]
    return stop(tmp_path_factory.mktemp("stopped") / "run", *SHORT, *given, *stop_at(2))


# Copied and moved runs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resuming_a_copy_leaves_the_original_as_it_was(stopped, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    before = content(stopped)
    monkeypatch.chdir(tmp_path)
    composed.resume(Path("copy"))
    assert content(stopped) == before
    assert composed.results(copy)["rounds"] == 4
    assert {path.name for path in (copy / "checkpoints").iterdir()} >= {"round=4"}
    assert [line["round"] for line in figures(copy) if "train/pilot_loss" in line] == ["1.0", "2.0", "3.0", "4.0"]
    ids = [json.loads((folder / "wandb.json").read_text())["id"] for folder in (stopped, copy)]
    assert ids[0] != ids[1]  # curves of its own


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_where_it_lies_now(stopped, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(stopped, first)
    identity = json.loads((first / "wandb.json").read_text()) | {"folder": str(first)}
    (first / "wandb.json").write_text(json.dumps(identity))
    first.rename(moved)
    composed.resume(moved)
    assert not first.exists()
    assert composed.results(moved)["rounds"] == 4
    assert json.loads((moved / "wandb.json").read_text()) == identity | {"folder": str(moved)}


def test_a_saved_config_names_its_own_folder_nowhere_and_others_in_full(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    given = ["data.path=rows", "pilot.path=org/model", "mistake_log.from=rows", f"paths.run_dir={run}", "name=run"]
    cfg = composed.compose_config(*SHORT, *given)
    OmegaConf.update(cfg, "version", composed.run.__version__, force_add=True)
    (run / "config.yaml").write_text(build.saved_config(cfg))
    saved = OmegaConf.load(run / "config.yaml")
    assert str(run) not in (run / "config.yaml").read_text()
    assert (saved.data.path, saved.pilot.path, saved.name) == (str(tmp_path / "rows"), "org/model", "run")
    assert saved.mistake_log["from"] == str(tmp_path / "rows")
    shutil.move(run, tmp_path / "elsewhere")
    read = build.read_config(Path("elsewhere/config.yaml"), "run")
    assert read.callbacks.checkpoint.folder == f"{tmp_path}/elsewhere/checkpoints"
    assert read.logger.csv.save_dir == read.paths.run_dir == f"{tmp_path}/elsewhere"


def test_states_that_resume_would_not_find_are_refused(tmp_path):
    given = [f"paths.run_dir={tmp_path}", f"callbacks.checkpoint.folder={tmp_path}/elsewhere"]
    (problem,) = config_problems(composed.compose_config(*given))
    assert f"callbacks.checkpoint.folder={tmp_path}/elsewhere: resume= looks for states in {tmp_path}/check" in problem


# One program at a time -----------------------------------------------------------------------------------------------


@pytest.fixture
def held(stopped, tmp_path, monkeypatch):
    """A stopped run, another program holding its folder."""
    monkeypatch.setattr("tcopilot.run_directory.SECONDS_TO_END", 0.1)
    folder = tmp_path / "held"
    shutil.copytree(stopped, folder)
    code = (
        "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()"
    )
    lock = str(folder / RunDirectory.lock.name)
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline() == "held\n"
    yield folder
    other.kill()
    other.communicate()
    with RunDirectory(folder).locked():  # a process that was killed holds nothing
        pass


def test_a_run_that_is_going_on_is_not_resumed_a_second_time(held):
    before = content(held)
    with pytest.raises(ConfigError, match="another program is writing there; wait until it has ended"):
        composed.resume(held)
    assert content(held) == before
    with pytest.raises(Timeout), RunDirectory(held).locked():
        pass


def test_a_run_is_not_started_where_another_one_is(held):
    shutil.rmtree(held / "checkpoints")
    before = content(held)
    with pytest.raises(ConfigError, match="another program is writing there"):
        composed.train(held, *SHORT, "seed=3")
    assert content(held) == before


def test_an_evaluation_does_not_write_into_a_training_run(stopped, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        shutil.copytree(stopped, folder)
        (folder / "export").mkdir()
        (folder / "export" / "config.json").write_text("{}")
    shutil.rmtree(run / "checkpoints")  # callbacks.checkpoint=null
    before = content(run), content(other)
    for folder in (run, other):
        with pytest.raises(ConfigError, match="holds the checkpoints or export of an earlier run; choose another"):
            composed.evaluate(run, folder)
    with pytest.raises(ConfigError, match="continue it with resume="):
        composed.train(run, *SHORT)
    assert (content(run), content(other)) == before


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    made = [new_folder(f"{tmp_path}/runs/12-00-00") for _ in range(3)]
    assert made == [f"{tmp_path}/runs/12-00-00{suffix}" for suffix in ("", "_2", "_3")]
    (tmp_path / "file").touch()
    assert new_folder(f"{tmp_path}/file/run") == f"{tmp_path}/file/run"  # the check of the folder says why


@pytest.mark.slow
def test_two_runs_that_are_started_in_the_same_second_do_not_meet(tmp_path):
    given = [*SHORT, "seed=1"], [*SHORT, "seed=2"]
    with composed.without_estimate():
        started = [composed.start("train.py", *overrides, f"name={tmp_path.name}") for overrides in given]
    done = [process.wait(250) for process in started]
    folders = [Path(process.stdout.strip().splitlines()[-1].removeprefix("results: ")).parent for process in done]
    try:
        assert len(set(folders)) == 2
        assert [composed.results(folder)["seed"] for folder in folders] == [1, 2]
        assert [OmegaConf.load(folder / "config.yaml").seed for folder in folders] == [1, 2]
    finally:
        shutil.rmtree(folders[0].parent)


# Metrics over stops --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clean_stops_lose_no_line_of_the_metrics(tmp_path):
    given = [*SHORT, "rounds=10", "trainer.val_check_interval=3"]
    whole = composed.train(tmp_path / "whole", *given)
    folder = stop(tmp_path / "stopped", *given, *stop_at(3, 6, 9))
    for _ in range(2):
        stop(folder)
    composed.resume(folder)
    assert figures(folder) == figures(whole)
    steps = [int(line["step"]) for line in figures(folder) if "train/pilot_loss" in line]
    assert steps == list(range(10))


# What happens around a run -------------------------------------------------------------------------------------------


class Disturb(Callback):
    """Does something to the run's folder, or to the program, at the start of its third round."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer, pl_module, *args):
        if pl_module.round != 2:
            return
        if self.what == "remove":
            shutil.rmtree(trainer.default_root_dir)
        elif self.what == "interrupt twice":
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        elif self.what == "fail in a worker":
            said = (
                "Caught ValueError in DataLoader worker process 0.",
                "Original Traceback (most recent",
                "ValueError: 7",
            )
            raise ValueError("\n".join(said))
        else:
            raise OSError(28, os.strerror(28), f"{trainer.default_root_dir}/metrics.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("remove", "was removed while the run was"),
        (
            "full",
            "No space left on device: '{run}/metrics.csv'. Free some space there, or make it writable; then go on",
        ),
        ("interrupt twice", "stopped; states and predictions written so far are in {run}. To continue, go on with: "),
        (
            "fail in a worker",
            "data failed: Caught ValueError in DataLoader worker process 0. ValueError: 7. If shared",
        ),
    ],
)
def test_what_happens_around_a_run_is_told_with_the_way_on(what, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(composed, "Disturb", Disturb, raising=False)
    given = ["+callbacks.disturb._target_=composed.Disturb", f"+callbacks.disturb.what={what}"]
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        composed.train(run, *SHORT, *given, "callbacks.checkpoint.every_n_rounds=1", "traceback=false")
    assert left.value.code == (STOPPED if what == "interrupt twice" else 1)
    found = capsys.readouterr().err
    assert said.format(run=run) in found
    assert "Traceback (most" not in found
    assert what == "remove" or f"python train.py resume={run}" in found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(30, os.strerror(30), "export/model.safetensors"), "Read-only file system"),
        (PermissionError(13, os.strerror(13), "results.json"), "Permission denied"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
    ],
)
def test_errors_outside_checkpoints_say_how_to_go_on(error, said, tmp_path):
    found = what_happened(error, RunDirectory(tmp_path))
    assert said in found
    assert found.endswith("start again with the same command")  # there is no state yet


def test_a_recording_is_a_state_to_go_on_from(tmp_path):
    run = RunDirectory(tmp_path)
    run.recording.mkdir()
    for error in (OSError(28, os.strerror(28)), KeyboardInterrupt()):
        assert what_happened(error, run).endswith(f"go on with: {run.go_on}")


# Several processes ---------------------------------------------------------------------------------------------------


def test_an_address_that_cannot_be_used_is_named_before_any_process_starts(monkeypatch):
    import socket

    taken = socket.create_server(("", 0))
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
    assert "Address already in use; give the number of a free port" in address_problem(2, 1)
    assert address_problem(1, 1) is None
    taken.close()
    assert address_problem(2, 1) is None
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    assert "MASTER_ADDR=192.0.2.7: " in address_problem(2, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")  # a cluster knows its own addresses
    assert address_problem(2, 1) is None


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def second_of(first: int) -> int | None:
    """The process that Lightning has started from the first one of a job, known by its command or its name."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
            if int(rest.split()[1]) == first and "train.py" in name + (path.parent / "cmdline").read_text():
                return int(path.parent.name)
        except (OSError, ValueError):
            continue
    return None


def wait_for(happened, seconds: float):
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("moment", ["start", "training", "evaluation", "export"])
@pytest.mark.parametrize("rank", [0, 1])
def test_whichever_process_dies_and_whenever_all_end_within_a_minute(rank, moment, tmp_path):
    moments = {
        "start": lambda: True,
        "training": lambda: (tmp_path / "metrics.csv").exists(),
        "evaluation": lambda: any(tmp_path.glob("predictions/*jsonl*")),
        "export": lambda: (tmp_path / "export").exists(),
    }
    given = [*SHORT, "trainer=two_ranks", "rounds=8", f"paths.run_dir={tmp_path}"]
    with composed.without_estimate():
        job = composed.start("train.py", *given, spare=moment != "start")  # in its imports there
    first = job.process.pid
    second = wait_for(lambda: second_of(first), 120)
    wait_for(moments[moment], 200)
    os.kill((first, second)[rank], signal.SIGKILL)
    done = job.wait(60)
    assert done.returncode != 0
    wait_for(lambda: not alive(second), 60)
