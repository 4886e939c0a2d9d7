"""How much prefill runs between two decode steps.

Running sequences see a token every (step + what runs between two of them); the second part is prefill, in
units of a few milliseconds. Their number follows from what steps and units have taken so far::

    ├──── step ────┼─ unit ─┼─ unit ─┼─ unit ─┼──── step ────┤
    │◀──────────── most_stall_ms ────────────▶│

Used by ``engine``. It must not know what a unit does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FORGETTING = 0.9
"""A longest time counts this much less at each measurement that stays below it."""


class PrefillPacer:
    """``most_stall_ms``: from one token to the next, at most, while prompts are prefilled. A single unit runs
    however long it takes."""

    def __init__(self, most_stall_ms: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most_stall_s = most_stall_ms / 1e3
        self._clock = clock
        self._step_s = 0.0
        self._unit_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """A decode step's time, failed attempts included."""
        start_s = self._clock()
        yield
        self._step_s = max(self._clock() - start_s, FORGETTING * self._step_s)

    def turn(self, unit: Callable[[], bool]) -> None:
        """Run ``unit``, once at least, until it says that there is no more, or the next one would be late."""
        start_s = now_s = self._clock()
        while unit():
            start_unit_s, now_s = now_s, self._clock()
            self._unit_s = max(now_s - start_unit_s, FORGETTING * self._unit_s)
            if now_s + self._unit_s + self._step_s > start_s + self._most_stall_s:
                return
