"""When checkpoints are saved, what goes into them, and how many stay."""

import copy
import logging
from pathlib import Path
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer

from tcopilot import processes
from tcopilot.settings import whole
from tcopilot.training.checkpoints import (
    PER_RANK,
    CheckpointError,
    checkpoints,
    discard,
    remove_leftovers,
    round_of,
    save,
)

log = logging.getLogger(__name__)


class RoundCheckpoint(Callback):
    """Saves the training state every few rounds and keeps the newest checkpoints.

    A state that is due is written before the next round starts: then all that the round and its validation have logged
    is on disk too, and what callbacks have learnt from that validation, which a resumed run does not repeat, is in the
    state. Without `every_n_rounds` it saves only when training ends or is stopped.
    """

    SETTINGS: ClassVar = {"every_n_rounds": whole().or_null(), "keep": whole()}

    def __init__(self, folder: str, every_n_rounds: int | None = None, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.every_n_rounds = every_n_rounds
        self.keep = keep
        self._due: tuple[int, dict[str, Any]] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear up after a crash, and refuse to mix the checkpoints of a new run with those of another."""
        if trainer.ckpt_path is None and (others := checkpoints(self.folder)):
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run, {others[-1].name} the newest: give another "
                f"paths.run_dir, or go on with that run (resume=<its folder>), or remove them"
            )
        if trainer.is_global_zero:
            remove_leftovers(self.folder)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note where the loops are if a state is due. The round just finished counts."""
        rounds = pl_module.round + 1
        stopping = trainer.should_stop or rounds == pl_module.rounds
        if not stopping and self.every_n_rounds and rounds % self.every_n_rounds == 0:
            loops = trainer._checkpoint_connector._get_loops_state_dict()
            self._due = rounds, copy.deepcopy(loops)  # a copy: the loader reads on

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write a due state before the next round changes anything."""
        self._write_due(trainer)
        # Lightning counts a step twice when it resumes from a clean stop, and loggers name their lines by it.
        trainer.fit_loop.epoch_loop._batches_that_stepped = pl_module.round

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """If validation fails, save the state, which is still good. One of several processes cannot save alone."""
        if processes.world_size() == 1:
            try:
                self._write_due(trainer)
            except CheckpointError as error:
                log.error("%s", error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state, also after a clean stop."""
        self._due = None
        self._write(trainer, pl_module.round, _state(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set each process's own state apart, since Lightning would save the first one's and restore it in all."""
        states = checkpoint["callbacks"]
        own = [callback.state_key for callback in trainer.callbacks if getattr(callback, "per_rank", False)]
        checkpoint[PER_RANK] = {"callbacks": {key: states.pop(key) for key in own if key in states}}

    def _write_due(self, trainer: Trainer) -> None:
        if self._due is not None:
            (rounds, loops), self._due = self._due, None
            self._write(trainer, rounds, _state(trainer) | {"loops": loops})

    def _write(self, trainer: Trainer, rounds: int, state: dict[str, Any]) -> None:
        path = self.folder / f"round={rounds}"
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == path.resolve():
            return  # no round was trained since it was loaded
        if not Path(trainer.default_root_dir).exists():
            raise CheckpointError(
                f"{trainer.default_root_dir} was removed while the run was going; start the run anew"
            )
        for logger in trainer.loggers:
            logger.save()
        save(state, path)
        if trainer.is_global_zero:
            self._drop_others(rounds)

    def _drop_others(self, rounds: int) -> None:
        """Remove the oldest checkpoints, and those of later rounds, which a resumed run skipped as damaged."""
        saved = checkpoints(self.folder)
        past = [path for path in saved if round_of(path) <= rounds]
        for path in [*past[: -self.keep], *saved[len(past) :]]:
            try:
                discard(path)
            except OSError as error:
                log.warning("%s could not be removed: %s", path, error)


def _state(trainer: Trainer) -> dict[str, Any]:
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # all processes call this; only one saves
