"""Several processes are one: the same losses, weights and figures, on whatever they are told to train."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import composed
import pytest
from processes import Forked, run_in_processes
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tcopilot.app import run
from tcopilot.app.checks.config import config_problems
from tcopilot.processes import DisagreementError, address_problem, agree_on, rank, refuse_differences

SMALL = [
    *(f"data.benchmarks.word_problems.{name}" for name in ("train=200", "validation=24", "test=20")),
    *("rounds=8", "data.batch_size=16", "mistake_log=latest", "fusion.weight=[0.5,1]", "evaluation.batch_size=16"),
    *("trainer.val_check_interval=4", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=true"),
]  # fmt: skip
LLAMA = ["pilot=tiny_llama"]
VARIANTS = {
    "t5": [],
    "llama": LLAMA,
    "lora": [*LLAMA, "adapter@pilot.adapter=lora", "copilot=lora", "adapter.dropout=0"],
    "two micro-batches": ["pilot.micro_batch_size=4"],
    "soft head, inclusive": [*LLAMA, "copilot.head=soft", "copilot.context=inclusive"],
}


def trained(folder: Path, *overrides: str) -> Path:
    """A run; Lightning starts its second process if it has one."""
    done = composed.forked("train.py", *SMALL, *overrides, f"paths.run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def job_of_two(*overrides: str, of_rank: str = "") -> list[CompletedProcess[str]]:
    """Two processes as a cluster would start them; `of_rank` is a key that each gives its own rank."""
    place = {"NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500 + os.getpid() % 1000}
    given = overrides if overrides[0].startswith("resume=") else (*SMALL, "trainer=two_ranks", *overrides)
    job = [
        composed.start("train.py", *given, *own, LOCAL_RANK=rank, **place)
        for rank, own in enumerate([[f"{of_rank}={rank}"] for rank in (0, 1)] if of_rank else [[], []])
    ]
    return [process.wait(timeout=200) for process in job]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The figures of each round that do not measure time or one process's log."""
    with (folder / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    kept = [name for name in lines[0] if name.startswith(("train/", "val/", "lr/"))]
    kept = [name for name in kept if "norm" not in name and "seconds" not in name]
    return [{name: float(line[name]) for name in kept if line[name]} for line in lines]


def assert_same(one: Path, two: Path) -> None:
    for before, after in zip(metrics(one), metrics(two), strict=True):
        for name in ("val/best_weight", "val/cosine"):  # quotients of sums that are next to 0 while f^C is
            assert after.pop(name, 0.0) == pytest.approx(before.pop(name, 0.0), rel=1e-3)
        assert after == pytest.approx(before, rel=1e-4, abs=1e-6)
    first, second = (load_file(folder / "export" / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
    for left, right in zip(*(composed.results(folder)["rows"] for folder in (one, two)), strict=True):
        assert (left["metric"], left["weight"], left["n"]) == (right["metric"], right["weight"], right["n"])
        assert left["value"] == pytest.approx(right["value"], rel=1e-5)


def overrides_of(variant: str) -> list[str]:
    given = VARIANTS[variant]
    if variant != "lora":
        return given
    return [g for g in given if not g.startswith("adapter.dropout")] + [
        f"{model}.adapter.dropout=0" for model in ("pilot", "copilot")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [name if name == "t5" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_two_processes_train_what_one_trains(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "budget", lambda *_: None)  # forked programs inherit it
    given = ["rounds=4", "trainer.val_check_interval=2", *overrides_of(variant)]
    alone = [g for g in given if not g.startswith("pilot.micro_batch_size")]
    one, two = trained(tmp_path / "one", *alone), tmp_path / "two"
    if variant == "two micro-batches":  # started as a user does, the second process by Lightning
        trained(two, *given, "trainer=two_ranks")
    else:
        assert [process.returncode for process in job_of_two(*given, f"paths.run_dir={two}")] == [0, 0]
    assert_same(one, two)
    for split, rows in (("validation", 24), ("test", 20)):
        for weight in (0.0, 0.5, 1.0):
            ids = [row["id"] for row in composed.predictions(two, split, weight)]
            assert len(ids) == len(set(ids)) == rows


DIVIDED = {
    "all weights trained": [
        *("data.benchmarks.word_problems.validation=25", "data.eval_batch_size=12"),
        "callbacks=[default,copilot_stop]",
    ],
    "adapters": [*LLAMA, "adapter@pilot.adapter=lora", "log_storage@mistake_log.log.storage=frozen_head"],
    "adapters and a head": [
        *LLAMA,
        "adapter@pilot.adapter=lora",
        "copilot=head",
        "log_storage@mistake_log.log.storage=likely_tokens",
    ],
}
"""With 25 validation rows one process has 13, in two batches, and the other 12, in one that is halved."""


@pytest.mark.slow
@pytest.mark.parametrize("variant", DIVIDED)
def test_a_pilot_divided_among_processes_is_trained_resumed_and_exported_as_a_whole_one(
    variant, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "budget", lambda *_: None)
    given = DIVIDED[variant] + (["pilot.adapter.dropout=0"] if "adapters" in variant else [])
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    trained(one, *given)
    states = ["pilot.micro_batch_size=4", "callbacks.checkpoint.every_n_rounds=4", "callbacks.checkpoint.keep=3"]
    done = job_of_two(*given, *states, "trainer.strategy=fsdp", f"paths.run_dir={two}")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout + done[0].stderr
    assert_same(one, two)

    shutil.copytree(two / "checkpoints" / "round=4", resumed / "checkpoints" / "round=4")
    for name in ("config.yaml", "metrics.csv"):
        shutil.copy(two / name, resumed)
    undivided = ["trainer.strategy=ddp"] if "adapters" in variant else []
    done = job_of_two(f"resume={resumed}", *undivided)
    assert [process.returncode for process in done] == [0, 0], done[0].stdout + done[0].stderr
    assert_same(two, resumed)
    if not undivided:
        assert metrics(resumed) == metrics(two)
        first, second = (load_file(folder / "export" / "model.safetensors") for folder in (two, resumed))
        assert all(first[name].equal(second[name]) for name in first)


# Processes that were not started alike -----------------------------------------------------------------------------


def differences_job(folder: Path) -> None:
    assert agree_on(rank()) == 0
    refuse_differences({"seed": 1, "data": "same"})
    with pytest.raises(DisagreementError, match=r"seed: 1, 2\. Start all") as error:
        refuse_differences({"seed": 1 + rank(), "data": "same"})
    assert "data:" not in str(error.value)
    (folder / f"{rank()}").touch()


def test_processes_agree_and_every_one_is_told_of_a_difference(tmp_path):
    run_in_processes(differences_job, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.slow
def test_a_job_whose_processes_differ_does_not_start(tmp_path):
    for process in job_of_two(f"paths.run_dir={tmp_path}", of_rank="seed"):
        text = process.stdout + process.stderr
        assert process.returncode == 1
        assert "not started alike" in text
        assert "seed: 0, 1" in text
        assert "Traceback" not in text
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_never_come_says_so_and_ends(rank, tmp_path):
    place = {"NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 30500 + os.getpid() % 1000}
    given = [*SMALL, "trainer=two_ranks", f"paths.run_dir={tmp_path}"]
    with composed.without_estimate():
        done = composed.start("train.py", *given, LOCAL_RANK=rank, TCOPILOT_WAIT=2, **place).wait(timeout=100)
    assert done.returncode == 1
    assert f"process {rank} of a job of 2 has waited 2 s for the others at MASTER_ADDR=127.0.0.1" in done.stderr
    assert f"MASTER_PORT={place['MASTER_PORT']}; start all 2" in done.stderr
    assert "TCOPILOT_WAIT=<seconds> waits longer" in done.stderr


@pytest.mark.parametrize("seconds", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_to_wait_that_is_none_is_refused(seconds, monkeypatch):
    monkeypatch.setenv("TCOPILOT_WAIT", seconds)
    assert address_problem(2, 1) == f"TCOPILOT_WAIT={seconds}: give a number of seconds above 0, or leave it out"
    assert address_problem(1, 1) is None


@pytest.mark.slow
def test_a_process_that_dies_stops_the_others_within_a_minute(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import os\nfrom lightning import Callback\n\n\nclass Die(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, *_):\n"
        "        if trainer.global_rank == 1 and pl_module.round == 3:\n            os._exit(9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["+callbacks.die._target_=dying.Die", "callbacks.checkpoint.every_n_rounds=2"]
    command = ["train.py", *SMALL, "trainer=two_ranks", f"paths.run_dir={tmp_path}/run", *given]
    began = time.monotonic()
    with composed.without_estimate():
        done = composed.forked(*command, spare=True)
    assert time.monotonic() - began < 120  # start-up included
    assert done.returncode != 0
    assert "another process of this job" in done.stderr
    assert f"resume={tmp_path}/run" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "round=2").is_dir()


def as_torchrun(script: str, *given: str) -> None:
    """What `torchrun --standalone --nproc_per_node=2` does, but with forks for its two interpreters."""
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": script}
    config = LaunchConfig(1, 1, 2, **place, max_restarts=0, start_method="fork")
    elastic_launch(config, composed.run_script)(script, *given)


@pytest.mark.slow
def test_torchrun_starts_training_and_evaluation_too(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shared = {"cwd": composed.ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 250}
    given = [*SMALL, "trainer=two_ranks", "name=t", f"hydra.run.dir={tmp_path}/${{now:%H-%M-%S-%f}}"]
    done = subprocess.run([*torchrun, "train.py", *given], **shared)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [path.parent for path in tmp_path.glob("*/results.json")]
    done = Forked(as_torchrun, "eval.py", f"run={runs[0]}", f"paths.run_dir={tmp_path}/evaluation").wait(250)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs  # both processes, started at different times, share one folder
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())["rows"]
    weights = {row["weight"] for row in found}  # λ = 0, the run's own and none else, where no other is asked for
    assert weights == {0.0, composed.results(run)["selected_weight"]}
    assert found == [row for row in composed.results(run)["rows"] if row["weight"] in weights]


# What the config alone shows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.devices=2"], "trainer.strategy=ddp"),
        (["trainer=two_ranks", "data.batch_size=15"], "data.batch_size=15 cannot be divided evenly among 2 processes"),
        (
            ["trainer=two_ranks", "copilot.batch_size=7"],
            "copilot.batch_size=7 cannot be divided evenly among 2 processes",
        ),
        (["trainer=two_ranks", "data.batch_size=16", "pilot.micro_batch_size=16"], "choose a divisor of 8"),
    ],
)
def test_batches_that_do_not_divide_are_refused(overrides, said):
    (problem,) = config_problems(composed.compose_config(*overrides))
    assert said in problem


def test_a_job_of_two_has_no_problem():
    assert config_problems(composed.compose_config("trainer=two_ranks")) == []
