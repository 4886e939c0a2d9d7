"""Cases by name: which of them a run measures, and the loop over them.

Used by every benchmark that has more than one case. Must not know what a case measures.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

from farshore.benchmarks.report import Bar, Result
from farshore.errors import InvalidRequest

Measured = tuple[list[Result], list[Bar]]

Case = TypeVar("Case")
At = TypeVar("At")


def choose(cases: Mapping[str, Case], only: str, *, kind: str = "case") -> dict[str, Case]:
    """Those whose name holds ``only``. InvalidRequest, naming all of them, if there are none."""
    chosen = {name: case for name, case in cases.items() if only in name}
    if not chosen:
        raise InvalidRequest(f"no {kind} {only!r}: choose a part of {'; '.join(cases)}")
    return chosen


def measure(
    cases: Mapping[str, Callable[[At], Measured]], at: At, *, progress: Callable[[str], None]
) -> Measured:
    """What all of them say, in order, each told to ``progress`` as it begins."""
    results: list[Result] = []
    bars: list[Bar] = []
    for name, case in cases.items():
        progress(name)
        measured, held = case(at)
        results += measured
        bars += held
    return results, bars
