"""The directory in one process: the controller's.

See ``base`` for the contract. It must not know gRPC.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence

from farshore.ids import WorkerId
from farshore.kvstore.directory.base import LEASE_S, SETTLE_S, Announcement, Listing, WorkerRecord
from farshore.kvstore.directory.locations import Locations


class EmbeddedDirectory:
    """A :class:`~farshore.kvstore.directory.base.Directory`. Calls wait for one lock and for nothing else.

    ``restarted``: another directory of the same cluster was lost, so workers may exist that are not listed
    yet. ``clock``: seconds, monotonic.
    """

    def __init__(self, *, restarted: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._expires_s: dict[WorkerId, float] = {}
        self._closed: frozenset[WorkerId] = frozenset()
        self._draining: frozenset[WorkerId] = frozenset()
        self._locations = Locations()
        now_s = clock()
        self._called_s = now_s
        self._settles_s = now_s + SETTLE_S if restarted else now_s

    def renew(self, record: WorkerRecord) -> None:
        with self._lock:
            now_s = self._notice_pause()
            self._records[record.worker] = record
            self._expires_s[record.worker] = now_s + LEASE_S

    def withdraw(self, worker: WorkerId) -> None:
        with self._lock:
            self._notice_pause()
            self._forget(worker)

    def close(self, workers: Collection[WorkerId], *, draining: Collection[WorkerId] = ()) -> None:
        with self._lock:
            self._notice_pause()
            self._draining = frozenset(draining)
            self._closed = self._draining.union(workers)

    def listing(self) -> Listing:
        with self._lock:
            now_s = self._expire()
            records = sorted(self._records.values(), key=lambda record: (record.slot, record.worker))
            return Listing(
                workers=tuple(records),
                closed=self._closed & self._records.keys(),
                settled=now_s >= self._settles_s,
                draining=self._draining & self._records.keys(),
            )

    def announce(self, worker: WorkerId, blocks: Announcement) -> int:
        with self._lock:
            self._expire()
            return self._locations.announce(worker, blocks) if worker in self._records else 0

    def find_prefix(self, hashes: Sequence[bytes]) -> list[frozenset[WorkerId]]:
        with self._lock:
            self._expire()
            return self._locations.find(hashes)

    def disconnect(self) -> None:
        """Does nothing: there is no connection."""

    def _expire(self) -> float:
        """Drops the workers whose lease ran out. Returns the time now."""
        now_s = self._notice_pause()
        for worker in [worker for worker, end_s in self._expires_s.items() if end_s <= now_s]:
            self._forget(worker)
        return now_s

    def _forget(self, worker: WorkerId) -> None:
        self._records.pop(worker, None)
        self._expires_s.pop(worker, None)
        self._locations.forget(worker)

    def _notice_pause(self) -> float:
        """The time now. A gap of LEASE_S between two calls means that this process was paused, since its
        owner lists the workers more often: no lease runs out before SETTLE_S have passed again."""
        now_s = self._clock()
        if now_s - self._called_s >= LEASE_S:
            self._settles_s = now_s + SETTLE_S
            self._expires_s = dict.fromkeys(self._expires_s, self._settles_s)
        self._called_s = now_s
        return now_s
