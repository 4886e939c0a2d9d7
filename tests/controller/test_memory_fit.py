"""Whether workers fit into the nodes' memory, and the message if they don't."""

import pytest

from farshore.controller.controller import too_little_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("nodes", "workers", "each_bytes"),
    [
        ({"a": 4 * GIB}, 4, GIB),
        ({"a": GIB, "b": 3 * GIB}, 4, GIB),
        ({}, 0, GIB),
    ],
)
def test_workers_that_fit(nodes, workers, each_bytes):
    assert too_little_memory(nodes, workers=workers, each_bytes=each_bytes) is None


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ({"10.0.0.1": 3 * GIB}, 1, "4,096 MiB of memory (4,096 MiB in all) do not fit: Ray has 3,072 MiB on"),
        # Enough memory in all, but on no node enough for one worker.
        ({"a": 3 * GIB, "b": 3 * GIB, "c": 3 * GIB}, 2, "3,072 MiB on a, 3,072 MiB on b, 3,072 MiB on c"),
        ({"a": 4 * GIB - 1}, 1, "4,096 MiB on a"),
        ({}, 2, "no node at all"),
    ],
)
def test_workers_that_do_not_fit_are_refused_with_the_fix(nodes, workers, expected):
    message = too_little_memory(nodes, workers=workers, each_bytes=4 * GIB)
    assert expected in message
    assert "--kv-memory" in message and "--attention-workers" in message
