"""The benchmark of the KV store: its copies compared with memcpy, and its calls with fixed bars.

Called through ``catalogue``.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from farshore.benchmarks import cases, machine
from farshore.benchmarks.kernels.implementation import Implementation
from farshore.benchmarks.kvstore import bulk as kvstore_bulk
from farshore.benchmarks.kvstore import calls as kvstore_calls
from farshore.benchmarks.kvstore import decode as kvstore_decode
from farshore.benchmarks.kvstore.setting import Setting, StoreSizes
from farshore.benchmarks.report import Report

CASES: Mapping[str, Callable[[Setting], cases.Measured]] = {
    "bulk write": kvstore_bulk.write,
    "digest": kvstore_bulk.digest,
    "export and import": kvstore_bulk.move,
    "parity": kvstore_bulk.encode_and_rebuild,
    "tail append": kvstore_calls.append,
    "fork": kvstore_calls.fork,
    "announce": kvstore_calls.announce,
    "decode": kvstore_decode.against_plain,
}


def run(
    implementation: Implementation,
    facts: machine.Facts,
    sizes: StoreSizes,
    *,
    only: str = "",
    progress: Callable[[str], None],
) -> Report:
    """Measures the cases whose name contains ``only``. InvalidRequest, before any measurement, if there are
    none."""
    chosen = cases.choose(CASES, only)
    rates = machine.measure(facts, sizes.machine, progress=progress)
    setting = Setting(implementation, facts, rates, sizes)
    results, bars = cases.measure(chosen, setting, progress=progress)
    return Report({**asdict(facts), **asdict(rates)}, tuple(results), tuple(bars))
