"""Chooses the number of micro-batches of a step by trying.

With n micro-batches a layer takes max(n·d, n·a, d + a + RTT), where d and a are the dense time and the
attention time of one micro-batch, and RTT is the round trip to the shards. More micro-batches hide more of
the round trip, but cost more: each of them reads the layer's weights, so d shrinks by less than n grows. The
three times cannot be measured apart. So the tuner tries twice the number while the engine waits for shards,
and half the number, and keeps the faster.

Called by ``retry``, once per step. It must not know what a step does.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

MOST_MICRO_BATCHES = 8
TRIAL_STEPS = 3
"""Steps per trial; medians of this many times are compared."""
TRIAL_EVERY_STEPS = 64
"""Steps between trials that change nothing. Even if a trial takes twice the time, trials cost 1/20 in all."""
WORTH_HIDING = 0.05
"""More micro-batches are tried only if the engine waits for at least this share of a step."""
BETTER = 0.97
"""A trial wins if its median is below this multiple of the current median."""
ALIKE = 1 / 8
"""Times are forgotten if the number of rows changes by more than this share."""


class MicroBatchTuner:
    """Chooses the number of micro-batches of one engine's steps. Not thread-safe.

    ``waited_s`` returns the seconds that the engine has waited for shards since it started. ``most``: the
    most micro-batches of a step. ``warm_up_steps``: the first steps of another size or number of
    micro-batches, which are not measured.
    """

    def __init__(
        self,
        waited_s: Callable[[], float],
        *,
        most: int = MOST_MICRO_BATCHES,
        warm_up_steps: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._waited_s = waited_s
        self._most = most
        self._warm_up_steps = self._unmeasured_steps = warm_up_steps
        self._clock = clock
        self._rows = 0
        self._settled = 1
        self._times: deque[float] = deque(maxlen=TRIAL_STEPS)
        self._waiting_share = 0.0
        self._until_trial = 0
        self._trials = 0
        self._trial: int | None = None
        self._trial_times: list[float] = []

    @contextmanager
    def step(self, rows: int) -> Iterator[int]:
        """Yields the number of micro-batches for a step of ``rows`` rows.

        Only a step that succeeds is measured.
        """
        if abs(rows - self._rows) > self._rows * ALIKE:
            self._rows, self._until_trial, self._trial = rows, 0, None
            self._unmeasured_steps = self._warm_up_steps
            self._times.clear()
        most = min(self._most, rows)
        self._settled = min(self._settled, most)
        micro_batches = min(self._trial or self._settled, most)
        start_s, waited_s = self._clock(), self._waited_s()
        yield micro_batches
        seconds = self._clock() - start_s
        if self._unmeasured_steps:
            self._unmeasured_steps -= 1
            return
        if self._trial is not None:
            self._end_trial_step(seconds)
            return
        self._waiting_share = (self._waited_s() - waited_s) / seconds
        self._times.append(seconds)
        self._until_trial -= 1
        if len(self._times) == TRIAL_STEPS and self._until_trial <= 0:
            self._start_trial(most)

    def _start_trial(self, most: int) -> None:
        """Starts a trial of half or twice the settled number, alternately."""
        neighbours = [self._settled // 2] if self._settled > 1 else []
        if self._waiting_share >= WORTH_HIDING and self._settled < most:
            neighbours.append(min(2 * self._settled, most))
        if neighbours:
            self._trials += 1
            self._trial, self._trial_times = neighbours[self._trials % len(neighbours)], []
            self._unmeasured_steps = self._warm_up_steps

    def _end_trial_step(self, seconds: float) -> None:
        """Adds a trial step's time; after the last one, keeps the faster number."""
        self._trial_times.append(seconds)
        if len(self._trial_times) < TRIAL_STEPS:
            return
        self._until_trial = TRIAL_EVERY_STEPS
        if median(self._trial_times) < BETTER * median(self._times):
            assert self._trial is not None
            self._settled, self._until_trial = self._trial, 0
            self._times.clear()
        self._trial = None
