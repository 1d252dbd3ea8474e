"""Which rows a run has trained on before the round at hand."""

from __future__ import annotations

from tcopilot.processes import gather


class Visits:
    """Remembers the rows of all rounds and processes, so that a log can keep to errors from before training on a row.

    Rows of one round are traced before its update, in however many micro-batches: all of them are first visits.
    """

    def __init__(self) -> None:
        self._before: set[int] = set()
        self._now: set[int] = set()

    def first(self, ids: list[int], extend: bool) -> list[bool]:
        """Note rows and tell which were in no earlier round; every process calls this for its part of a micro-batch.

        Args:
            ids: row ids.
            extend: they belong to the round of the last call, as a further micro-batch.
        """
        if not extend:
            self._before |= self._now
            self._now = set()
        self._now.update(gather(ids))
        return [number not in self._before for number in ids]

    @property
    def ids(self) -> list[int]:
        """All rows so far, in order; for a checkpoint, which is taken between rounds."""
        return sorted(self._before | self._now)

    @ids.setter
    def ids(self, ids: list[int]) -> None:
        self._before, self._now = set(ids), set()
