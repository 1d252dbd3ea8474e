"""Speed of the rounds, each model's share of the time, the share of padding, and peak memory."""

import resource
import sys
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

RSS_UNITS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB


class Throughput(Callback):
    """Logs speed, both models' share of time, padding and peak memory, over the rounds since the line before.

    Time is that inside training steps: loading, validation, checkpoints and logging do not count.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting; a resumed run does so anew."""
        self._restart(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a round, and log when a line is due."""
        self._tokens = self._tokens + trainer.callback_metrics["train/target_tokens"]  # on the GPU: nothing waits
        self._rows += len(batch) * trainer.world_size
        self._read = self._read + batch.source_mask_BM.sum() + batch.target_mask_BN.sum()
        self._positions += batch.source_mask_BM.numel() + batch.target_mask_BN.numel()
        every = trainer.log_every_n_steps  # 0 is never
        if every and (pl_module.round + 1) % every == 0:
            seconds = {name: total - self._before[name] for name, total in pl_module.seconds.items()}
            whole = max(sum(seconds.values()), 1e-9)
            figures = {
                "speed/target_tokens_per_second": self._tokens / whole,
                "speed/rows_per_second": self._rows / whole,
                **{f"time/{name}_share": part / whole for name, part in seconds.items()},
                "data/padding_share": 1 - self._read / self._positions,
                "memory/rss_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_UNITS_PER_MIB,
            }
            if pl_module.device.type == "cuda":
                figures["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
            pl_module.log_dict(figures)
            self._restart(pl_module)

    def _restart(self, pl_module: LightningModule) -> None:
        self._tokens = self._rows = self._read = self._positions = 0  # `_read` are all that the Pilot reads
        self._before = dict(pl_module.seconds)
