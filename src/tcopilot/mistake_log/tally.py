"""Running sums over many slots that change one at a time."""

from __future__ import annotations

from collections.abc import Iterable


class Tally:
    """Whole numbers in slots and the sums before each of them: every change and every search takes O(log n) steps.

    A Fenwick tree that grows at its end. Whole numbers keep the sums exact, so a sum does not depend on its history.

    >>> tally = Tally([3, 0, 4])
    >>> tally.total, tally.before(2), tally.find(2), tally.find(3)
    (7, 3, (0, 2), (2, 0))
    """

    def __init__(self, values: Iterable[int] = ()) -> None:
        self.total = 0
        self._values: list[int] = []
        self._tree = [0]  # node i ≥ 1 is the sum of the last (i & -i) slots up to slot i − 1
        for value in values:
            self.append(value)

    def append(self, value: int) -> None:
        """Add a slot at the end."""
        node = len(self._tree)
        total, child = value, node - 1
        while child > node - (node & -node):
            total += self._tree[child]
            child &= child - 1
        self._values.append(value)
        self._tree.append(total)
        self.total += value

    def __setitem__(self, slot: int, value: int) -> None:
        change = value - self._values[slot]
        self._values[slot] = value
        self.total += change
        node = slot + 1
        while node < len(self._tree):
            self._tree[node] += change
            node += node & -node

    def only(self, slots: Iterable[int]) -> Tally:
        """Make a tally of some of the slots."""
        return Tally(self._values[slot] for slot in slots)

    def before(self, slot: int) -> int:
        """Sum of the slots before this one."""
        total = 0
        while slot:
            total += self._tree[slot]
            slot &= slot - 1
        return total

    def find(self, target: int) -> tuple[int, int]:
        """Return the slot in which the running sum passes `target`, and how far into the slot that is.

        Args:
            target: from 0 to `total` − 1. Drawn uniformly, it finds each slot in proportion to its value.
        """
        slot, step = 0, 1 << (len(self._values).bit_length() - 1)
        while step:
            node = slot + step
            if node < len(self._tree) and self._tree[node] <= target:
                slot, target = node, target - self._tree[node]
            step >>= 1
        return slot, target
