"""The gateway benchmark: what the front door costs per token, and what a mask of a structured text costs.

Called through ``catalogue``. The bars hold for a quiet machine with two cores.
"""

from collections.abc import Callable
from dataclasses import asdict

from farshore.benchmarks import cases
from farshore.benchmarks.gateway import masks, streams
from farshore.benchmarks.gateway.setting import Setting, Sizes
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Report

PARTS = {"grpc": streams.measure("grpc"), "http": streams.measure("http"), "masks": masks.measure}


def run(facts: Facts, sizes: Sizes, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Runs the parts whose names contain ``only``. Raises InvalidRequest, before it starts a process, if
    there is none."""
    chosen = cases.choose(PARTS, only, kind="part")
    results, bars = cases.measure(chosen, Setting(sizes, progress), progress=progress)
    return Report(asdict(facts), tuple(results), tuple(bars))
