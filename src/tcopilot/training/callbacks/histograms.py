"""Distributions of ‖ℓ‖ and ‖f^C‖ on validation rows."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class ErrorHistograms(Callback):
    """Shows how large errors and corrections are, token by token: a mean hides a Copilot that corrects rarely.

    Histograms cover the rows of the first process, and go to the loggers that support them.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the round to the line of validation, since dashboards plot everything over rounds."""
        pl_module.log("round", float(pl_module.round), rank_zero_only=True)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the histograms."""
        norms = {} if trainer.sanity_checking else pl_module.validation_statistics.norms()
        norms = {f"val/{name}": values for name, values in norms.items() if len(values)}
        for logger in trainer.loggers if norms else ():
            if isinstance(logger, WandbLogger):
                import wandb

                histograms = {name: wandb.Histogram(values.numpy()) for name, values in norms.items()}
                logger.log_metrics({"round": pl_module.round, **histograms})
            elif isinstance(logger, TensorBoardLogger):
                for name, values in norms.items():  # at the step where Lightning puts this round's scalars
                    logger.experiment.add_histogram(name, values, pl_module.round - 1)
