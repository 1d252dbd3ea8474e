"""The one layout that training, decoding and scoring share.

Shape letters: ``B`` batch, ``M`` source length, ``N`` target length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Hold tokenised prompts and targets with explicit masks.

    Masks are True on real tokens. They come from lengths, so a pad token that equals the end token is harmless.

    Attributes:
        source_ids_BM: Prompt token ids, int64.
        source_mask_BM: True where ``source_ids_BM`` is a prompt token, bool.
        target_ids_BN: Target token ids including the end token, right-padded, int64.
        target_mask_BN: True where ``target_ids_BN`` is a target token, bool.
        ids_B: Row ids, unique within a split, int64.
        benchmark_B: Index into ``TCopilotDataModule.benchmark_names``, int64.
        prefix: Tokens with which all prompts begin alike, where reading them once pays; 0 elsewhere.
        held_out: Rows of the round that the Mistake Log reads and the Pilot never trains on; None without any.
    """

    source_ids_BM: Tensor
    source_mask_BM: Tensor
    target_ids_BN: Tensor
    target_mask_BN: Tensor
    ids_B: Tensor
    benchmark_B: Tensor
    prefix: int = 0
    held_out: Batch | None = None

    def __len__(self) -> int:
        return len(self.ids_B)

    @property
    def tokens(self) -> Tensor:
        """Count the target tokens, end tokens included; an int64 scalar on the batch's device (no synchronisation)."""
        return self.target_mask_BN.sum()

    @property
    def padded_tokens(self) -> int:
        """Count the tokens of prompts and targets, padding included."""
        return self.source_ids_BM.numel() + self.target_ids_BN.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on ``device``."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the data loader calls this."""
        return self._map(lambda part: part.pin_memory())

    def split(self, rows: int) -> list[Batch]:
        """Cut the batch into consecutive parts of at most ``rows`` rows for gradient accumulation.

        Each part comes without the columns that are padding in all of its rows, and without ``held_out``.

        Raises:
            ValueError: If ``rows`` is below 1.
        """
        if rows < 1:
            raise ValueError(f"a part needs at least 1 row, got rows={rows}")
        if rows >= len(self):
            return [self]
        parts = []
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            source, target = self.source_mask_BM[part].any(0), self.target_mask_BN[part].any(0)
            parts.append(
                Batch(
                    self.source_ids_BM[part, source],
                    self.source_mask_BM[part, source],
                    self.target_ids_BN[part, target],
                    self.target_mask_BN[part, target],
                    self.ids_B[part],
                    self.benchmark_B[part],
                    self.prefix,
                )
            )
        return parts

    def _map(self, change: Callable[[Any], Any]) -> Batch:
        """Change all tensors, and ``held_out`` likewise."""
        held = vars(self).values()
        return Batch(*(change(value) if isinstance(value, Tensor | Batch) else value for value in held))
