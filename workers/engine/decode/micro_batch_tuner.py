"""How many micro-batches a step's rows are cut into.

With n of them a layer takes max(n·d, n·a, d + a + RTT): d and a the dense and the attention time of one of
them, RTT the way to the shards and back. More of them hide more of the way, and cost more: d shrinks less
than n grows, since each reads the layer's weights. None of the three is known apart from the others, so the
engine tries: the double of n where it waits for shards, and the half, and keeps what is faster.

Used by ``engine``, one step after another. It must not know what a step does.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

MOST_MICRO_BATCHES = 8
TRIAL_STEPS = 3
TRIAL_EVERY_STEPS = 64
"""Between trials that change nothing: even at twice the time they are 1 in 20 of it."""
WORTH_HIDING = 0.05
"""Share of a step spent waiting below which more micro-batches can gain nothing."""
BETTER = 0.97
ALIKE = 1 / 8
"""How far the number of rows may move before older times say nothing any more."""


class MicroBatchTuner:
    """``waited_s`` tells how long the engine has waited for answers so far."""

    def __init__(
        self, waited_s: Callable[[], float], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._waited_s = waited_s
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
        """The number of micro-batches for a step of ``rows`` rows. Its time counts if it succeeds."""
        if abs(rows - self._rows) > self._rows * ALIKE:
            self._rows, self._until_trial, self._trial = rows, 0, None
            self._times.clear()
        most = min(MOST_MICRO_BATCHES, rows)
        self._settled = min(self._settled, most)
        micro_batches = min(self._trial or self._settled, most)
        start_s, waited_s = self._clock(), self._waited_s()
        yield micro_batches
        seconds = self._clock() - start_s
        if self._trial is not None:
            self._judge(seconds)
            return
        self._waiting_share = (self._waited_s() - waited_s) / seconds
        self._times.append(seconds)
        self._until_trial -= 1
        if len(self._times) == TRIAL_STEPS and self._until_trial <= 0:
            self._try(most)

    def _try(self, most: int) -> None:
        """Whatever is next to what is settled takes its turn."""
        neighbours = [self._settled // 2] if self._settled > 1 else []
        if self._waiting_share >= WORTH_HIDING and self._settled < most:
            neighbours.append(min(2 * self._settled, most))
        if neighbours:
            self._trials += 1
            self._trial, self._trial_times = neighbours[self._trials % len(neighbours)], []

    def _judge(self, seconds: float) -> None:
        self._trial_times.append(seconds)
        if len(self._trial_times) < TRIAL_STEPS:
            return
        self._until_trial = TRIAL_EVERY_STEPS
        if median(self._trial_times) < BETTER * median(self._times):
            assert self._trial is not None
            self._settled, self._until_trial = self._trial, 0
            self._times.clear()
        self._trial = None
