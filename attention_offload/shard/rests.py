"""Lets a background thread rest between pieces of its work, so that threads that answer hot frames have the
cores.

Used by ``shard.imports`` in its copying threads. It must not know what a piece is.

A lower priority is not enough: a thread that was woken for a frame waits until the background thread's slice
is over, and both share the caches.
"""

import time
from collections.abc import Callable


class Rests:
    """The rests of one piece of work after another, in the thread that makes this object.

    ``share``: how much of a core the thread may take; 1 or more: it never rests. ``most_s``: how long all
    rests of the whole work may take together, whatever it costs. ``wait`` is called with the seconds of a
    rest. ``clock`` and ``cpu_clock``: monotonic seconds, and those that the thread has computed.
    """

    def __init__(
        self,
        *,
        share: float,
        most_s: float,
        wait: Callable[[float], object],
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._share = share
        self._most_s = most_s
        self._wait = wait
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._begin()

    def after(self, part: float) -> None:
        """Rests after a piece that is this part of the whole work; the parts add up to 1. Time in which the
        thread waited for the piece counts as rest."""
        passed_s, computed_s = self._clock() - self._begin_s, self._cpu_clock() - self._begin_cpu_s
        rest_s = min(computed_s / self._share - passed_s, self._most_s * part)
        if rest_s > 0:
            self._wait(rest_s)
        self._begin()

    def _begin(self) -> None:
        self._begin_s, self._begin_cpu_s = self._clock(), self._cpu_clock()
