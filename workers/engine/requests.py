"""Requests that an engine has taken on: what its callers' threads and its own share, behind one lock.

Callers reserve, add and cancel; the engine's thread waits for news, takes what waits first, and forgets what
has ended. It must not know memory, models or how sequences run.
"""

import threading
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from farshore.errors import FarshoreError, InvalidRequest, Overloaded
from farshore.ids import SequenceId
from farshore.workers.engine.sequence import Sequence


class Requests:
    """A request is one sequence until it is forked, then one for each completion. ``most_waiting``: beyond,
    requests are refused."""

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._wake = threading.Condition()
        self._news = False
        self._ending: FarshoreError | None = None
        self._orders = count()
        self._reserved: set[SequenceId] = set()
        self._live: dict[SequenceId, list[Sequence]] = {}  # by request: its sequences that are not complete
        self._waiting: list[Sequence] = []  # by order, then choice
        self._new = 0  # of those that wait: never placed yet

    @contextmanager
    def reserve(self, request: SequenceId) -> Iterator[int]:
        """A place in the queue, for :meth:`add` inside the context: the order of the request.

        Raises what :meth:`stop` was given where the engine is stopping, InvalidRequest for an id that is in
        use, Overloaded when the queue is full.
        """
        with self._wake:
            self._refuse_if_stopping()
            if request in self._live or request in self._reserved:
                raise InvalidRequest(f"sequence {request} is running already: choose another id")
            if self._new + len(self._reserved) >= self._most_waiting:
                raise Overloaded(f"{self._most_waiting} requests are waiting: try again in a few seconds")
            self._reserved.add(request)
            order = next(self._orders)
        try:
            yield order
        finally:
            with self._wake:
                self._reserved.discard(request)

    def add(self, sequence: Sequence) -> None:
        """It waits. Raises where the engine stopped meanwhile."""
        with self._wake:
            self._refuse_if_stopping()
            self._live[sequence.id] = [sequence]
            self._new += 1
            self._wait_in_order(sequence)

    def add_fork(self, sequence: Sequence, fork: Sequence) -> None:
        """Another completion of the request of ``sequence``; cancelled if that is."""
        with self._wake:
            self._live[sequence.id].append(fork)
            if sequence.cancelled.is_set():
                fork.cancelled.set()

    def park(self, sequence: Sequence) -> None:
        """A sequence that ran waits again, before all that were taken on later."""
        with self._wake:
            self._wait_in_order(sequence)

    def cancel(self, request: SequenceId, *, choice: int | None = None) -> None:
        """Mark all of a request, or one of its completions. Unknown ones are ignored."""
        with self._wake:
            for it in self._live.get(request, ()):
                if choice is None or choice == it.choice:
                    it.cancelled.set()
        self.wake()

    def stop(self, ending: FarshoreError) -> None:
        """Nothing is added from now on: callers get ``ending``. :meth:`await_news` returns False."""
        with self._wake:
            self._ending = self._ending or ending
        self.wake()

    def wake(self) -> None:
        """There is news for the engine's thread."""
        with self._wake:
            self._news = True
            self._wake.notify_all()

    def await_news(self, timeout_s: float | None) -> bool:
        """Wait until there is news since the last call, or ``timeout_s`` is over (0: not at all; None: there
        is a request at least); False: stop instead."""
        with self._wake:
            if timeout_s is None:
                self._wake.wait_for(lambda: self._ending or self._live)
            else:
                self._wake.wait_for(lambda: self._ending or self._news, timeout=timeout_s)
            self._news = False
            return self._ending is None

    def first_waiting(self) -> Sequence | None:
        with self._wake:
            return self._waiting[0] if self._waiting else None

    def begin(self, sequence: Sequence) -> None:
        """It waits no more."""
        with self._wake:
            self._leave(sequence)

    def forget(self, sequence: Sequence) -> bool:
        """It is complete. False: it was before."""
        with self._wake:
            together = self._live.get(sequence.id, [])
            if sequence not in together:
                return False
            together.remove(sequence)
            if not together:
                del self._live[sequence.id]
            if sequence in self._waiting:
                self._leave(sequence)
            return True

    def of(self, request: SequenceId) -> list[Sequence]:
        """A request's sequences that are not complete."""
        with self._wake:
            return list(self._live.get(request, ()))

    def all(self) -> list[Sequence]:
        with self._wake:
            return [sequence for sequences in self._live.values() for sequence in sequences]

    def load(self) -> tuple[int, int, int]:
        """Requests (running or prefilling, waiting for their first placement), and parked choices."""
        with self._wake:
            return len(self._live) - self._new, self._new, len(self._waiting) - self._new

    def _wait_in_order(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda it: (it.order, it.choice))
        self._news = True
        self._wake.notify_all()

    def _leave(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._new -= sequence.queued_s is None

    def _refuse_if_stopping(self) -> None:
        if self._ending is not None:
            raise self._ending.with_traceback(None)
