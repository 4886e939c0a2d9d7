"""The gateway benchmark: the cost of a token in the gateway, and of a mask of a structured text.

Called through ``catalogue``. The bars hold for a quiet machine with two cores.
"""

from collections.abc import Callable
from dataclasses import asdict
from statistics import median

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gateway import masks
from farshore.benchmarks.gateway.setting import Setting, Sizes
from farshore.benchmarks.gateway.streams import Found, measure
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing

MOST_CPU = 2.5
MOST_DELAY_MS = 40.0


def run(facts: Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Runs the parts whose names contain ``only``. Raises InvalidRequest, before it starts a process, if
    there is none."""
    chosen = cases.choose(PARTS, only, kind="part")
    results, bars = cases.measure(chosen, Setting(sizes, progress), progress=progress)
    return Report(asdict(facts), tuple(results), tuple(bars))


def _grpc(setting: Setting) -> Measured:
    return _measured("grpc", *measure("grpc", setting))


def _http(setting: Setting) -> Measured:
    return _measured("http", *measure("http", setting))


def _measured(face: str, gateway: Found, empty: Found) -> Measured:
    ratio = median(ours / theirs for ours, theirs in zip(gateway.cpu_s, empty.cpu_s, strict=True))
    added_ms = gateway.p99_ms - empty.p99_ms
    why = (gateway.errors or empty.errors or [""])[0]
    bars = [
        Bar.at_most(f"{face}: tokens lost", gateway.lost + empty.lost, 0, "tokens", why),
        Bar.at_most(f"{face}: CPU of a token", ratio, MOST_CPU, "of an empty stream's", why),
        Bar.at_most(f"{face}: p99 of the delay", added_ms, MOST_DELAY_MS, "ms more than empty", why),
    ]
    figures = {
        "gateway_cpu_us": 1e6 * median(gateway.cpu_s),
        "empty_cpu_us": 1e6 * median(empty.cpu_s),
        "gateway_p99_ms": gateway.p99_ms,
        "gateway_median_ms": 1e3 * median(gateway.delays_s or [float("nan")]),
        "empty_p99_ms": empty.p99_ms,
        "empty_median_ms": 1e3 * median(empty.delays_s or [float("nan")]),
        "tokens": len(gateway.delays_s),
        "errors": gateway.errors[:3] + empty.errors[:3],
    }
    return [Result(face, Timing(tuple(gateway.delays_s) or (float("nan"),)), figures)], bars


PARTS = {"grpc": _grpc, "http": _http, "masks": masks.measure}
