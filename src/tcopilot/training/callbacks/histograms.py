"""Distributions of ‖ℓ‖ and ‖f^C‖ on validation."""

from lightning import Callback, LightningModule, Trainer

from tcopilot.app.dashboards import log_histograms


class ErrorHistograms(Callback):
    """Shows how large errors and corrections are, token by token: a mean hides a Copilot that speaks up rarely.

    Of the first process's rows.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the round into validation's line, as dashboards draw everything over it."""
        pl_module.log("round", float(pl_module.round), rank_zero_only=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the histograms."""
        if not trainer.sanity_checking:
            norms = {f"val/{name}": values for name, values in pl_module._statistics.norms().items()}
            log_histograms(trainer.loggers, norms, pl_module.round)
