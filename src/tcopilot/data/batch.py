"""The one layout that training, decoding and scoring share.

Shape letters: ``B`` batch, ``M`` source length, ``N`` target length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

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
        held_out: Rows of the round that the Mistake Log reads and the Pilot never trains on; None without any.
    """

    source_ids_BM: Tensor
    source_mask_BM: Tensor
    target_ids_BN: Tensor
    target_mask_BN: Tensor
    ids_B: Tensor
    benchmark_B: Tensor
    held_out: Batch | None = None

    def __len__(self) -> int:
        return len(self.ids_B)

    @property
    def tokens(self) -> Tensor:
        """Count the target tokens, end tokens included; an int64 scalar on the batch's device (no synchronisation)."""
        return self.target_mask_BN.sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on ``device``."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the data loader calls this."""
        return self._moved(Tensor.pin_memory)

    def split(self, rows: int) -> list[Batch]:
        """Cut the batch into consecutive parts for gradient accumulation.

        Args:
            rows: Largest number of rows of a part.

        Returns:
            Parts in order, each without the columns that are padding in all of its rows.

        Raises:
            ValueError: If ``rows`` is below 1.
        """
        if rows < 1:
            raise ValueError(f"a part needs at least 1 row, got rows={rows}")
        if rows >= len(self):
            return [self]
        cuts = range(0, len(self), rows)
        return [self._map(lambda tensor, start=start: tensor[start : start + rows])._trimmed() for start in cuts]

    def _trimmed(self) -> Batch:
        source, target = self.source_mask_BM.any(0), self.target_mask_BN.any(0)
        return Batch(
            source_ids_BM=self.source_ids_BM[:, source],
            source_mask_BM=self.source_mask_BM[:, source],
            target_ids_BN=self.target_ids_BN[:, target],
            target_mask_BN=self.target_mask_BN[:, target],
            ids_B=self.ids_B,
            benchmark_B=self.benchmark_B,
        )

    def _moved(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self._map(change), held_out=None if self.held_out is None else self.held_out._map(change))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Change the tensors of the batch's own rows."""
        names = [field.name for field in fields(self) if field.name != "held_out"]
        return Batch(**{name: change(getattr(self, name)) for name in names})
