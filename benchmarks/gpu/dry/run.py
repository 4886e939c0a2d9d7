"""``farshore bench gpu --dry``: what a machine without a GPU can check of the GPU benchmark, and of the code
that runs on GPUs.

Called through ``catalogue``. Each part is a process of its own. A bar counts what is wrong, with the first
fault as its note. It must not import triton.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from farshore.benchmarks import cases
from farshore.benchmarks.gpu.dry import children
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report
from farshore.errors import FarshoreError

TARGET = "cuda:90"
SHAPES = ("9,3,64:bfloat16",)
"""Models whose engines' launches are compiled; the tests compile more, for more targets."""

Faults = dict[str, list[str]]
"""What was checked → what is wrong with it."""


def fakes() -> Faults:
    """Engines of every family of models on CUDA tensors without values: none mixes devices."""
    rows = children.rows("fakes")
    return {f"CUDA fakes, {row['case']}": [row["error"]] if row["error"] else [] for row in rows}


def compilation() -> Faults:
    """Every kernel that engines and shards launch compiles for TARGET, without spills."""
    found: Faults = {name: [] for name in children.PROGRAMS_A_PROCESSOR}
    for row in children.rows("launches", TARGET, *SHAPES):
        found[row["kernel"]] += children.faults(row)
    return {f"compiled for {TARGET}, {name}": faults for name, faults in found.items()}


def sections() -> Faults:
    """Every section of the benchmark runs at tiny sizes, with interpreted kernels whose results are right."""
    found: Faults = {}
    for row in children.rows("sections", **{children.INTERPRET: "1"}):
        wrong = [row["error"]] if row["error"] else []
        if row["section"].startswith(("correctness", "agreement")):
            bounds = row["bounds"]
            wrong += [f"{bar} {value}" for bar, value in row["bars"].items() if not value <= bounds[bar]]
        found[f"at tiny sizes, {row['section']}"] = wrong
    return found


PARTS: Mapping[str, Callable[[], Faults]] = {
    "fakes": fakes,
    "compilation": compilation,
    "sections": sections,
}


def run(facts: Facts, *, only: str = "", progress: Callable[[str], None]) -> Report:
    """Runs the parts whose name contains ``only``, as many at once as there are cores. Raises InvalidRequest
    if there are none."""
    chosen = cases.choose(PARTS, only, kind="part")
    progress(", ".join(chosen))
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        found = processes.map(_faults, chosen, chosen.values())
        bars = [
            Bar.at_most(checked, len(faults), 0, "faults", faults[0] if faults else "")
            for part in found
            for checked, faults in part.items()
        ]
    return Report(asdict(facts), bars=tuple(bars))


def _faults(name: str, part: Callable[[], Faults]) -> Faults:
    try:
        return part()
    except FarshoreError as error:
        return {name: [str(error).splitlines()[0]]}
