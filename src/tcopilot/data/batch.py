"""The one layout that training, decoding and scoring share, and how tokenised rows become it.

Shape letters: ``B`` batch, ``M`` source length, ``N`` target length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Side = Literal["left", "right"]
LEAST_PREFIX = 32  # tokens; for fewer, a pass of their own costs more than it saves


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
    held_out: "Batch | None" = None

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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on ``device``."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the data loader calls this."""
        return self._map(lambda part: part.pin_memory())

    def split(self, rows: int) -> "list[Batch]":
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

    def _map(self, change: Callable[[Any], Any]) -> "Batch":
        """Change all tensors, and ``held_out`` likewise."""
        held = vars(self).values()
        return Batch(*(change(value) if isinstance(value, Tensor | Batch) else value for value in held))


@dataclass(frozen=True)
class PromptTargetCollator:
    """Pad prompts on ``source_side`` and targets on the right.

    Decoder-only Pilots want ``"left"``, so that prompt and target are neighbours; encoder-decoders want ``"right"``.

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

    def __post_init__(self) -> None:
        if self.source_side not in ("left", "right"):
            raise ValueError(f"source_side is 'left' or 'right', got {self.source_side!r}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate rows that have ``source_ids``, ``target_ids``, ``id`` and ``benchmark``; other keys are ignored."""
        source_ids_BM, source_mask_BM = self._pad([row["source_ids"] for row in rows], self.source_side)
        target_ids_BN, target_mask_BN = self._pad([row["target_ids"] for row in rows], "right")
        shared = common_prefix([row["source_ids"] for row in rows]) if self.source_side == "left" else 0
        return Batch(
            source_ids_BM=source_ids_BM,
            source_mask_BM=source_mask_BM,
            target_ids_BN=target_ids_BN,
            target_mask_BN=target_mask_BN,
            ids_B=torch.tensor([row["id"] for row in rows], dtype=torch.int64),
            benchmark_B=torch.tensor([row["benchmark"] for row in rows], dtype=torch.int64),
            prefix=shared if shared >= LEAST_PREFIX else 0,
        )

    def _pad(self, sequences: Sequence[Sequence[int]], side: Side) -> tuple[Tensor, Tensor]:
        """Return ids and mask, both [rows, longest]; the mask comes from the lengths."""
        ids = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
        real = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        return (
            pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id, padding_side=side),
            pad_sequence(real, batch_first=True, padding_side=side),
        )


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which several prompts begin alike; the last token of each is its own.

    >>> common_prefix([[5, 6, 7, 8], [5, 6, 9]]), common_prefix([[5, 6, 7], [5, 6]]), common_prefix([[5, 6]])
    (2, 1, 0)
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in alphabetical order: what these two share, all do
    longest = min(map(len, prompts)) - 1
    return next((place for place in range(longest) if first[place] != last[place]), longest)


@dataclass(frozen=True)
class HeldOutCollator:
    """Make a :class:`Batch` of the first half of the rows, and of the second its ``held_out``."""

    collate: PromptTargetCollator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate as many rows to train on as rows that are held out."""
        half = len(rows) // 2
        return replace(self.collate(rows[:half]), held_out=self.collate(rows[half:]))
