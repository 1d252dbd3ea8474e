"""The order of training rows: a fixed number of rounds from repeated, reshuffled passes, resumable at any round.

Every rank draws the same global batches and takes its own slice, so all ranks together see what one process sees.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeVar

import datasets
import numpy as np
from torch.utils.data import IterableDataset, Sampler

from tcopilot.data.benchmarks import DataError

Item = TypeVar("Item")
MEGABATCH = 50  # batches whose rows are sorted by length together, a compromise between little padding and good mixing


class ResumableIterator(Iterator[Item]):
    """Iterator whose state is the number of items returned; ``begin`` makes an iterator from a given item on."""

    def __init__(self, begin: Callable[[int], Iterator[Item]]) -> None:
        self._begin = begin
        self.load_state_dict({"done": 0})

    def __next__(self) -> Item:
        item = next(self._items)
        self._done += 1
        return item

    def state_dict(self) -> dict[str, int]:
        """Return the number of items returned so far."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the items that were already returned."""
        self._done, self._items = state["done"], self._begin(state["done"])


class Resumable:
    """Iterate over ``rounds`` items and resume at any of them; ``_from`` makes an iterator from a given item on."""

    rounds: int
    _from: Callable[[int], Iterator[Any]]

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> ResumableIterator[Any]:
        return ResumableIterator(self._from)


class RoundSampler(Resumable, Sampler[list[int]]):
    """Yield the row indices of this rank's part of each round.

    A pass is a permutation of all rows that depends on seed and pass; rows from its start fill up the last batch. With
    ``lengths`` each run of 50 batches is sorted by length and cut into batches, and then all batches are shuffled.

    Args:
        rows: Number of rows, at least 1; or the indices of several pools of rows, each of which gives a batch to every
            round, one behind the other.
        batch_size: Number of rows in a global batch, over all ranks.
        rounds: Number of batches to yield.
        seed: Seed of the order; equal on all ranks.
        lengths: Length of each row in tokens, [rows]; None leaves the order purely random.
        rank: Rank of this process.
        world_size: Number of processes; divides ``batch_size``.
    """

    def __init__(
        self,
        rows: int | Sequence[np.ndarray],
        batch_size: int,
        rounds: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.pools = [np.arange(rows)] if isinstance(rows, int) else rows
        self.batch_size, self.rounds, self.seed = batch_size, rounds, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.part = rank_slice(batch_size, rank, world_size)

    def _from(self, start: int) -> Iterator[list[int]]:
        left = max(0, self.rounds - start)  # a run that goes on may have been given fewer rounds than it has done
        for parts in islice(zip(*(self._batches(pool, start) for pool in self.pools), strict=True), left):
            yield [row for part in parts for row in part[self.part].tolist()]

    def _batches(self, pool: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """Yield the global batches of a pool of rows from a round on, without end."""
        first, skip = divmod(start, -(-len(pool) // self.batch_size))
        return islice((batch for number in count(first) for batch in self._pass(pool, number)), skip, None)

    def _pass(self, pool: np.ndarray, number: int) -> np.ndarray:
        """Return the global batches of a pass, [batches, batch_size]."""
        random = np.random.default_rng([self.seed, number])  # by the sum, 0 + 1 and 1 + 0 would coincide
        batches = -(-len(pool) // self.batch_size)
        order = np.resize(random.permutation(pool), batches * self.batch_size)
        if self.lengths is None:
            return order.reshape(batches, self.batch_size)
        runs = np.split(order, range(MEGABATCH * self.batch_size, len(order), MEGABATCH * self.batch_size))
        order = np.concatenate([run[np.argsort(self.lengths[run], kind="stable")] for run in runs])
        return random.permutation(order.reshape(batches, self.batch_size))


class StreamRounds(Resumable, IterableDataset):
    """Yield this rank's rows of each round from a stream, which restarts with a new shuffle when it ends.

    Resuming reads the stream again up to the round, which is exact; restoring the shuffle buffer's state is not.
    Every rank reads the whole stream, by one reader, so that the order is kept. ``batch_size`` is the global batch.

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
                raise DataError("the train stream gave no row; if all were dropped as too long, raise the limits")


def rank_batches(rows: int, size: int, rank: int, world_size: int) -> list[range]:
    """Return the batches of one rank, which takes every ``world_size``-th row; all ranks get equally many batches.

    A rank with one batch fewer than the others splits its last one in two, unless that is a single row. All ranks must
    run the Pilot equally often if it is sharded among them.

    >>> [[*batch] for rank in (0, 1) for batch in rank_batches(9, size=4, rank=rank, world_size=2)]
    [[0, 2, 4, 6], [8], [1, 3], [5, 7]]
    """
    own, most = range(rows)[rank::world_size], len(range(0, rows, world_size))
    batches = [own[first : first + size] for first in range(0, len(own), size)]
    if most > len(batches) * size and batches and len(batches[-1]) > 1:
        last = batches.pop()
        batches += [last[: len(last) // 2], last[len(last) // 2 :]]
    return batches


def take_turns(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Return (part, index) pairs in an order in which all parts are used up evenly.

    >>> take_turns([4, 2])
    [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    """
    places = sorted(((i + 0.5) / size, part, i) for part, size in enumerate(sizes) for i in range(size))
    return [(part, i) for _, part, i in places]


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the slice of a global batch that belongs to a rank.

    >>> rank_slice(64, rank=1, world_size=2)
    slice(32, 64, None)

    Raises:
        DataError: If the batch cannot be divided evenly.
    """
    if batch_size % world_size:
        raise DataError(
            f"data.batch_size={batch_size} is the global batch, which cannot be divided by {world_size} processes; "
            f"use {batch_size // world_size * world_size or world_size} or another multiple of {world_size}."
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
