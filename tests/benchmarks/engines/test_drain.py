"""``farshore bench engines --only drain``: what clients see, the bars, and a small run of a real cluster."""

import json
import math
import threading

import grpc
import pytest

from farshore.benchmarks.engines.drain import Drain, Sizes, drain_bars, report
from farshore.benchmarks.engines.streams import Streams, Window
from farshore.benchmarks.report import Report
from farshore.errors import DeadlineExceeded

DEADLINE_S = 60.0


@pytest.fixture
def gateway(harness, loop_thread, served):
    with harness.gateway(loop_thread, served) as made:
        yield made


def window(tokens_per_s, *gaps_s):
    return Window(2.0, 2 * tokens_per_s, gaps_s)


def test_a_window_joins_another():
    both = window(10, 0.1, 0.2).and_also(Window(3.0, 5, (0.3,)))
    assert both == Window(5.0, 25, (0.1, 0.2, 0.3))
    assert both.tokens_per_s == 5.0 and both.p99_gap_s == pytest.approx(0.298)


def test_drains_are_compared_with_the_times_before_and_after_them():
    drains = [
        Drain(300 << 20, 9.0, window(100, 0.1, 0.1), window(90, 0.1, 0.3), window(100, 0.1, 0.1)),
        Drain(300 << 20, 70.0, window(100, 0.2, 0.2), window(30, 0.4, 0.4), window(20, 0.2, 0.2)),
        Drain(300 << 20, 8.0, window(10, 0.1, 0.1), window(20, 0.1, 0.1), window(30, 0.1, 0.1)),
    ]
    (result,), bars = report(drains, failures=["lost", "lost again"])
    assert result.figures["tokens_per_s"][1] == [100, 30, 20]
    assert [bar.value for bar in bars] == [70.0, 2, pytest.approx(2.0), pytest.approx(90.0)]
    assert [bar.met for bar in bars] == [False, False, True, True]
    assert bars[1].note == "lost"


@pytest.mark.parametrize("number", range(3))
def test_a_window_without_tokens_meets_no_bar(number):
    """All requests may have failed."""
    windows = [window(10, 0.1, 0.1)] * 3
    whole = Drain(300 << 20, 9.0, *windows)
    windows[number] = Window(2.0, 0, ())
    (result,), (_, _, gap, rate) = report([whole, Drain(300 << 20, 9.0, *windows)], failures=["lost"])
    assert (rate.value, rate.met) == (None, False)
    # The times before and after a drain are one for the gaps.
    assert gap.met == (number != 1) and (gap.value is None) == (number == 1)
    json.dumps(Report({}, (result,), (gap, rate)).as_dict(), allow_nan=False)


def test_streams_see_the_tokens_of_a_window_and_the_requests_that_fail(gateway):
    with Streams(gateway.address, [[1], [2]], max_tokens=50) as streams:
        first, second = gateway.engine.next_sequence(), gateway.engine.next_sequence()
        assert first.request.sampling.max_tokens == 50
        for sequence in (first, second):
            sequence.tokens(5)
        streams.await_tokens(1, deadline_s=DEADLINE_S)

        def answer():
            first.tokens(6, 7)
            second.fail(grpc.StatusCode.INTERNAL, "it broke", kind="Internal")
            streams.await_tokens(3, deadline_s=DEADLINE_S)
            timer = threading.Timer(0.05, first.tokens, args=(8,))
            timer.start()

        seen = streams.during(answer, deadline_s=DEADLINE_S)
        assert seen.tokens == 3 and len(seen.gaps_s) == 3
        assert len(streams.failures) == 1 and "it broke" in streams.failures[0]
        with pytest.raises(DeadlineExceeded):
            streams.await_tokens(5, deadline_s=0.01)
        with pytest.raises(DeadlineExceeded):
            streams.during(lambda: None, deadline_s=0.01)
        assert not streams.finished
        first.finish()
        streams.await_tokens(5, deadline_s=DEADLINE_S)
        assert streams.finished == 1


@pytest.mark.heavy
def test_a_small_run():
    told = []
    sizes = Sizes(
        sequences=2,
        prompt_tokens=300,
        max_tokens=7500,
        least_bytes=1 << 20,
        drains=1,
        window_s=0.5,
        workers=1,
        options=("--kv-memory", "256MiB"),
    )
    (result,), bars = drain_bars(sizes, progress=told.append)
    assert result.figures["held_bytes"][0] >= 2 * 256 * 23_040
    assert all(math.isfinite(bar.value) and bar.value > 0 for bar in bars if bar.unit != "requests")
    assert [bar.value for bar in bars if bar.unit == "requests"] == [0]
    assert any(line.startswith("moved ") for line in told)
