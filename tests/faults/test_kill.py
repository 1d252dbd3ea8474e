"""A run that is killed again and again ends as one that was never interrupted, to the bit."""

import csv
import random
import signal
from pathlib import Path

import composed
import pytest

ROUNDS = 40
SETTINGS = [
    *composed.SMALL,
    f"rounds={ROUNDS}",
    "callbacks.checkpoint.every_n_rounds=5",
    "trainer.val_check_interval=10",
    "mistake_log.log.capacity_rounds=8",
    "~callbacks.progress",
    "+callbacks.killer._target_=killer.Killer",
]
CLOCKS = ("time/", "speed/", "memory/")


def kills():
    """Ten moments in the order in which a run passes them, each after the checkpoint that the one before leaves."""
    draw = random.Random(0)
    rounds = sorted([3, *(draw.randrange(6, ROUNDS) for _ in range(4))])  # the first comes before any checkpoint
    at_random = [(number, f"{draw.randrange(30)}:{number}") for number in rounds]
    placed = [(10, "validation:10"), (15, "draft:15"), (20.5, "renamed:20"), (40, "draft:40"), (41, "exported:40")]
    return [kill for _, kill in sorted(at_random + placed)]


def figures(folder: Path) -> list[dict[str, str]]:
    """The lines of `metrics.csv` without what clocks and memory say."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in csv.DictReader(file)
        ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_ten_times_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(composed.run, "budget", lambda *_: None)  # forked programs inherit it
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ran = composed.forked("train.py", *SETTINGS, f"hydra.run.dir={whole}")
    assert ran.returncode == 0, ran.stderr

    def go_on():
        if any((killed / "checkpoints").glob("round=*")):
            return composed.forked("train.py", f"resume={killed}", "trust=[killer]", f"hydra.run.dir={tmp_path}/hydra")
        return composed.forked("train.py", *SETTINGS, f"hydra.run.dir={killed}")

    assert len(kills()) == 10
    for kill in kills():
        monkeypatch.setenv("KILL", kill)
        ran = go_on()
        assert ran.returncode == -signal.SIGKILL, (kill, ran.returncode, ran.stderr)
    monkeypatch.delenv("KILL")
    ran = go_on()
    assert ran.returncode == 0, ran.stderr

    assert figures(killed) == figures(whole)
    for name in (
        "export/model.safetensors",
        "checkpoints/round=40/rank0.json",
        "checkpoints/round=40/rank0.safetensors",
    ):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert composed.results(killed)["rows"] == composed.results(whole)["rows"]
    left = {path.name for path in (killed / "checkpoints").iterdir()}
    assert left == {"round=35", "round=40"}
