"""Sets of token ranges: which tokens of a layer have been written.

The store asks before it seals. A few numbers per layer, since writers go forward. It must not know what the
ranges are of.
"""


class Ranges:
    """A set of integers kept as disjoint, ordered half-open ranges that do not touch. Not thread-safe."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

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

    def cover(self, first: int, last: int) -> bool:
        """Whether all of ``[first, last)`` is in the set."""
        return first >= last or any(a <= first and last <= b for a, b in self._ranges)

    def remove_below(self, mark: int) -> None:
        self._ranges = [(max(a, mark), b) for a, b in self._ranges if b > mark]
