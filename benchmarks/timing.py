"""Times candidates alternately, A B A B ..., so that a drift of the machine (heat, neighbours) affects all.

Used by every benchmark. Must not know what is measured, nor what counts as fast.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles

ROUNDS = 20
"""Runs whose median is compared with a bar."""
LEAST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """The runs of one candidate."""

    samples_s: tuple[float, ...]
    """Seconds per call of each timed run, in the order of the rounds."""

    @property
    def median_s(self) -> float:
        """Raises StatisticsError if nothing ran."""
        return median(self.samples_s)

    def summary(self) -> dict[str, float | int | None]:
        """A report's figures: number of runs; median, 10th and 90th percentile and minimum in seconds, None
        if nothing ran."""
        if not self.samples_s:
            return {"runs": 0, "median_s": None, "p10_s": None, "p90_s": None, "best_s": None}
        several = len(self.samples_s) > 1
        tenths = quantiles(self.samples_s, n=10, method="inclusive") if several else self.samples_s * 9
        return {
            "runs": len(self.samples_s),
            "median_s": self.median_s,
            "p10_s": tenths[0],
            "p90_s": tenths[-1],
            "best_s": min(self.samples_s),
        }

    def over(self, other: "Timing") -> float:
        """How many times as long as ``other`` this took: the median of the ratios of each round.

        The ratio of the medians would be wrong on a shared machine whose speed doubles and halves within a
        comparison (bf16 GEMM on a 2-core VM: 730 to 2,490 GFLOP/s within minutes), because the two medians
        may come from different speeds.
        """
        return median(a / b for a, b in zip(self.samples_s, other.samples_s, strict=True))


def median_if_all(values: Iterable[float | None]) -> float | None:
    """The median; None if there are no values, or one was not measured."""
    every = list(values)
    measured = [value for value in every if value is not None]
    return median(measured) if measured and len(measured) == len(every) else None


SETTLE_S = 0.02
"""Pause before each timed run. PyTorch's threads spin for milliseconds after its last call, on cores that
the next candidate's threads need."""
LEAST_RUN_S = 0.05
"""Least length of a run whose code has threads of its own and is called repeatedly in use. Threads that a
run wakes may start on one core, and the scheduler takes milliseconds to part them: single GEMMs of 1 ms gave
a rate of 50 GFLOP/s, ten in a row 330."""


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    warm_up: int = 2,
    calls: int = 1,
    least_run_s: float = 0.0,
    limit_s: float = 120.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times each candidate ``rounds`` times, alternately, after ``warm_up`` rounds that do not count.

    A timed run makes ``calls`` calls, because one may be too short for the clock; more if they would take
    less than ``least_run_s`` at the speed of the last warm-up. After ``limit_s`` seconds no further round
    starts once ``LEAST_ROUNDS`` are done: a slow candidate gets fewer runs, and the report says how many.
    """
    begun = clock()
    calls_of = dict.fromkeys(candidates, calls)
    for _ in range(warm_up):
        for name, run in candidates.items():
            start = clock()
            for _ in range(calls):
                run()
            call_s = (clock() - start) / calls
            if call_s > 0:
                calls_of[name] = max(calls, ceil(least_run_s / call_s))
        if clock() - begun > limit_s / 10:
            break  # The limit is for the runs that count.
    samples_s: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock() - begun > limit_s:
            break
        for name, run in candidates.items():
            time.sleep(SETTLE_S)
            start = clock()
            for _ in range(calls_of[name]):
                run()
            samples_s[name].append((clock() - start) / calls_of[name])
    return {name: Timing(tuple(samples)) for name, samples in samples_s.items()}
