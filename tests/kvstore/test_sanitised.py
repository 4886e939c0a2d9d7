"""The native copies and XOR under sanitisers: they access no memory outside of their arguments.

Rows, chunks and XOR results are separate allocations with guards around them. The arena is one mapping,
inside of which no access is detected.
"""

from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kvstore" / "native"
SUITE = [
    "layout/test_bulk.py",
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
