"""Alarms for a Copilot that trains without learning anything that helps."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

COLLAPSED_SHARE = 1e-3  # ‖f^C‖² below this share of ‖ℓ‖²
IN_SAMPLE_SHARE = 0.5  # the log's ‖ℓ‖² below this share of validation's
STALE_ROUNDS = 1000  # mean age of a record


class CopilotAlarms(Callback):
    """Warns, once per cause, when validation says that the Copilot will not help.

    Causes: f^C stays at 0; its error ratio is above 1 (worse than no correction); the log's errors are far below
    validation's (the log has become in-sample); the log has gone stale.
    """

    def __init__(self) -> None:
        self.raised: set[str] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check after each validation, except early in training, when it is too soon to judge."""
        if trainer.sanity_checking or pl_module.model.copilot is None or pl_module.round < pl_module.rounds // 2:
            return
        metrics = trainer.callback_metrics
        energy = float(metrics.get("val/error_energy", 0.0))
        if metrics.get("val/correction_energy", energy) < COLLAPSED_SHARE * energy:
            self._raise("collapsed", "the Copilot still outputs about 0: raise copilot.steps_per_round or its lr")
        elif metrics.get("val/error_ratio", 0.0) > 1:
            self._raise("harmful", "the Copilot's error ratio on validation is above 1: its corrections do not help")
        if pl_module.mistake_log is None or not len(pl_module.mistake_log):
            return
        log = pl_module.mistake_log.statistics()
        if log["error_energy"] < IN_SAMPLE_SHARE * energy:
            self._raise(
                "in-sample",
                f"errors in the Mistake Log (‖ℓ‖² {log['error_energy']:.3f}) are far below validation's "
                f"({energy:.3f}): the Pilot has memorised its rows and the log no longer shows the errors to come",
            )
        if log["age_rounds"] > STALE_ROUNDS:
            self._raise("stale", f"records in the Mistake Log are {log['age_rounds']:.0f} rounds old on average")

    def state_dict(self) -> dict[str, Any]:
        """The causes warned of, so that a resumed run does not repeat them."""
        return {"raised": sorted(self.raised)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember them."""
        self.raised = set(state_dict["raised"])

    def _raise(self, cause: str, message: str) -> None:
        if cause not in self.raised:
            self.raised.add(cause)
            rank_zero_warn(message)
