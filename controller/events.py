"""The newest events of the cluster, numbered, for everybody who watches it.

Written by ``loop``, read by ``service``. Soft state: a restarted controller begins anew.
"""

import threading
import time
from collections import deque
from typing import NamedTuple

MOST_EVENTS = 1000


class ClusterEvent(NamedTuple):
    """One event. ``kind``: started, joined, lost, replaced, killed or retired."""

    number: int
    unix_s: float
    kind: str
    subject: str
    """A worker's id, or its slot before it has one."""
    detail: str


class Events:
    """Thread-safe. Keeps the newest MOST_EVENTS."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[ClusterEvent] = deque(maxlen=MOST_EVENTS)
        self._next = 1

    def add(self, kind: str, subject: str, detail: str = "") -> None:
        with self._changed:
            self._events.append(ClusterEvent(self._next, time.time(), kind, subject, detail))
            self._next += 1
            self._changed.notify_all()

    def since(self, number: int, *, timeout_s: float = 0.0) -> list[ClusterEvent]:
        """The events with numbers above ``number``. Waits for the first of them, ``timeout_s`` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._next - 1 > number, timeout_s)
            return [event for event in self._events if event.number > number]
