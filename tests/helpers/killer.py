"""Ends a training program as a power cut does, where the environment variable `KILL` says: `<place>:<round>`."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from tcopilot.training import checkpoints


def die() -> None:
    """No handler, no cleaning up, nothing flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    """Places: `draft` and `renamed` (within a save), `validation`, `exported`, or milliseconds into a round."""

    def __init__(self) -> None:
        self.place, _, rounds = os.environ.get("KILL", "never:0").partition(":")
        self.rounds = int(rounds)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lie in wait within saves."""
        if self.place == "draft":
            self._kill_after("_write", lambda folder, *_: folder.name == f".round={self.rounds}.tmp")
        if self.place == "renamed":
            self._kill_after("_flush", lambda path: (path / f"round={self.rounds}").exists())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Start the clock."""
        if self.place.isdigit() and pl_module.round + 1 == self.rounds:
            threading.Thread(target=lambda: (time.sleep(int(self.place) / 1000), die()), daemon=True).start()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """In the middle of a validation."""
        if self.place == "validation" and pl_module.round == self.rounds:
            die()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Once training is over and all is saved."""
        if self.place == "exported":
            export = Path(trainer.default_root_dir) / "export"
            threading.Thread(target=lambda: (_wait_for(export / "model.safetensors"), die()), daemon=True).start()

    def _kill_after(self, name: str, due: Any) -> None:
        function = getattr(checkpoints, name)

        def deadly(*args: Any) -> Any:
            result = function(*args)
            if due(*args):
                die()
            return result

        setattr(checkpoints, name, deadly)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)
