"""The accepted requests of an engine: state that its callers' threads and its own share behind one lock.

Callers reserve, add and cancel; the engine's thread waits for news, takes the first waiting sequence and
forgets finished ones. Called by ``engine`` and ``scheduler``. It must not know memory, models or how
sequences run.
"""

import threading
from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count

from farshore.errors import FarshoreError, InvalidRequest, Overloaded
from farshore.ids import SequenceId
from farshore.workers.engine.sequence import Sequence


class Requests:
    """The live requests of one engine. Thread-safe.

    A request is one sequence until it is forked, then one sequence for each of its completions. At most
    ``max_waiting`` requests wait for their first placement; further ones are refused.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._wake = threading.Condition()
        self._news = False
        self._roused = False
        self._ending: FarshoreError | None = None
        self._refusal: FarshoreError | None = None
        self._orders = count()
        self._reserved: set[SequenceId] = set()
        self._live: dict[SequenceId, list[Sequence]] = {}
        """Request id -> its sequences that have not ended."""
        self._waiting: list[Sequence] = []
        """Sorted by :func:`_queue_key`."""
        self._admissions = count(1)
        self._new = 0
        """Number of waiting sequences that were never placed."""

    @contextmanager
    def reserve(self, request: SequenceId) -> Iterator[int]:
        """Reserves a place in the queue; yields the request's order. Call :meth:`add` inside the context.

        Raises the error given to :meth:`refuse` or :meth:`stop`, InvalidRequest if the id is in use,
        Overloaded if the queue is full.
        """
        with self._wake:
            self._refuse_if_told()
            if request in self._live or request in self._reserved:
                raise InvalidRequest(f"sequence {request} is running already: choose another id")
            if self._new + len(self._reserved) >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests are waiting: try again in a few seconds")
            self._reserved.add(request)
            order = next(self._orders)
        try:
            yield order
        finally:
            with self._wake:
                self._reserved.discard(request)

    def add(self, sequence: Sequence) -> None:
        """Queues a new request's sequence.

        Raises the error given to :meth:`refuse` or :meth:`stop`.
        """
        with self._wake:
            self._refuse_if_told()
            self._live[sequence.id] = [sequence]
            self._new += 1
            self._queue_in_order(sequence)

    def add_fork(self, sequence: Sequence, fork: Sequence) -> None:
        """Adds another completion of the request of ``sequence``; cancels it if ``sequence`` is cancelled."""
        with self._wake:
            self._live[sequence.id].append(fork)
            if sequence.cancelled.is_set():
                fork.cancelled.set()

    def park(self, sequence: Sequence) -> None:
        """Queues a sequence that ran, ahead of all that never ran and of those that were admitted later."""
        with self._wake:
            self._queue_in_order(sequence)

    def cancel(self, request: SequenceId, *, choice: int | None = None) -> None:
        """Marks a request, or one of its completions, as cancelled. Unknown ids are ignored."""
        with self._wake:
            for sequence in self._live.get(request, ()):
                if choice is None or choice == sequence.choice:
                    sequence.cancelled.set()
        self.wake()

    def refuse(self, refusal: FarshoreError | None) -> None:
        """Refuses new requests from now on with ``refusal``; None: accepts them again."""
        with self._wake:
            self._refusal = refusal

    def stop(self, ending: FarshoreError) -> None:
        """Refuses new requests from now on with ``ending``, and makes :meth:`await_news` return False."""
        with self._wake:
            self._ending = self._ending or ending
        self.wake()

    def wake(self) -> None:
        """Wakes the engine's thread: something changed that it may act on."""
        with self._wake:
            self._news = True
            self._wake.notify_all()

    def rouse(self) -> None:
        """Wakes the engine's thread even if there is no live request."""
        with self._wake:
            self._news = self._roused = True
            self._wake.notify_all()

    def await_news(self, timeout_s: float | None) -> bool:
        """Blocks until there is news since the last call, for ``timeout_s`` at most. Returns False to stop.

        0 does not block; None blocks until there is at least one live request, or until :meth:`rouse`.
        """
        with self._wake:
            if timeout_s is None:
                self._wake.wait_for(lambda: self._ending or self._live or self._roused)
            else:
                self._wake.wait_for(lambda: self._ending or self._news, timeout=timeout_s)
            self._news = self._roused = False
            return self._ending is None

    def first_waiting(self) -> Sequence | None:
        """Returns the waiting sequence that is to be placed next, or None."""
        with self._wake:
            return self._waiting[0] if self._waiting else None

    def mark_placed(self, sequence: Sequence) -> None:
        """Removes a placed sequence from the queue. Call it before ``sequence.queued_s`` is set."""
        with self._wake:
            if sequence.queued_s is None:
                sequence.admitted = next(self._admissions)
            self._unqueue(sequence)

    def forget(self, sequence: Sequence) -> bool:
        """Removes a sequence that has ended. Returns False if it was removed before."""
        with self._wake:
            siblings = self._live.get(sequence.id, [])
            if sequence not in siblings:
                return False
            siblings.remove(sequence)
            if not siblings:
                del self._live[sequence.id]
            if sequence in self._waiting:
                self._unqueue(sequence)
            return True

    def of(self, request: SequenceId) -> list[Sequence]:
        """Returns the request's sequences that have not ended."""
        with self._wake:
            return list(self._live.get(request, ()))

    def all(self) -> list[Sequence]:
        """Returns all sequences that have not ended."""
        with self._wake:
            return [sequence for sequences in self._live.values() for sequence in sequences]

    @property
    def ending(self) -> FarshoreError | None:
        """The error given to :meth:`stop`; None while the engine runs."""
        return self._ending

    def load(self) -> tuple[int, int, int]:
        """Returns (requests that were placed, requests that were not placed yet, parked choices)."""
        with self._wake:
            return len(self._live) - self._new, self._new, len(self._waiting) - self._new

    def _queue_in_order(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_queue_key)
        self._news = True
        self._wake.notify_all()

    def _unqueue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._new -= sequence.queued_s is None

    def _refuse_if_told(self) -> None:
        if refusal := self._ending or self._refusal:
            raise refusal.with_traceback(None)


def _queue_key(sequence: Sequence) -> tuple[bool, int, int, int]:
    """The place in the queue. Priority counts until the first placement: what was parked continues before
    others begin, so that a stream of urgent requests does not end it (invariant 11, docs/architecture.md)."""
    if sequence.queued_s is None:
        return True, sequence.priority, sequence.order, sequence.choice
    return False, 0, sequence.admitted, sequence.choice


def victims(placed: Iterable[Sequence]) -> list[Sequence]:
    """Chooses the sequences to park among those that have memory: all choices of the request that was
    admitted last.

    If only one request has memory, chooses its last choice, and [] if that is its only one. So the first
    choice of the request that was admitted first always finishes (invariant 11, docs/architecture.md).
    Priorities do not matter here: parking the least urgent request could keep it from ever finishing.
    """
    by_age = sorted(placed, key=lambda sequence: (sequence.admitted, sequence.choice))
    if len(by_age) < 2:
        return []
    oldest, newest = by_age[0], by_age[-1]
    if oldest.admitted == newest.admitted:
        return [newest]
    return [sequence for sequence in by_age if sequence.admitted == newest.admitted]
