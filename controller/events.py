"""The newest events of the cluster, numbered, for all that watch it.

Written by ``loop``, read by ``service``. Soft state: a restarted controller begins anew, unless the directory
keeps events.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from farshore.errors import FarshoreError
from farshore.kvstore.directory.base import MOST_EVENTS, ClusterEvent

REPEATED = 50
"""A directory that was replaced may lack the newest events that were published."""

_LOG = logging.getLogger(__name__)


class Events:
    """Thread-safe. Keeps the newest MOST_EVENTS.

    ``earlier``: those of the controller before. ``publish``: is given each new event, after REPEATED older
    ones, in order. Events for which it raises a FarshoreError are given again with the next one.
    """

    def __init__(
        self,
        earlier: Iterable[ClusterEvent] = (),
        *,
        publish: Callable[[list[ClusterEvent]], None] | None = None,
    ) -> None:
        self._changed = threading.Condition()
        self._events: deque[ClusterEvent] = deque(earlier, maxlen=MOST_EVENTS)
        self._next = self._events[-1].number + 1 if self._events else 1
        self._publish = publish
        self._publishing = threading.Lock()
        self._published = self._next - 1

    def add(self, kind: str, subject: str, detail: str = "") -> None:
        with self._changed:
            self._events.append(ClusterEvent(self._next, time.time(), kind, subject, detail))
            self._next += 1
            self._changed.notify_all()
        self._publish_all()

    def since(self, number: int, *, timeout_s: float = 0.0) -> list[ClusterEvent]:
        """The events with numbers above ``number``. Waits for the first of them, ``timeout_s`` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._next - 1 > number, timeout_s)
            return [event for event in self._events if event.number > number]

    def _publish_all(self) -> None:
        if self._publish is None:
            return
        with self._publishing:
            events = self.since(self._published - REPEATED)
            if events[-1].number == self._published:
                return
            try:
                self._publish(events)
                self._published = events[-1].number
            except FarshoreError as error:
                _LOG.debug("an event is not published: %s", error)
