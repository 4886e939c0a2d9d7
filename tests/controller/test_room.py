"""What is said where workers don't fit."""

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
def test_what_fits(nodes, workers, each_bytes):
    assert too_little_memory(nodes, workers=workers, each_bytes=each_bytes) is None


@pytest.mark.parametrize(
    ("nodes", "workers", "told"),
    [
        ({"10.0.0.1": 3 * GIB}, 1, "4,096 MiB of memory (4,096 MiB in all) do not fit: Ray has 3,072 MiB on"),
        # Enough in all, on no node for one of them.
        ({"a": 3 * GIB, "b": 3 * GIB, "c": 3 * GIB}, 2, "3,072 MiB on a, 3,072 MiB on b, 3,072 MiB on c"),
        ({"a": 4 * GIB - 1}, 1, "4,096 MiB on a"),
        ({}, 2, "no node at all"),
    ],
)
def test_what_does_not_fit_is_named_with_the_fix(nodes, workers, told):
    message = too_little_memory(nodes, workers=workers, each_bytes=4 * GIB)
    assert told in message
    assert "--kv-memory" in message and "--attention-workers" in message
