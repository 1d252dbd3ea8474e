"""A finished run of each family, which is read by one file of tests and evaluated again by another."""

import contextlib
import io
from types import SimpleNamespace

import composed
import pytest

TASKS = {"t5": "word_problems", "llama": "multiple_choice"}


def learnt(family: str) -> list[str]:
    """A run of seconds after which some answers are right and the Copilot changes some of them."""
    task = TASKS[family]
    rows = [
        f"data.benchmarks.{task}.{split}={n}" for split, n in {"train": 2000, "validation": 60, "test": 60}.items()
    ]
    rates = ["pilot.optimizer.lr=5e-3", "pilot.scheduler.num_warmup_steps=10", "copilot.scheduler.num_warmup_steps=10"]
    return [
        f"pilot=tiny_{family}",
        f"data={task}",
        *rows,
        *rates,
        "rounds=80",
        "callbacks.checkpoint.every_n_rounds=50",
        "copilot.steps_per_round=2",
        "data.batch_size=32",
        "seed=1",
        "trainer.val_check_interval=40",
        "fusion.weight=[0,0.5,1,2]",
    ]


@pytest.fixture(scope="session", params=["t5", pytest.param("llama", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory) -> SimpleNamespace:
    """A finished run of each family: its folder, its task and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        folder = composed.train(tmp_path_factory.mktemp(request.param), *learnt(request.param))
    return SimpleNamespace(folder=folder, family=request.param, task=TASKS[request.param], printed=printed.getvalue())
