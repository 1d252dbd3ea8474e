"""The callback that owns the evolving Mistake Log: creates it, reports it, checkpoints it."""

from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.settings import whole


def passes_behind(trainer: Trainer, pl_module: LightningModule, age_rounds: float) -> float | None:
    """How many passes over the train rows the Pilot has made since its errors were logged, on average.

    None where this says nothing: the Pilot is frozen, or the rows are a stream, whose number nobody knows.
    """
    data = trainer.datamodule
    if pl_module.learners["pilot"] is None or data is None or not data.train_rows:
        return None
    return age_rounds * data.batch_size / data.train_rows


class MistakeLogCallback(Callback):
    """Owns the log of this rank, which the module's rounds fill and read, and logs its statistics under `log/`."""

    SETTINGS: ClassVar = {"every_n_rounds": whole()}
    per_rank = True

    def __init__(self, log: MistakeLog, every_n_rounds: int = 50) -> None:
        self.mistake_log = log  # Lightning replaces an attribute named `log`
        self.every_n_rounds = every_n_rounds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the log to the module."""
        pl_module.mistake_log = self.mistake_log

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log size, bytes, age, mean ‖ℓ‖² and share of repeated records."""
        if len(self.mistake_log) and (pl_module.round + 1) % self.every_n_rounds == 0:
            figures = self.mistake_log.statistics()
            if (passes := passes_behind(trainer, pl_module, figures["age_rounds"])) is not None:
                figures["passes_behind"] = passes
            pl_module.log_dict({f"log/{name}": value for name, value in figures.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the log's error energy over validation's; well below 1, the log no longer shows present errors."""
        held_out = trainer.callback_metrics.get("val/error_energy")
        if trainer.sanity_checking or held_out is None or not (trainer.loggers and len(self.mistake_log)):
            return
        energy = self.mistake_log.statistics()["error_energy"]
        ratio = energy / max(float(held_out), 1e-12)
        for logger in trainer.loggers:  # at the step of all lines of this round
            figures = {"log/error_energy": energy, "log/energy_ratio_to_validation": ratio}
            logger.log_metrics(figures, step=pl_module.round - 1)

    def state_dict(self) -> dict[str, Any]:
        """The log, as tensors and plain values."""
        return self.mistake_log.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the log from the file: `load_state_dict` would get a copy of it in memory, where it may not fit."""
        if (state := checkpoint["callbacks"].pop(self.state_key, None)) is not None:
            self.mistake_log.load_state_dict(state)
