"""Interleaved measurements, on a clock that only the candidates advance."""

import pytest

from farshore.benchmarks.timing import LEAST_ROUNDS, Timing, interleave, median_if_all


def taking(clock, log, name, *durations_s):
    """A candidate whose n-th call takes the n-th duration; further calls take the last duration."""
    left = list(durations_s)

    def run():
        log.append(name)
        clock.now_s += left.pop(0) if len(left) > 1 else left[0]

    return run


def test_candidates_alternate(clock):
    log = []
    candidates = {name: taking(clock, log, name, 1) for name in "AB"}
    interleave(candidates, rounds=3, warm_up=1, clock=clock)
    assert "".join(log) == "AB" + "ABABAB"


def test_the_warm_up_does_not_count(clock):
    timed = interleave({"A": taking(clock, [], "A", 9, 9, 2, 1, 3)}, rounds=3, warm_up=2, clock=clock)
    assert timed["A"].samples_s == (2, 1, 3)


def test_each_candidate_is_charged_its_own_time(clock):
    timed = interleave({"A": taking(clock, [], "A", 1), "B": taking(clock, [], "B", 4)}, clock=clock)
    assert (timed["A"].median_s, timed["B"].median_s) == (1, 4)
    assert len(timed["A"].samples_s) == len(timed["B"].samples_s) == 20


def test_time_is_per_call(clock):
    log = []
    timed = interleave({"A": taking(clock, log, "A", 0.5)}, rounds=4, warm_up=0, calls=10, clock=clock)
    assert timed["A"].median_s == pytest.approx(0.5)
    assert len(log) == 40


def test_a_run_takes_at_least_so_long(clock):
    log = []
    candidates = {"A": taking(clock, log, "A", 3, 0.5), "B": taking(clock, log, "B", 4)}
    timed = interleave(candidates, rounds=2, warm_up=2, least_run_s=1.2, clock=clock)
    assert "".join(log) == "ABAB" + "AAAB" * 2
    assert (timed["A"].samples_s, timed["B"].samples_s) == ((0.5, 0.5), (4, 4))


def test_the_limit_leaves_enough_for_a_median(clock):
    timed = interleave({"A": taking(clock, [], "A", 100)}, limit_s=50, clock=clock)
    assert len(timed["A"].samples_s) == LEAST_ROUNDS


def test_rounds_end_once_the_limit_is_passed(clock):
    timed = interleave({"A": taking(clock, [], "A", 1)}, rounds=20, warm_up=0, limit_s=9.5, clock=clock)
    assert len(timed["A"].samples_s) == 10


def test_a_long_warm_up_is_cut_short(clock):
    log = []
    interleave({"A": taking(clock, log, "A", 1)}, rounds=3, warm_up=50, limit_s=20, clock=clock)
    assert len(log) == 3 + 3


def test_quantiles():
    summary = Timing(tuple(float(n) for n in range(11))).summary()
    assert summary == {"runs": 11, "median_s": 5, "p10_s": 1, "p90_s": 9, "best_s": 0}
    assert Timing(()).summary() == dict.fromkeys(("median_s", "p10_s", "p90_s", "best_s")) | {"runs": 0}
    assert Timing((7.0,)).summary() == {"runs": 1, "median_s": 7, "p10_s": 7, "p90_s": 7, "best_s": 7}


def test_a_ratio_compares_what_ran_together():
    """The machine slows down threefold during the comparison; A stays twice as fast as B."""
    fast, slow = Timing((1.0, 1.0, 3.0, 3.0, 3.0)), Timing((2.0, 2.0, 6.0, 6.0, 6.0))
    assert slow.over(fast) == 2 and fast.over(slow) == 0.5
    disturbed = Timing((2.0, 2.0, 90.0, 6.0, 6.0))
    assert disturbed.over(fast) == 2


def test_a_median_of_which_a_part_was_not_measured_is_none():
    assert median_if_all([3.0, 1.0, 2.0]) == 2.0
    assert median_if_all([3.0, None, 2.0]) is None and median_if_all([]) is None
