"""The time of the host between a step's last token and the next launch."""

import pytest

from farshore.benchmarks.gpu import steps
from farshore.benchmarks.gpu.engines import Answer
from farshore.benchmarks.gpu.steps import SKIPPED_TOKENS, host_s
from farshore.kernels.host import HOST


def answers(*token_s):
    return [Answer([0] * len(times), list(times)) for times in token_s]


def test_the_first_launch_after_a_step_s_last_token_counts():
    """Two sequences; each step has two launches, and takes 1 s."""
    found = host_s(answers([1.0, 2.0, 3.0], [1.1, 2.1, 3.1]), [0.2, 0.3, 1.3, 1.6, 2.5, 2.9])
    assert found == pytest.approx(0.3)


def test_steps_that_capture_graphs_do_not_count():
    ends = [float(step) for step in range(SKIPPED_TOKENS + 4)]
    launches = [end + (0.9 if end < SKIPPED_TOKENS else 0.1) for end in ends]
    assert host_s(answers(ends), launches) == pytest.approx(0.1)


def test_launches_of_all_streams_are_noted():
    launches, ran = [], []
    runtime = steps._noting(launches)(HOST)
    for stream in (runtime.stream(), runtime.stream()):
        stream.run(lambda: ran.append("plain"))
        stream.replay("graph", lambda: ran.append("graph"))
    assert ran == ["plain", "graph"] * 2
    assert len(launches) == 2 and launches == sorted(launches)
