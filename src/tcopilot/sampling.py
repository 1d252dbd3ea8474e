"""Policies of the Mistake Log: which round leaves a full log, and how records are drawn from it.

Adding a policy is one class here and one YAML in `configs/mistake_log`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from tcopilot.mistake_log import MistakeLog


class SamplingPolicy(Protocol):
    """What the log asks of a policy."""

    def evict(self, rounds: int, seen: int, generator: Generator) -> int:
        """Index, among the `rounds` held, oldest first, of the round that leaves; `seen` rounds were appended."""

    def draw(self, log: MistakeLog, records: int, generator: Generator) -> Tensor:
        """Indices of the records drawn, counted over the log oldest first."""


class Fifo:
    """The newest rounds, drawn uniformly without replacement: the paper's buffer (Section A.3)."""

    def evict(self, rounds: int, seen: int, generator: Generator) -> int:
        """The oldest round leaves."""
        return 0

    def draw(self, log: MistakeLog, records: int, generator: Generator) -> Tensor:
        """Uniform over all records; each at most once in a draw."""
        return torch.randperm(len(log), generator=generator)[:records]


class Latest(Fifo):
    """Only the newest round: the batch at hand, as Algorithm 1 reads literally."""

    def draw(self, log: MistakeLog, records: int, generator: Generator) -> Tensor:
        """Uniform over the newest round; each record at most once in a draw."""
        newest = len(log.rounds[-1])
        return len(log) - newest + torch.randperm(newest, generator=generator)[:records]


class Reservoir(Fifo):
    """A uniform sample of all rounds ever appended (Vitter's algorithm R), drawn uniformly."""

    def evict(self, rounds: int, seen: int, generator: Generator) -> int:
        """The newest round is kept with probability (rounds − 1) / seen, in place of a random older one."""
        slot = int(torch.randint(seen, (1,), generator=generator))
        return slot if slot < rounds - 1 else rounds - 1


class Prioritised(Fifo):
    """The newest rounds, each record drawn in proportion to the root of its mean ‖ℓ‖², with replacement."""

    def draw(self, log: MistakeLog, records: int, generator: Generator) -> Tensor:
        """Independent draws; a record without any error is next to never drawn."""
        weights = log.concatenated("energy").nan_to_num(nan=1.0).clamp_min(1e-12).sqrt()  # the loss reports the NaN
        return torch.multinomial(weights, records, replacement=True, generator=generator)


class Balanced(Fifo):
    """The newest rounds, every benchmark of a mixture equally often, with replacement."""

    def draw(self, log: MistakeLog, records: int, generator: Generator) -> Tensor:
        """Independent draws, a record weighing 1 / (records of its benchmark)."""
        _, kind, counts = log.concatenated("benchmark").unique(return_inverse=True, return_counts=True)
        return torch.multinomial(1.0 / counts[kind], records, replacement=True, generator=generator)
