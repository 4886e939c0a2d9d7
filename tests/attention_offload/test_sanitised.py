"""Both native ends of the wire under sanitisers, fed with garbage: no access outside of memory."""

from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "attention_offload" / "native"

pytestmark = pytest.mark.heavy


def test_memory_and_undefined_behaviour(sanitiser):
    here = Path(__file__).parent
    names = (
        "transport/test_garbage.py",
        "transport/test_garbage_steps.py",
        "fanout/test_reads.py",
        "shard/test_checks_fuzz.py",
        "shard/test_checks_frames.py",
        "shard/test_checks_calls.py",
    )
    tests = [here / name for name in names]
    sanitiser.run_suite("farshore.attention_offload._native", SOURCES, tests)
