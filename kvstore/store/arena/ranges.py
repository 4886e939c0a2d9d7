"""Sets of integers as ranges: the written tokens of a layer, the committed bytes of an arena.

A few ranges represent such a set, since additions mostly adjoin a range in it. Called by ``store`` and
``pages``. It must not know the meaning of the integers.
"""


class Ranges:
    """A set of integers as disjoint half-open ranges, in order, that do not touch. Not thread-safe."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """How many integers are in the set."""
        return sum(b - a for a, b in self._ranges)

    def add(self, first: int, last: int) -> None:
        """Adds ``[first, last)``."""
        if first >= last:
            return
        disjoint = []
        for a, b in self._ranges:
            if b < first or a > last:
                disjoint.append((a, b))
            else:
                first, last = min(a, first), max(b, last)
        self._ranges = sorted([*disjoint, (first, last)])

    def remove(self, first: int, last: int) -> None:
        """Removes ``[first, last)``."""
        kept = []
        for a, b in self._ranges:
            kept += [(a, min(b, first)), (max(a, last), b)] if a < last and first < b else [(a, b)]
        self._ranges = [(a, b) for a, b in kept if a < b]

    def cover(self, first: int, last: int) -> bool:
        """Whether all of ``[first, last)`` is in the set."""
        return first >= last or any(a <= first and last <= b for a, b in self._ranges)

    def within(self, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges of ``[first, last)`` that are in the set, in order."""
        cut = [(max(a, first), min(b, last)) for a, b in self._ranges]
        return [(a, b) for a, b in cut if a < b]
