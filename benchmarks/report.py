"""What a benchmark says: the machine, its results, and the bars they are held against.

Filled by the benchmarks, printed by ``client.cli_bench``. Must not know how anything is measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
    """A figure that was promised, and whether the measured value keeps the promise.

    ``value``: None where it could not be measured. ``note``: why, or how it was measured.
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
        """Never for None or NaN: what could not be measured is not met."""
        if self.value is None:
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
                    {"name": it.name, **it.figures, "timing": it.timing.summary()} for it in self.results
                ],
                "bars": [_bar(bar) for bar in self.bars],
            }
        )


def _bar(bar: Bar) -> dict[str, Any]:
    """As the JSON holds it: a note only where there is one."""
    told = {**asdict(bar), "met": bar.met}
    return told if bar.note else {name: value for name, value in told.items() if name != "note"}


def _rounded(value: Any) -> Any:
    """Floats to the digits that mean something, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
