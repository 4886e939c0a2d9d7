"""Decides how much prefill runs between two decode steps.

A running sequence gets a token after each step plus the prefill units that run before it. The number of units
follows from the measured times of steps and units::

    ├──── step ────┼─ unit ─┼─ unit ─┼─ unit ─┼──── step ────┤
    │◀──────────── max_stall_ms ─────────────▶│

Called by ``scheduler``. It must not know what a unit does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FORGETTING = 0.9
"""The remembered longest time shrinks by this factor at each measurement below it."""


class PrefillPacer:
    """Paces the prefill units of one engine. Not thread-safe.

    ``max_stall_ms`` is the longest time between two tokens of a running sequence while prompts are prefilled.
    At least one unit runs between two steps, even if it takes longer.
    """

    def __init__(self, max_stall_ms: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._max_stall_s = max_stall_ms / 1e3
        self._clock = clock
        self._step_s = 0.0
        self._unit_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures a decode step, its retries included."""
        start_s = self._clock()
        yield
        self._step_s = max(self._clock() - start_s, FORGETTING * self._step_s)

    def run_units(self, run_unit: Callable[[], bool]) -> None:
        """Calls ``run_unit`` at least once, until it returns False or another unit would delay the step."""
        start_s = now_s = self._clock()
        while run_unit():
            start_unit_s, now_s = now_s, self._clock()
            self._unit_s = max(now_s - start_unit_s, FORGETTING * self._unit_s)
            if now_s + self._unit_s + self._step_s > start_s + self._max_stall_s:
                return
