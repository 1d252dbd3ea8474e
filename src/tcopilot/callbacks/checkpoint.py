"""Checkpoints named by round, written so that a crash leaves the one before intact."""

import os
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class RoundCheckpoint(Callback):
    """Saves the training state every few rounds and keeps the newest files.

    Args:
        folder: where `round=<n>.ckpt` files go.
        every_n_rounds: how often; None saves only when training ends or is stopped.
        keep: how many files stay.
    """

    def __init__(self, folder: str, every_n_rounds: int | None = None, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.every_n_rounds = every_n_rounds
        self.keep = keep

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save when due. The round just finished counts."""
        rounds = pl_module.round + 1
        stopping = trainer.should_stop or rounds == pl_module.rounds
        if not stopping and self.every_n_rounds and rounds % self.every_n_rounds == 0:
            self.save(trainer, rounds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state, also after a clean stop."""
        if pl_module.round < pl_module.rounds:  # the epoch is the whole budget: it is not over, a resumed run goes on
            progress = trainer.fit_loop.epoch_progress
            for counts in (progress.total, progress.current):
                counts.processed = counts.completed = 0
        self.save(trainer, pl_module.round)

    def save(self, trainer: Trainer, rounds: int) -> None:
        """Write under a temporary name, flush to disk, rename; then drop the oldest files."""
        path = self.folder / f"round={rounds}.ckpt"
        unfinished = path.with_suffix(".tmp")
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(unfinished, weights_only=False)
        if trainer.is_global_zero:
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder, oldest round first.

    >>> checkpoints("no such folder")
    []
    """
    return sorted(Path(folder).glob("round=*.ckpt"), key=round_of)


def round_of(path: str | Path) -> int:
    """Round after which a checkpoint was saved.

    >>> round_of("checkpoints/round=40.ckpt")
    40
    """
    return int(Path(path).stem.split("=")[1])
