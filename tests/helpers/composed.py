"""Compose the project's configs and run its two programs in process, on budgets of seconds."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
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
    """What Hydra hands to a program, without Hydra's own settings.

    The choices of config groups are composed once, which takes Hydra a third of a second; values are then set on a
    copy as Hydra sets them. What Hydra refuses, it is asked to compose whole, so that its message is the real one.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        chosen = {override.input_line: override for override in parsed if _chooses_a_config(override)}
        cfg = pickle.loads(_composed(name, *chosen))
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o.input_line not in chosen], cfg)
    except Exception:
        return compose_whole(*overrides, name=name)
    return cfg


def compose_whole(*overrides: str, name: str = "train", with_hydra: bool = False) -> DictConfig:
    """The same by Hydra alone, and with its own settings if asked."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=with_hydra)


@cache
def _composed(name: str, *overrides: str) -> bytes:
    """Pickled, since that is by far the fastest copy of a config."""
    return pickle.dumps(compose_whole(*overrides, name=name))


def _chooses_a_config(override: Override) -> bool:
    """Whether it names a file of a config group; a sweep over values has no single config and is left to Hydra."""
    if override.is_sweep_override() or override.key_or_group.startswith("hydra"):
        raise ValueError(override.input_line)
    is_value = isinstance(override.value(), dict)
    return not is_value and (CONFIGS / override.key_or_group).is_dir()


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
