"""Requests that an engine has taken on: what its callers' threads and its own share, behind one lock.

Callers reserve, add and cancel; the engine's thread waits for work, takes what waits first, and forgets what
has ended. It must not know memory, models or how sequences run.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from farshore.errors import InvalidRequest, Overloaded, TransportError
from farshore.ids import SequenceId
from farshore.workers.sequence import Sequence


class Requests:
    """A request is one sequence until it is forked, then one for each completion. ``most_waiting``: beyond,
    requests are refused."""

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._wake = threading.Condition()
        self._stopping = False
        self._reserved: set[SequenceId] = set()
        self._live: dict[SequenceId, list[Sequence]] = {}  # by request: its sequences that are not complete
        self._waiting: deque[Sequence] = deque()

    @contextmanager
    def reserve(self, request: SequenceId) -> Iterator[None]:
        """A place in the queue, for :meth:`add` inside the context.

        Raises TransportError where the engine is stopping, InvalidRequest for an id that is in use,
        Overloaded when the queue is full.
        """
        with self._wake:
            self._refuse_if_stopping()
            if request in self._live or request in self._reserved:
                raise InvalidRequest(f"sequence {request} is running already: choose another id")
            if len(self._waiting) + len(self._reserved) >= self._most_waiting:
                raise Overloaded(f"{self._most_waiting} requests are waiting: try again in a few seconds")
            self._reserved.add(request)
        try:
            yield
        finally:
            with self._wake:
                self._reserved.discard(request)

    def add(self, sequence: Sequence) -> None:
        """It waits. Raises TransportError where the engine stopped meanwhile."""
        with self._wake:
            self._refuse_if_stopping()
            self._live[sequence.id] = [sequence]
            self._waiting.append(sequence)
            self._wake.notify_all()

    def add_fork(self, sequence: Sequence, fork: Sequence) -> None:
        """Another completion of the request of ``sequence``; cancelled if that is."""
        with self._wake:
            self._live[sequence.request_id].append(fork)
            if sequence.cancelled.is_set():
                fork.cancelled.set()

    def cancel(self, request: SequenceId, *, choice: int | None = None) -> None:
        """Mark all of a request, or one of its completions. Unknown ones are ignored."""
        with self._wake:
            for it in self._live.get(request, ()):
                if choice is None or choice == it.choice:
                    it.cancelled.set()
            self._wake.notify_all()

    def stop(self) -> None:
        """Nothing is added from now on, and :meth:`await_work` returns False."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def await_work(self) -> bool:
        """Wait until there is a request; False: stop instead."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._live)
            return not self._stopping

    def first_waiting(self) -> Sequence | None:
        with self._wake:
            return self._waiting[0] if self._waiting else None

    def begin(self, sequence: Sequence) -> None:
        """It waits no more."""
        with self._wake:
            self._waiting.remove(sequence)

    def forget(self, sequence: Sequence) -> bool:
        """It is complete. False: it was before."""
        with self._wake:
            together = self._live.get(sequence.request_id, [])
            if sequence not in together:
                return False
            together.remove(sequence)
            if not together:
                del self._live[sequence.request_id]
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            return True

    def of(self, request: SequenceId) -> list[Sequence]:
        """A request's sequences that are not complete."""
        with self._wake:
            return list(self._live.get(request, ()))

    def all(self) -> list[Sequence]:
        with self._wake:
            return [sequence for sequences in self._live.values() for sequence in sequences]

    def load(self) -> tuple[int, int]:
        """(requests running or prefilling, requests waiting)."""
        with self._wake:
            return len(self._live) - len(self._waiting), len(self._waiting)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise TransportError("the engine is stopping")
