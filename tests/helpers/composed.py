"""Compose the project's configs and run its two programs in process, on budgets of seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from tcopilot.app import run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMALL = [
    "debug=limit",
    "data.benchmarks.word_problems.train=200",
    "data.benchmarks.word_problems.validation=20",
    "data.benchmarks.word_problems.test=20",
]
"""Four rounds of the demo on few generated rows, which are quick to draw."""
QUIET = ["trainer.enable_progress_bar=false", "~callbacks.progress", "traceback=true"]


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    """What Hydra hands to a program, without Hydra's own settings."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def train(folder: Path, *overrides: str) -> Path:
    """Run `train.py` in process; errors arrive as exceptions. Returns the run directory."""
    run.train(compose_config(*QUIET, *overrides, f"paths.run_dir={folder}"))
    return folder


def evaluate(run_dir: Path, folder: Path, *overrides: str) -> Path:
    """Run `eval.py` in process; errors arrive as exceptions. Returns its run directory."""
    given = [f"run={run_dir}", f"paths.run_dir={folder}", "traceback=true"]
    run.evaluate(compose_config(*given, *overrides, name="eval"))
    return folder


def program(script: str, *overrides: str, timeout: int = 250) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, from the repository's root, offline and on one core."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, script, *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def results(folder: Path) -> dict[str, Any]:
    """What the run found."""
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path, split: str, weight: float, benchmark: str = "word_problems") -> list[dict[str, Any]]:
    """The predictions of one split at one λ, by row id."""
    text = (folder / "predictions" / f"{split}-{benchmark}-weight={weight:g}.jsonl").read_text()
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda row: row["id"])


def value(found: dict[str, Any], split: str, metric: str, weight: float, benchmark: str = "word_problems") -> float:
    """One figure of `results.json`."""
    wanted = {"split": split, "metric": metric, "weight": weight, "benchmark": benchmark}
    (row,) = [row for row in found["rows"] if wanted.items() <= row.items()]
    return row["value"]


class InterruptAfter(Callback):
    """Presses Ctrl-C during a round, as a user would."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Send the signal in the last round wanted."""
        if pl_module.round + 1 == self.rounds:
            signal.raise_signal(signal.SIGINT)
