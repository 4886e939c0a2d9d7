"""Chooses cases by name and measures them in order.

Used by every benchmark that has several cases. Must not know what a case measures.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

from farshore.benchmarks.report import Bar, Result
from farshore.errors import InvalidRequest

Measured = tuple[list[Result], list[Bar]]

Case = TypeVar("Case")
SettingT = TypeVar("SettingT")


def choose(cases: Mapping[str, Case], only: str, *, kind: str = "case") -> dict[str, Case]:
    """The cases whose name contains ``only``. Raises InvalidRequest, naming all cases, if there are none."""
    chosen = {name: case for name, case in cases.items() if only in name}
    if not chosen:
        raise InvalidRequest(f"no {kind} {only!r}: choose a part of {'; '.join(cases)}")
    return chosen


def measure(
    cases: Mapping[str, Callable[[SettingT], Measured]],
    setting: SettingT,
    *,
    progress: Callable[[str], None],
) -> Measured:
    """Measures all cases in order and returns their results and bars. ``progress`` gets the name of each case
    before it is measured."""
    results: list[Result] = []
    bars: list[Bar] = []
    for name, case in cases.items():
        progress(name)
        case_results, case_bars = case(setting)
        results += case_results
        bars += case_bars
    return results, bars
