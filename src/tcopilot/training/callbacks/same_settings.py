"""All processes of a job train the same thing, or none starts."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from tcopilot.processes import refuse_differences


class SameSettings(Callback):
    """Compares what the processes were given, as soon as they have joined.

    Gradients of different jobs would average without complaint, and every figure would be wrong.

    Args:
        settings: name to value: the resolved config by key, the data's fingerprint.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare before the first round."""
        refuse_differences(self.settings)
