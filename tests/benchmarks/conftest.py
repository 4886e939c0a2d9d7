from dataclasses import replace

import pytest

from farshore.benchmarks.implementation import choose
from farshore.benchmarks.machine import MachineSizes, facts
from farshore.benchmarks.shapes import Sizes


@pytest.fixture
def machine():
    """This one, with a cache so small that nothing needs to be large."""
    return replace(facts(threads=1), l3_bytes=4096)


@pytest.fixture
def tiny():
    return Sizes(
        context_tokens=300,
        shared_tokens=40,
        shared_rows=3,
        kv_bytes=1 << 20,
        new_tokens=5,
        past_tokens=(0, 7),
        rounds=3,
        calls=2,
        machine=MachineSizes(buffer_bytes=8192, gemm=(8, 16), least_run_s=0, rounds=3),
    )


@pytest.fixture
def reference():
    return choose("reference", threads=1)
