"""The gateway benchmark: the cost of a token in the gateway, and of a mask of a structured text.

Called through ``catalogue``. The bars hold for a quiet machine with two cores.
"""

from collections.abc import Callable
from dataclasses import asdict

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gateway import masks
from farshore.benchmarks.gateway.setting import Setting, Sizes
from farshore.benchmarks.gateway.streams import Found, measure
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing, median_if_all

MOST_CPU = 2.5
MOST_DELAY_MS = 40.0


def run(facts: Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Runs the parts whose names contain ``only``. Raises InvalidRequest, before it starts a process, if
    there is none."""
    chosen = cases.choose(PARTS, only, kind="part")
    results, bars = cases.measure(chosen, Setting(sizes, progress), progress=progress)
    return Report(asdict(facts), tuple(results), tuple(bars))


def _grpc(setting: Setting) -> Measured:
    return measured("grpc", *measure("grpc", setting))


def _http(setting: Setting) -> Measured:
    return measured("http", *measure("http", setting))


def measured(face: str, gateway: Found, empty: Found) -> Measured:
    """The result and the bars of a face."""
    ratio = median_if_all(
        ours / theirs if ours and theirs else None
        for ours, theirs in zip(gateway.cpu_s, empty.cpu_s, strict=True)
    )
    ours_ms, theirs_ms = gateway.delay_ms(99), empty.delay_ms(99)
    added_ms = None if ours_ms is None or theirs_ms is None else ours_ms - theirs_ms
    why = (gateway.errors or empty.errors or [""])[0]
    if not why and (ratio is None or added_ms is None):
        why = "no token came in a window"
    bars = [
        Bar.at_most(f"{face}: tokens lost", gateway.lost + empty.lost, 0, "tokens", why),
        Bar.at_most(f"{face}: CPU of a token", ratio, MOST_CPU, "of an empty stream's", why),
        Bar.at_most(f"{face}: p99 of the delay", added_ms, MOST_DELAY_MS, "ms more than empty", why),
    ]
    figures = {
        "gateway_cpu_us": gateway.cpu_us,
        "empty_cpu_us": empty.cpu_us,
        "gateway_p99_ms": ours_ms,
        "gateway_median_ms": gateway.delay_ms(50),
        "empty_p99_ms": theirs_ms,
        "empty_median_ms": empty.delay_ms(50),
        "tokens": len(gateway.delays_s),
        "errors": gateway.errors[:3] + empty.errors[:3],
    }
    return [Result(face, Timing(tuple(gateway.delays_s)), figures)], bars


PARTS = {"grpc": _grpc, "http": _http, "masks": masks.measure}
