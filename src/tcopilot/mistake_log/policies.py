"""Policies of the Mistake Log: which round leaves a full log, and how records are drawn from it.

A policy should not walk over the log in a draw: weighted draws use the running sums of `weights` that the log keeps.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from tcopilot.mistake_log.rounds import LoggedRecords, LoggedRound
from tcopilot.settings import number, require

WEIGHT_UNIT = 2**32  # a weight of 1.0 as a whole number


class SamplingPolicy(ABC):
    """What the log asks of a policy; unless it says otherwise the oldest round leaves and draws need no weights."""

    def evict(self, rounds: int, seen: int, generator: Generator) -> int:
        """Index, among the `rounds` held, oldest first, of the round that leaves; `seen` rounds had records so far."""
        return 0

    def weights(self, logged: LoggedRound) -> dict[Any, Tensor]:
        """Whole-number weights [B] of a round's records by group, summed up by the log."""
        return {}

    @abstractmethod
    def draw(self, log: LoggedRecords, records: int, generator: Generator) -> Tensor:
        """Indices of the records drawn, counted over the log oldest first."""

    def importance(self, log: LoggedRecords, drawn: Tensor) -> Tensor:
        """Factors [B] of the drawn records' losses, by which a policy can compensate for how often it draws each."""
        return torch.ones(len(drawn))


class Fifo(SamplingPolicy):
    """The newest rounds, drawn uniformly without replacement: the paper's buffer (Section A.3)."""

    def draw(self, log: LoggedRecords, records: int, generator: Generator) -> Tensor:
        """Uniform over all records; each at most once in a draw."""
        return _without_replacement(len(log), records, generator)


class Latest(Fifo):
    """Only the newest round, which is the current batch: Algorithm 1 taken literally."""

    def draw(self, log: LoggedRecords, records: int, generator: Generator) -> Tensor:
        """Uniform over the newest round; each record at most once in a draw."""
        newest = len(log.rounds[-1])
        return len(log) - newest + _without_replacement(newest, records, generator)


class Reservoir(Fifo):
    """A uniform sample of all rounds ever appended (Vitter's algorithm R), drawn uniformly."""

    def evict(self, rounds: int, seen: int, generator: Generator) -> int:
        """The newest round is kept with probability (rounds − 1) / seen, in place of a random older one."""
        slot = int(torch.randint(seen, (1,), generator=generator))
        return slot if slot < rounds - 1 else rounds - 1


class Prioritised(SamplingPolicy):
    """The newest rounds, each record drawn in proportion to the root of its mean ‖ℓ‖², with replacement.

    The Copilot thus minimises a loss in which large errors count more. `correction` β (0 to 1) compensates for it:
    a record drawn with probability p from a log of n counts (n p)^−β times; at 1 the loss is that of uniform draws.
    """

    SETTINGS: ClassVar = {"correction": number(0, 1)}

    def __init__(self, correction: float = 0.0) -> None:
        require(self.SETTINGS, {"correction": correction}, "mistake_log.log.policy")
        self.correction = correction

    def weights(self, logged: LoggedRound) -> dict[Any, Tensor]:
        """√energy, a NaN counting as 1 (the loss reports it); ‖ℓ‖² is at most 2."""
        energy_B = logged.tensors["energy"].double().nan_to_num(nan=1.0).clamp(1e-12, 2.0)
        return {"error": (energy_B.sqrt() * WEIGHT_UNIT).long()}

    def draw(self, log: LoggedRecords, records: int, generator: Generator) -> Tensor:
        """Independent draws; a record without any error is almost never drawn."""
        places = _random_integers(records, generator)
        return torch.tensor([log.pick("error", place) for place in places])

    def importance(self, log: LoggedRecords, drawn: Tensor) -> Tensor:
        """(n p)^−β of each record."""
        if not self.correction:
            return super().importance(log, drawn)
        found = map(log.find, drawn.tolist())
        weights_B = torch.stack([self.weights(logged)["error"][row] for logged, row in found])
        return (log.total("error") / (len(log) * weights_B)).float() ** self.correction


class Balanced(SamplingPolicy):
    """The newest rounds, every benchmark of a mixture equally often, with replacement."""

    def weights(self, logged: LoggedRound) -> dict[Any, Tensor]:
        """1 for the records of a benchmark, one group each."""
        benchmark_B = logged.tensors["benchmark"]
        return {kind: (benchmark_B == kind).long() for kind in benchmark_B.unique().tolist()}

    def draw(self, log: LoggedRecords, records: int, generator: Generator) -> Tensor:
        """Independent draws: first a benchmark among those held, then one of its records."""
        held = sorted(log.groups)
        kinds, places = _random_integers(records, generator), _random_integers(records, generator)
        return torch.tensor(
            [log.pick(held[kind % len(held)], place) for kind, place in zip(kinds, places, strict=True)]
        )


def _without_replacement(n: int, k: int, generator: Generator) -> Tensor:
    """The first min(k, n) places of a random order of 0 … n − 1, in O(k): Fisher–Yates on the swapped places only."""
    swapped, drawn = dict[int, int](), []
    for i, chosen in enumerate(_random_integers(min(k, n), generator)):
        j = i + chosen % (n - i)
        drawn.append(swapped.get(j, j))
        swapped[j] = swapped.get(i, i)
    return torch.tensor(drawn, dtype=torch.int64)


def _random_integers(count: int, generator: Generator) -> list[int]:
    """Draw from 0 … 2⁶³ − 2 uniformly, so that a remainder modulo n is uniform up to n / 2⁶³."""
    return torch.randint(2**63 - 1, (count,), generator=generator).tolist()
