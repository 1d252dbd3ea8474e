"""Ctrl-C finishes the round, saves the state and keeps everything computed so far."""

import logging
import signal
from typing import Any

from lightning import Callback, LightningModule, Trainer

from tcopilot.processes import STOP_SIGNALS

log = logging.getLogger(__name__)


class GracefulStop(Callback):
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a stop after the current round; a second SIGINT stops at once.

    Of several processes, one that is told to stop stops all of them, after the same round.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle the signals while rounds run."""
        for number in STOP_SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._request)
            except ValueError:  # Python handles signals in the main thread only
                return

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop after this round, without the validation that Lightning adds to a stop: little time may be left."""
        if self._agreed(trainer):
            trainer.should_stop = True
            if not trainer.val_check_batch or (pl_module.round + 1) % trainer.val_check_batch:  # none is due
                trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._agreed(trainer)

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any process was told to stop; all of them learn it, for what they do after training."""
        if trainer.world_size == 1:
            return self.requested
        agreed = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        self.requested |= agreed  # a signal that arrived meanwhile counts the next time
        return agreed

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        log.info("Stopping after this round; press Ctrl-C again to stop at once.")
