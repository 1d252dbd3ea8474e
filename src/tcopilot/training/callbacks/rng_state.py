"""Random numbers that survive a resume: a resumed run drops the same units as one that was never stopped."""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class RngState(Callback):
    """Carries each process's random states of Python, NumPy and torch from round to round and into checkpoints.

    Every round starts where the last one ended, whatever validation or a new loader drew in between, since a resumed
    run may not repeat those.
    """

    per_rank = True

    def __init__(self) -> None:
        self._between: dict[str, Any] | None = None  # the states between two rounds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Go on where the last round ended."""
        if self._between is not None:
            _restore(self._between)
            self._between = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note where this round ended."""
        self._between = _capture()

    def state_dict(self) -> dict[str, Any]:
        """The states, as tensors and plain values."""
        return _capture() if self._between is None else self._between

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use these states from the next round on."""
        self._between = state_dict


def _capture() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _restore(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state.cpu(), device)
