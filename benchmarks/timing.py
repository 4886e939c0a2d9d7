"""Runs what is compared in turns, A B A B ..., so that a drift of the machine (heat, neighbours) hits both.

Used by every benchmark. Must not know what is measured, nor what counts as fast.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

ROUNDS = 20
"""Runs behind a median that a bar is held against."""
LEAST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call over ``runs`` timed runs."""

    runs: int
    median_s: float
    p10_s: float
    p90_s: float
    best_s: float

    @classmethod
    def of(cls, samples_s: list[float]) -> "Timing":
        tenths = quantiles(samples_s, n=10, method="inclusive") if len(samples_s) > 1 else samples_s * 9
        return cls(len(samples_s), median(samples_s), tenths[0], tenths[-1], min(samples_s))


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    warm_up: int = 2,
    calls: int = 1,
    limit_s: float = 120.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times each candidate ``rounds`` times, in turns, after ``warm_up`` rounds that do not count.

    ``calls``: calls per timed run, for what is too short for the clock. After ``limit_s`` seconds no further
    round starts once ``LEAST_ROUNDS`` are done: a slow implementation gets fewer runs, and ``Timing.runs``
    says so.
    """
    begun = clock()
    for _ in range(warm_up):
        for run in candidates.values():
            for _ in range(calls):
                run()
        if clock() - begun > limit_s / 10:
            break  # Warm by now, and the limit is for the runs that count.
    samples_s: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock() - begun > limit_s:
            break
        for name, run in candidates.items():
            start = clock()
            for _ in range(calls):
                run()
            samples_s[name].append((clock() - start) / calls)
    return {name: Timing.of(samples) for name, samples in samples_s.items()}
