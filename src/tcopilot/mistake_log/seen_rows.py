"""Which rows occurred in earlier rounds."""

from tcopilot.processes import gather


class SeenRows:
    """Remembers the ids of the rows of all rounds.

    The rows of one round are run before its update, in however many micro-batches: none of them makes another of the
    same round a repeated one.

    Args:
        of_all_processes: whether the rows of all processes count. Every process must then call `new` for its part of
            each micro-batch.
    """

    def __init__(self, of_all_processes: bool = False) -> None:
        self._gather = gather if of_all_processes else list
        self._before: set[int] = set()
        self._now: set[int] = set()
        self._round: int | None = None

    def new(self, ids: list[int], round: int) -> list[bool]:
        """Remember rows of a round, and tell of each whether it was in no earlier round."""
        if round != self._round:
            self._before |= self._now
            self._now, self._round = set(), round
        self._now.update(self._gather(ids))
        return [number not in self._before for number in ids]

    @property
    def ids(self) -> list[int]:
        """All rows so far, in order; for a checkpoint, which is taken between rounds."""
        return sorted(self._before | self._now)

    @ids.setter
    def ids(self, ids: list[int]) -> None:
        self._before, self._now, self._round = set(ids), set(), None
