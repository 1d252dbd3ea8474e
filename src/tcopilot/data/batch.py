"""The batch layout that training, decoding and scoring share, and the collator that builds it from tokenised rows.

Shape letters: ``B`` batch, ``M`` source length, ``N`` target length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Side = Literal["left", "right"]
LEAST_PREFIX = 32  # tokens; a separate forward pass over a shorter prefix costs more than it saves


@dataclass(frozen=True)
class Batch:
    """Hold tokenised prompts and targets with explicit masks.

    Masks are True on real tokens. They are built from lengths, so the pad token may equal the end token.

    Attributes:
        source_ids_BM: Prompt token ids, int64.
        source_mask_BM: True where ``source_ids_BM`` is a prompt token, bool.
        target_ids_BN: Target token ids including the end token, right-padded, int64.
        target_mask_BN: True where ``target_ids_BN`` is a target token, bool.
        ids_B: Row ids, unique within a split, int64.
        benchmark_B: Index into ``TCopilotDataModule.benchmark_names``, int64.
        prefix: Number of leading tokens that all prompts share, if encoding them only once saves time; else 0.
        held_out: Rows that the Mistake Log records in this round and the Pilot never trains on; None without any.
    """

    source_ids_BM: Tensor
    source_mask_BM: Tensor
    target_ids_BN: Tensor
    target_mask_BN: Tensor
    ids_B: Tensor
    benchmark_B: Tensor
    prefix: int = 0
    held_out: "Batch | None" = None

    def __len__(self) -> int:
        return len(self.ids_B)

    @property
    def tokens(self) -> Tensor:
        """Count the target tokens, end tokens included, as an int64 scalar on the batch's device, without a sync."""
        return self.target_mask_BN.sum()

    @property
    def padded_tokens(self) -> int:
        """Count the tokens of prompts and targets, padding included."""
        return self.source_ids_BM.numel() + self.target_ids_BN.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on ``device``."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the data loader calls this."""
        return self._map(lambda part: part.pin_memory())

    def split(self, rows: int) -> "list[Batch]":
        """Cut the batch into consecutive parts of at most ``rows`` rows for gradient accumulation.

        Columns that are padding in all rows of a part are removed from it, and ``held_out`` is dropped.

        Raises:
            ValueError: If ``rows`` is below 1.
        """
        if rows < 1:
            raise ValueError(f"rows={rows}: each part needs at least 1 row")
        if rows >= len(self):
            return [self]
        parts = []
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            source, target = self.source_mask_BM[part].any(0), self.target_mask_BN[part].any(0)
            prompts = self.source_ids_BM[part, source], self.source_mask_BM[part, source]
            targets = self.target_ids_BN[part, target], self.target_mask_BN[part, target]
            parts.append(Batch(*prompts, *targets, self.ids_B[part], self.benchmark_B[part], self.prefix))
        return parts

    def _map(self, change: Callable[[Any], Any]) -> "Batch":
        """Apply a function to every tensor and to ``held_out``."""
        held = vars(self).values()
        return Batch(*(change(value) if isinstance(value, Tensor | Batch) else value for value in held))


@dataclass(frozen=True)
class PromptTargetCollator:
    """Pad prompts on ``source_side`` and targets on the right.

    Decoder-only Pilots need ``"left"``, so that each target follows its prompt directly; encoder-decoders ``"right"``.
    With ``halves`` the batch holds the first half of the rows, and its ``held_out`` the second half.

    >>> rows = [
    ...     {"source_ids": [5, 6, 7], "target_ids": [8, 1], "id": 40, "benchmark": 0},
    ...     {"source_ids": [5], "target_ids": [8, 9, 1], "id": 41, "benchmark": 1},
    ... ]
    >>> batch = PromptTargetCollator(pad_token_id=1, source_side="left")(rows)
    >>> batch.source_ids_BM
    tensor([[5, 6, 7],
            [1, 1, 5]])
    >>> batch.target_ids_BN
    tensor([[8, 1, 1],
            [8, 9, 1]])
    >>> batch.target_mask_BN
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """

    pad_token_id: int
    source_side: Side
    halves: bool = False

    def __post_init__(self) -> None:
        if self.source_side not in ("left", "right"):
            raise ValueError(f"source_side={self.source_side!r}: use 'left' or 'right'")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate rows that have ``source_ids``, ``target_ids``, ``id`` and ``benchmark``; other keys are ignored."""
        if self.halves:
            half, collate = len(rows) // 2, replace(self, halves=False)
            return replace(collate(rows[:half]), held_out=collate(rows[half:]))
        prompts, targets = ([row[key] for row in rows] for key in ("source_ids", "target_ids"))
        ids_B, benchmark_B = (
            torch.tensor([row[key] for row in rows], dtype=torch.int64) for key in ("id", "benchmark")
        )
        shared = common_prefix(prompts) if self.source_side == "left" else 0
        padded = *self._pad(prompts, self.source_side), *self._pad(targets, "right")
        return Batch(*padded, ids_B, benchmark_B, prefix=shared if shared >= LEAST_PREFIX else 0)

    def _pad(self, sequences: Sequence[Sequence[int]], side: Side) -> tuple[Tensor, Tensor]:
        """Return ids and mask, both [rows, longest]; the mask comes from the lengths."""
        ids = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
        real = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        return (
            pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id, padding_side=side),
            pad_sequence(real, batch_first=True, padding_side=side),
        )


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Count the leading tokens that all prompts share; the last token of a prompt is never counted as shared.

    >>> common_prefix([[5, 6, 7, 8], [5, 6, 9]]), common_prefix([[5, 6, 7], [5, 6]]), common_prefix([[5, 6]])
    (2, 1, 0)
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in lexicographic order; a prefix of both is a prefix of all
    longest = min(map(len, prompts)) - 1
    return next((place for place in range(longest) if first[place] != last[place]), longest)
