"""The native copies and XOR under sanitisers: no access outside of what they are given.

Rows, chunks and sums lie in memory of their own, between guards; the arena itself is one mapping.
"""

from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kvstore" / "native"
SUITE = [
    "test_bulk.py",
    "test_tail_batch.py",
    "test_store.py",
    "test_transfer.py",
    "test_parity.py",
    "test_state_machine.py",
]

pytestmark = pytest.mark.heavy


def test_memory_and_undefined_behaviour(sanitiser):
    tests = [Path(__file__).parent / "store" / name for name in SUITE]
    sanitiser.run_suite("farshore.kvstore._native", SOURCES, tests, "-k", "not pytorch")
