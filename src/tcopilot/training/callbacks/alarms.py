"""Alarms for a Copilot that trains without learning anything that helps."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from tcopilot.training.callbacks.mistake_log import passes_behind

COLLAPSED_SHARE = 1e-3  # ‖f^C‖² below this share of ‖ℓ‖²
IN_SAMPLE_SHARE = 0.5  # the log's ‖ℓ‖² below this share of validation's
STALE_ROUNDS = 1000  # mean age of a record
OUTGROWN_PASSES = 1.0  # mean age of a record, in passes of a Pilot that learns
NO_GAIN = {"collapsed", "harmful"}  # causes that say already that the Copilot brings nothing


class CopilotAlarms(Callback):
    """Warns, once per cause, when validation says that the Copilot will not help.

    Causes: f^C stays at 0; its error ratio is above 1 (worse than no correction); in the end the fused model's
    likelihood is not better than the Pilot's; the log's errors are far below validation's (the log has become
    in-sample); the Pilot has trained a pass past its records; the log has gone stale.
    """

    def __init__(self) -> None:
        self.raised: set[str] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check after each validation, except early in training, when it is too soon to judge."""
        if trainer.sanity_checking or pl_module.learners["copilot"] is None or pl_module.round < pl_module.rounds // 2:
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
        passes = passes_behind(trainer, pl_module, log["age_rounds"])
        if passes is not None and passes >= OUTGROWN_PASSES:
            self._raise(
                "outgrown",
                f"the Pilot has trained {passes:.1f} passes past the records of the Mistake Log, whose errors it may "
                f"no longer make: train for fewer passes, keep fewer rounds (mistake_log.log.capacity_rounds), or log "
                f"rows that it never sees (data.held_out)",
            )
        if log["age_rounds"] > STALE_ROUNDS:
            self._raise("stale", f"records in the Mistake Log are {log['age_rounds']:.0f} rounds old on average")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the likelihoods of the last validation, unless the run was stopped midway."""
        if pl_module.learners["copilot"] is None or pl_module.round < pl_module.rounds or self.raised & NO_GAIN:
            return
        pilot, fused = (trainer.callback_metrics.get(f"val/{name}_nll") for name in ("pilot", "fused"))
        if pilot is not None and fused >= pilot:
            self._raise(
                "no gain",
                f"at λ = {pl_module.model.weight:g} the fused model's NLL on validation ({fused:.4f}) is not below "
                f"the Pilot's ({pilot:.4f}): either the log teaches nothing about new rows, as once a Pilot has "
                f"converged, or the Copilot has memorised the log",
            )

    def state_dict(self) -> dict[str, Any]:
        """The causes warned of, so that a resumed run does not repeat them."""
        return {"raised": sorted(self.raised)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the causes warned of."""
        self.raised = set(state_dict["raised"])

    def _raise(self, cause: str, message: str) -> None:
        if cause not in self.raised:
            self.raised.add(cause)
            rank_zero_warn(message)
