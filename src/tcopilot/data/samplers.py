"""The order of training rows: a budget of rounds, cut from endless reshuffled passes, that can be resumed anywhere.

Every rank draws the same global batches and takes its own slice, so ranks together see what one process sees.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeVar

import datasets
import numpy as np
from torch.utils.data import IterableDataset, Sampler

from tcopilot.data.benchmarks import DataError

Item = TypeVar("Item")
MEGABATCH = 50  # batches whose rows are sorted by length together: similar lengths, still well mixed


class ResumableIterator(Iterator[Item]):
    """Iterate with a state of one number: how many items were handed out; ``begin`` starts at the given item."""

    def __init__(self, begin: Callable[[int], Iterator[Item]]) -> None:
        self._begin = begin
        self.load_state_dict({"done": 0})

    def __next__(self) -> Item:
        item = next(self._items)
        self._done += 1
        return item

    def state_dict(self) -> dict[str, int]:
        """Return the number of items handed out."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the item after those."""
        self._done, self._items = state["done"], self._begin(state["done"])


class Resumable:
    """Iterate over ``rounds`` items, resumed at any of them; ``_from`` starts at the given one."""

    rounds: int
    _from: Callable[[int], Iterator[Any]]

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> ResumableIterator[Any]:
        return ResumableIterator(self._from)


class RoundSampler(Resumable, Sampler[list[int]]):
    """Yield the row indices of this rank's part of each round.

    A pass is a permutation of all rows by seed and pass, filled up from its own start to whole batches. With
    ``lengths`` each run of 50 batches is sorted by length and cut into batches, which are then shuffled.

    Args:
        rows: Number of rows, at least 1.
        batch_size: Rows of a global batch.
        rounds: Number of batches to yield.
        seed: Seed of the order; equal on all ranks.
        lengths: Length of each row in tokens, [rows]; None leaves the order purely random.
        rank: This process.
        world_size: Number of processes; divides ``batch_size``.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        rounds: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.rounds, self.seed = rows, batch_size, rounds, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.part = rank_slice(batch_size, rank, world_size)

    def _from(self, start: int) -> Iterator[list[int]]:
        first, skip = divmod(start, -(-self.rows // self.batch_size))
        batches = (batch for number in count(first) for batch in self._pass(number))
        for batch in islice(batches, skip, skip + self.rounds - start):
            yield batch[self.part].tolist()

    def _pass(self, number: int) -> np.ndarray:
        """Return the global batches of a pass, [batches, batch_size]."""
        random = np.random.default_rng([self.seed, number])  # their sum would make seed 0's pass 1 seed 1's pass 0
        batches = -(-self.rows // self.batch_size)
        order = np.resize(random.permutation(self.rows), batches * self.batch_size)
        if self.lengths is None:
            return order.reshape(batches, self.batch_size)
        runs = np.split(order, range(MEGABATCH * self.batch_size, len(order), MEGABATCH * self.batch_size))
        order = np.concatenate([run[np.argsort(self.lengths[run], kind="stable")] for run in runs])
        return random.permutation(order.reshape(batches, self.batch_size))


class HeldOutSampler(Resumable, Sampler[list[int]]):
    """Yield, for each round, the rows to train on and as many that are held out from training.

    Args:
        parts: For both: the numbers of their rows, [rows], and the sampler of places among these.
    """

    def __init__(self, *parts: tuple[np.ndarray, RoundSampler]) -> None:
        self.parts, self.rounds = parts, len(parts[0][1])

    def _from(self, start: int) -> Iterator[list[int]]:
        for chosen in zip(*(sampler._from(start) for _, sampler in self.parts), strict=True):
            pairs = zip(self.parts, chosen, strict=True)
            yield [number for (rows, _), places in pairs for number in rows[places].tolist()]


class StreamRounds(Resumable, IterableDataset):
    """Yield this rank's rows of each round from a stream that is started again, reshuffled, when it ends.

    Resuming reads the stream again up to the round, which is exact; the shuffle buffer's own state is not.
    Every rank reads the whole stream and a single reader keeps its order. ``batch_size`` is that of all ranks.

    Raises while iterating:
        DataError: If a whole pass gives no row.
    """

    def __init__(
        self, stream: datasets.IterableDataset, batch_size: int, rounds: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.stream, self.batch_size, self.rounds = stream, batch_size, rounds
        self.part = rank_slice(batch_size, rank, world_size)

    def _from(self, start: int) -> Iterator[list[dict[str, Any]]]:
        rows = islice(self._rows(), start * self.batch_size, None)
        for _ in range(start, self.rounds):
            yield list(islice(rows, self.batch_size))[self.part]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number in count():
            self.stream.set_epoch(number)
            row = None
            for row in self.stream:
                yield row
            if row is None:
                raise DataError("the train stream gave no row; if all were dropped, raise the length limits")


def rank_batches(rows: int, size: int, rank: int, world_size: int) -> list[range]:
    """Return batches of every ``world_size``-th row, equally many for all ranks.

    A rank whose rows fill one batch fewer than another's halves its last one, unless that is a single row. All ranks
    then run the Pilot equally often, as they must where it is divided among them.

    >>> [[*batch] for rank in (0, 1) for batch in rank_batches(9, size=4, rank=rank, world_size=2)]
    [[0, 2, 4, 6], [8], [1, 3], [5, 7]]
    """
    own, most = range(rows)[rank::world_size], len(range(0, rows, world_size))
    batches = [own[first : first + size] for first in range(0, len(own), size)]
    if most > len(batches) * size and batches and len(batches[-1]) > 1:
        last = batches.pop()
        batches += [last[: len(last) // 2], last[len(last) // 2 :]]
    return batches


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return which rows of a global batch belong to a rank.

    >>> rank_slice(64, rank=1, world_size=2)
    slice(32, 64, None)

    Raises:
        DataError: If the batch cannot be divided evenly.
    """
    if batch_size % world_size:
        raise DataError(
            f"data.batch_size={batch_size} is the global batch and does not divide by {world_size} processes; "
            f"use {batch_size // world_size * world_size or world_size} or another multiple of {world_size}."
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
