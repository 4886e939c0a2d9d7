"""Both native ends of the wire under sanitisers, fed with garbage: no access outside of memory."""

from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "attention_offload" / "native"

pytestmark = pytest.mark.heavy


def test_memory_and_undefined_behaviour(sanitiser):
    here = Path(__file__).parent
    tests = [here / "test_garbage.py", here / "test_garbage_steps.py"]
    sanitiser.run_suite("farshore.attention_offload._native", SOURCES, tests)
