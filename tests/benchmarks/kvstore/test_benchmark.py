"""The store's benchmark at tiny sizes: it reports every bar. Speed is not tested."""

import json

import pytest

from farshore.benchmarks.kvstore import benchmark as kvstore
from farshore.benchmarks.kvstore.setting import StoreSizes
from farshore.benchmarks.machine import MachineSizes
from farshore.errors import InvalidRequest

SIZES = StoreSizes(
    span_tokens=300,
    members=3,
    prefix_tokens=700,
    prefix_span_tokens=256,
    batch=3,
    spans=20,
    decode_tokens=300,
    decode_kv_bytes=1 << 20,
    rounds=3,
    calls=2,
    machine=MachineSizes(buffer_bytes=8192, gemm=(8,), least_run_s=0, rounds=3),
)


def run(implementation, machine, **options):
    return kvstore.run(implementation, machine, SIZES, progress=lambda _: None, **options)


def test_the_bars(reference, machine):
    report = run(reference, machine)
    bars = [(bar.sense, bar.bound, bar.unit) for bar in report.bars]
    assert bars == [
        (">=", 60, "% of memcpy bandwidth"),
        (">=", 40, "% of memcpy bandwidth"),
        ("<=", 0.5, "s"),
        ("<=", 1, "ms"),
        ("<=", 1, "ms"),
        ("<=", 0, "new blocks"),
        ("<=", 100, "ms"),
        (">=", 0.98, "x one plain tensor"),
    ]
    assert {bar.name for bar in report.bars} <= {result.name for result in report.results}
    told = json.loads(json.dumps(report.as_dict()))
    assert set(told) == {"machine", "results", "bars"}
    (fork,) = [bar for bar in told["bars"] if bar["unit"] == "new blocks"]
    assert fork["met"] and fork["name"] == "fork of 700 tokens in 3 spans, and its drop"


def test_only_the_selected_cases_run(reference, machine):
    assert [result.name for result in run(reference, machine, only="announce").results] == [
        "announce of 20 spans"
    ]
    with pytest.raises(InvalidRequest, match="no case 'abacus': choose a part of bulk write; "):
        run(reference, machine, only="abacus")
