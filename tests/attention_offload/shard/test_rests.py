"""A thread that works piece by piece rests in proportion to what it computes, but never for too long."""

from types import SimpleNamespace

import pytest

from farshore.attention_offload.shard.rests import Rests


@pytest.fixture
def rested_s(clock):
    """rested_s(share, ...) -> the rests of a thread whose equal pieces take ``computed_s`` and ``waited_s``
    more."""

    def work(share, *, computed_s, waited_s=0.0, most_s=1e9, pieces=1):
        cpu = SimpleNamespace(now_s=0.0)
        taken_s = []

        def wait(rest_s):
            taken_s.append(rest_s)
            clock.now_s += rest_s

        rests = Rests(share=share, most_s=most_s, wait=wait, clock=clock, cpu_clock=lambda: cpu.now_s)
        for _ in range(pieces):
            cpu.now_s += computed_s
            clock.now_s += computed_s + waited_s
            rests.after(1 / pieces)
        return taken_s

    return work


def test_a_rest_leaves_each_piece_its_share_of_the_time(rested_s, clock):
    assert rested_s(0.25, computed_s=2.0, pieces=3) == [6.0, 6.0, 6.0]
    assert clock.now_s == 3 * 2.0 / 0.25


def test_time_that_passed_without_computing_shortens_the_rest(rested_s):
    assert rested_s(0.25, computed_s=2.0, waited_s=4.0) == [2.0]
    assert rested_s(0.25, computed_s=2.0, waited_s=6.0) == []


def test_a_thread_that_may_take_a_whole_core_never_rests(rested_s):
    assert rested_s(1.0, computed_s=2.0) == rested_s(1.6, computed_s=2.0) == []


def test_the_rests_of_the_whole_work_are_limited(rested_s):
    assert rested_s(0.01, computed_s=9.0, most_s=3.0, pieces=4) == [0.75] * 4
