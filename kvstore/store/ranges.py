"""Sets of integer ranges: which tokens of a layer were written, which bytes of an arena are committed.

Kept as a few numbers, since what is added mostly adjoins what is there. It must not know what the ranges are
of.
"""


class Ranges:
    """A set of integers kept as disjoint, ordered half-open ranges that do not touch. Not thread-safe."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """How many integers are in the set."""
        return sum(b - a for a, b in self._ranges)

    def add(self, first: int, last: int) -> None:
        if first >= last:
            return
        apart = []
        for a, b in self._ranges:
            if b < first or a > last:
                apart.append((a, b))
            else:
                first, last = min(a, first), max(b, last)
        self._ranges = sorted([*apart, (first, last)])

    def remove(self, first: int, last: int) -> None:
        kept = []
        for a, b in self._ranges:
            kept += [(a, min(b, first)), (max(a, last), b)] if a < last and first < b else [(a, b)]
        self._ranges = [(a, b) for a, b in kept if a < b]

    def cover(self, first: int, last: int) -> bool:
        """Whether all of ``[first, last)`` is in the set."""
        return first >= last or any(a <= first and last <= b for a, b in self._ranges)

    def within(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of ``[first, last)`` that are in the set, in order."""
        cut = [(max(a, first), min(b, last)) for a, b in self._ranges]
        return [(a, b) for a, b in cut if a < b]
