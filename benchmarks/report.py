"""The report of a benchmark: the machine, the results, and the bars that they must meet.

Made by the benchmarks, printed by ``client.cli.bench``. Must not know how anything is measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

from farshore.benchmarks.timing import Timing

SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One measured case. ``figures`` carry their units in their names."""

    name: str
    timing: Timing
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bound that a measured value must keep.

    ``value`` is None if it could not be measured; ``note`` says why, or how it was measured.
    """

    name: str
    value: float | None
    bound: float
    unit: str
    sense: Literal[">=", "<="]
    note: str = ""

    @classmethod
    def at_least(cls, name: str, value: float | None, bound: float, unit: str, note: str = "") -> "Bar":
        return cls(name, value, bound, unit, ">=", note)

    @classmethod
    def at_most(cls, name: str, value: float | None, bound: float, unit: str, note: str = "") -> "Bar":
        return cls(name, value, bound, unit, "<=", note)

    @property
    def met(self) -> bool:
        """Whether the value keeps the bound. False for None, NaN and the infinities: a value that was not
        measured fails."""
        if self.value is None or not isfinite(self.value):
            return False
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound


@dataclass(frozen=True, slots=True)
class Report:
    machine: Mapping[str, Any]
    results: tuple[Result, ...] = ()
    bars: tuple[Bar, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints: ``machine``, ``results``, ``bars``."""
        return _rounded(
            {
                "machine": dict(self.machine),
                "results": [
                    {"name": result.name, **result.figures, "timing": result.timing.summary()}
                    for result in self.results
                ],
                "bars": [_bar(bar) for bar in self.bars],
            }
        )


def _bar(bar: Bar) -> dict[str, Any]:
    """The JSON object of a bar, without an empty note."""
    fields = {**asdict(bar), "met": bar.met}
    return fields if bar.note else {name: value for name, value in fields.items() if name != "note"}


def _rounded(value: Any) -> Any:
    """``value`` with all floats in it, at any depth, rounded to SIGNIFICANT_DIGITS. NaN and the infinities,
    which JSON lacks, become None: they were not measured."""
    if isinstance(value, float):
        return None if not isfinite(value) else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
