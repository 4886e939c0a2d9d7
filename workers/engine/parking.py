"""Which running sequences give their memory back when there is not enough: a pure rule (design §2.11).

A parked sequence waits and goes on later; its named blocks stay as cache, the rest is computed again. Called
by ``engine``.
"""

from collections.abc import Iterable

from farshore.workers.sequence import Sequence


def victims(placed: Iterable[Sequence]) -> list[Sequence]:
    """Of the sequences that have memory: all choices of the request that was taken on last. The oldest
    request keeps its first choice, so that it always finishes: where there is no other request, its last
    choice, and [] where there is only one choice."""
    by_age = sorted(placed, key=lambda sequence: (sequence.order, sequence.choice))
    if len(by_age) < 2:
        return []
    oldest, newest = by_age[0], by_age[-1]
    if oldest.order == newest.order:
        return [newest]
    return [sequence for sequence in by_age if sequence.order == newest.order]
