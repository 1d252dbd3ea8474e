"""The rounds that a Mistake Log holds, and how a single record is found among them. Shapes: B records."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcopilot.processes import gather

ABOUT_RECORD = ("benchmark", "energy", "repeated")  # one value per record, read by policies and statistics
ABOUT_SOURCE = ("source", "source_ids", "source_mask")
RECORDS = "records"  # every record of this group has weight 1


@dataclass
class LoggedRound:
    """The records of one round.

    The record is the first dimension of every tensor. `energy` is a record's mean ‖ℓ‖² over its target tokens,
    `repeated` whether its row had been logged in an earlier round.
    """

    tensors: dict[str, Tensor]
    round: int  # from 0
    spilled: bool = False  # whether the tensors lie in a file

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def tokens(self) -> int:
        """Number of target tokens."""
        return int(self.tensors["target_mask"].sum())

    @cached_property
    def energy(self) -> float:
        """Sum of ‖ℓ‖² over its target tokens."""
        return (self.tensors["energy"].double() * self.tensors["target_mask"].sum(1)).sum().item()

    @cached_property
    def repeated(self) -> int:
        """Number of records whose row had been logged in an earlier round."""
        return int(self.tensors["repeated"].sum())

    def record(self, row: int) -> dict[str, Tensor]:
        """Return what was logged of one row, without padding."""
        prompt, target = slice(0), slice(0, int(self.tensors["target_mask"][row].sum()))
        if "source_mask" in self.tensors:
            source_mask = self.tensors["source_mask"][row]
            first = int(source_mask.int().argmax())  # the prompt is one run of real tokens, padded on either side
            prompt = slice(first, first + int(source_mask.sum()))
        return {
            name: tensor[row, prompt if name in ABOUT_SOURCE else target]
            for name, tensor in self.tensors.items()
            if name not in ABOUT_RECORD
        }

    def __len__(self) -> int:
        return len(self.tensors["energy"])


class LoggedRecords:
    """The records of the rounds held, oldest first; any round may leave.

    For each group of weights (see `SamplingPolicy.weights`) an array holds the running sum before every round and
    after the last. Weights are whole numbers, so that a sum does not depend on which rounds came and went.
    """

    def __init__(self, weigh: Callable[[LoggedRound], dict[Any, Tensor]]) -> None:
        self.rounds: list[LoggedRound] = []
        self.nbytes = 0
        self._weigh = weigh
        self._sums: dict[Any, np.ndarray] = {RECORDS: np.zeros(1, dtype=np.int64)}

    def append(self, logged: LoggedRound) -> None:
        """Add the newest round."""
        weights = {group: int(weights_B.sum()) for group, weights_B in self._weigh(logged).items()}
        weights[RECORDS] = len(logged)
        for group in weights.keys() - self._sums.keys():
            self._sums[group] = np.zeros(len(self.rounds) + 1, dtype=np.int64)
        for group, sums in self._sums.items():
            self._sums[group] = np.append(sums, sums[-1] + weights.get(group, 0))
        self.rounds.append(logged)
        self.nbytes += logged.nbytes

    def pop(self, index: int) -> LoggedRound:
        """Take a round out."""
        index %= len(self.rounds)
        for group, sums in self._sums.items():
            weight = sums[index + 1] - sums[index]
            self._sums[group] = np.append(sums[: index + 1], sums[index + 2 :] - weight)
        logged = self.rounds.pop(index)
        self.nbytes -= logged.nbytes
        return logged

    @property
    def groups(self) -> list[Any]:
        """Groups of weights in which at least one record held has a weight above 0."""
        return [group for group, sums in self._sums.items() if sums[-1] and group is not RECORDS]

    def total(self, group: Any) -> int:
        """Sum of a group's weights over all records."""
        return int(self._sums[group][-1])

    def find(self, index: int) -> tuple[LoggedRound, int]:
        """Return the round of a record, counted over all rounds oldest first, and its row there."""
        place, row = self._place(RECORDS, index)
        return self.rounds[place], row

    def pick(self, group: Any, number: int) -> int:
        """Return the index of the record that a number, modulo the group's total weight, points to.

        Uniform numbers thus find records in proportion to their weight.
        """
        place, rest = self._place(group, number % self.total(group))
        ends_B = self._weigh(self.rounds[place])[group].cumsum(0)
        return int(self._sums[RECORDS][place]) + int(torch.searchsorted(ends_B, rest, right=True))

    def _place(self, group: Any, number: int) -> tuple[int, int]:
        """Return in which round the running sum passes a number, and how far into the round that is."""
        sums = self._sums[group]
        place = int(sums.searchsorted(number, side="right")) - 1
        return place, number - int(sums[place])

    def __len__(self) -> int:
        return int(self._sums[RECORDS][-1])


class SeenRows:
    """Remembers in which round each row was logged first; rows are known by their ids.

    With `of_all_processes` every process must call `new` for its part of each micro-batch.
    """

    def __init__(self, of_all_processes: bool = False) -> None:
        self._gather = gather if of_all_processes else list
        self._first: dict[int, int] = {}

    def new(self, ids: list[int], round: int) -> list[bool]:
        """Remember the rows of a round's micro-batch; returns for each row whether no earlier round had it."""
        for number in self._gather(ids):
            self._first.setdefault(number, round)
        return [self._first[number] == round for number in ids]

    @property
    def ids(self) -> list[int]:
        """All rows so far, in order; for a checkpoint, which is taken between rounds."""
        return sorted(self._first)

    @ids.setter
    def ids(self, ids: list[int]) -> None:
        self._first = dict.fromkeys(ids, -1)


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the records of several parts of a round together, padded to one width."""

    def cat(tensors: list[Tensor]) -> Tensor:
        if tensors[0].dim() > 1:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [nn.functional.pad(t, (*(0, 0) * (t.dim() - 2), 0, width - t.shape[1])) for t in tensors]
        return torch.cat(tensors)

    return parts[0] if len(parts) == 1 else {name: cat([part[name] for part in parts]) for name in parts[0]}
