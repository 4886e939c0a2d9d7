"""Which workers announced which blocks: the embedded directory's index.

Called by ``embedded`` under its lock, so it is not thread-safe. It must not know leases.
"""

from collections.abc import Iterable, Sequence

from farshore.ids import WorkerId
from farshore.kvstore.directory.base import MOST_BLOCKS, Announcement, block_keys, look_up_keys

_NONE: frozenset[WorkerId] = frozenset()


class Locations:
    """See :meth:`~farshore.kvstore.directory.base.Directory.announce` for the numbers."""

    def __init__(self) -> None:
        self._holders: dict[bytes, frozenset[WorkerId]] = {}
        self._blocks: dict[WorkerId, set[bytes]] = {}
        self._known: dict[WorkerId, int] = {}
        # Most blocks have one holder, so that they share one set, and a block costs an entry only.
        self._alone: dict[WorkerId, frozenset[WorkerId]] = {}

    def announce(self, worker: WorkerId, blocks: Announcement) -> int:
        """Returns the number up to which the worker's changes are known."""
        added, removed = block_keys(blocks.added), block_keys(blocks.removed)
        if blocks.since == 0:
            self.forget(worker)
        elif blocks.since != self._known.get(worker, 0):
            return self._known.get(worker, 0)
        held = self._blocks.setdefault(worker, set())
        self._alone.setdefault(worker, frozenset({worker}))
        self._remove(worker, held.intersection(removed))
        for key in added:
            if len(held) >= MOST_BLOCKS:
                break
            held.add(key)
            holders = self._holders.get(key, _NONE)
            self._holders[key] = holders | {worker} if holders else self._alone[worker]
        self._known[worker] = blocks.until
        return blocks.until

    def find(self, hashes: Sequence[bytes]) -> list[frozenset[WorkerId]]:
        return [self._holders.get(key, _NONE) for key in look_up_keys(hashes)]

    def forget(self, worker: WorkerId) -> None:
        """Drops all that the worker announced."""
        self._remove(worker, set(self._blocks.get(worker, ())))
        for known in (self._blocks, self._known, self._alone):
            known.pop(worker, None)

    def _remove(self, worker: WorkerId, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._blocks[worker].discard(key)
            left = self._holders[key] - {worker}
            if not left:
                del self._holders[key]
            else:
                self._holders[key] = self._alone[min(left)] if len(left) == 1 else left
