"""Tells the directory which named blocks a worker's store holds, from a thread of its own.

Called by ``attention``, and by ``dense`` if its own store holds spans. Engines ask the directory which shards
may hold a prefix; an announcement is a hint, so a lost or late one costs a hit or a look-up and nothing else.
The thread reads the store's log of names and never takes the store's lock. It must not know blocks or spans.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from farshore.errors import FarshoreError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import RENEW_S, Announcement, Directory
from farshore.kvstore.prefix import NameLog
from farshore.periodic import PeriodicThread

PROBE_S = 2.0
"""Time between two announcements without a change. They show whether the directory lost something."""
MOST_NAMES = 8192
"""Names in one announcement, about 280 KB."""


_LOG = logging.getLogger(__name__)


class Announcer:
    """Announces every ``period_s`` from :meth:`start` until :meth:`end`. ``clock``: seconds, monotonic."""

    def __init__(
        self,
        directory: Directory,
        worker: WorkerId,
        names: NameLog,
        *,
        period_s: float = RENEW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._worker = worker
        self._names = names
        self._clock = clock
        self._seen = 0
        """Number of the latest change in ``names`` that the directory knows; 0: announce all names."""
        self._known = 0
        """Number of the latest announcement that the directory confirmed."""
        self._sent = 0
        """Number of the latest announcement. Never used twice: one that was not answered may have arrived."""
        self._answered_s = clock()
        self._thread = PeriodicThread(self.announce, name="announce", period_s=period_s, tell=_tell)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ends the thread, if it was started, after the call under way. Idempotent."""
        self._thread.stop()

    def announce(self) -> None:
        """Announces what changed since the last call. Raises FarshoreError if the directory does not answer.

        Called by the thread, and by nothing else while that runs.
        """
        changes = self._names.changes(self._seen)
        changed = changes.since != self._seen or changes.added or changes.removed
        if not changed and self._clock() - self._answered_s < PROBE_S:
            return
        for index, (added, removed) in enumerate(_pieces(changes.added, changes.removed)):
            self._sent += 1
            since = self._known if index or changes.since else 0
            blocks = Announcement(since=since, until=self._sent, added=added, removed=removed)
            if self._directory.announce(self._worker, blocks) != self._sent:
                self._seen = 0  # The directory lost or missed something, or does not list this worker yet.
                return
            self._known = self._sent
        self._seen = changes.until
        self._answered_s = self._clock()


def _tell(error: Exception) -> None:
    """Logs what is not expected. A directory that is away hears what changed when it answers."""
    if not isinstance(error, FarshoreError):
        _LOG.error("blocks can't be announced", exc_info=error)


def _pieces(
    added: Sequence[bytes], removed: Sequence[bytes]
) -> Iterator[tuple[tuple[bytes, ...], tuple[bytes, ...]]]:
    """Cuts changes into pieces of MOST_NAMES at most; one piece of nothing if there are none."""
    for first in range(0, max(len(added), len(removed), 1), MOST_NAMES // 2):
        chunk = slice(first, first + MOST_NAMES // 2)
        yield tuple(added[chunk]), tuple(removed[chunk])
