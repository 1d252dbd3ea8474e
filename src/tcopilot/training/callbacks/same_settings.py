"""Stops a job whose processes were started with different settings."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from tcopilot.processes import refuse_differences


class SameSettings(Callback):
    """Checks that all processes were given the same settings, as soon as they have joined.

    DDP would average the gradients of different configs or data without complaint, and every figure would be wrong.

    Args:
        settings: name to value: the resolved config by key, the data's fingerprint.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare before the first round."""
        refuse_differences(self.settings)
