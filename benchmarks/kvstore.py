"""The store's benchmark: its copies against memcpy, its calls against the bars of issue 5.

Called through ``catalogue``.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict

from farshore.benchmarks import kvstore_bulk, kvstore_calls, kvstore_decode, machine
from farshore.benchmarks.implementation import Implementation
from farshore.benchmarks.kvstore_setting import At, Measured, StoreSizes
from farshore.benchmarks.report import Bar, Report, Result
from farshore.errors import InvalidRequest

CASES: Mapping[str, Callable[[At], Measured]] = {
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
    """The cases whose name holds ``only``. InvalidRequest, before anything is measured, if there are none."""
    cases = {name: measure for name, measure in CASES.items() if only in name}
    if not cases:
        raise InvalidRequest(f"no case {only!r}: choose a part of {'; '.join(CASES)}")
    rates = machine.measure(facts, sizes.machine, progress=progress)
    at = At(implementation, facts, rates, sizes)
    results: list[Result] = []
    bars: list[Bar] = []
    for name, measure in cases.items():
        progress(name)
        measured, held = measure(at)
        results += measured
        bars += held
    return Report({**asdict(facts), **asdict(rates)}, tuple(results), tuple(bars))
