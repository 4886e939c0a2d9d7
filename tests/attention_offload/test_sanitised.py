"""Runs the tests of malformed input against native code built with sanitisers, for both ends of the wire."""

from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "attention_offload" / "native"

pytestmark = pytest.mark.heavy


def test_memory_and_undefined_behaviour(sanitiser):
    folder = Path(__file__).parent
    names = (
        "transport/test_garbage.py",
        "transport/test_garbage_steps.py",
        "fanout/test_reads.py",
        "shard/test_checks_fuzz.py",
        "shard/test_checks_frames.py",
        "shard/test_checks_calls.py",
    )
    tests = [folder / name for name in names]
    sanitiser.run_suite("farshore.attention_offload._native", SOURCES, tests)
