"""Both native ends of the wire under sanitisers, fed with garbage: no access outside of memory."""

from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "attention_offload" / "native"

pytestmark = pytest.mark.heavy


def test_memory_and_undefined_behaviour(sanitiser):
    tests = [Path(__file__).parent / "test_garbage.py"]
    sanitiser.run_suite("farshore.attention_offload._native", SOURCES, tests)
