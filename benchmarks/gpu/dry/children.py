"""Runs the modules of this folder in processes of their own, and judges the kernels that they compiled.

A process either interprets triton's kernels, compiles them for one target, or has fake GPUs; none of these is
undone. Called by ``run`` and by tests. It must not import triton.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farshore.errors import Internal

SHARED_BYTES = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}
"""Targets, and the most shared memory (LDS) that a program may have there."""
DENSE = ("add_norm", "rotate", "silu_multiply")
PROGRAMS_A_PROCESSOR = {"partial narrow": 2, "partial wide": 2, "extend": 1, "reduce": 4, "merge": 4} | {
    kernel: 4 for kernel in DENSE
}
"""The kernels, and how many programs of each a processor must have registers for, at K dims 64 and 128.
Decoding hides latency with several programs per SM or compute unit."""
REGISTERS = {"cuda": 65536, "hip": 4 * 512 * 64}
"""Per SM or compute unit."""

DEADLINE_S = 900.0
INTERPRET = "TRITON_INTERPRET"


def rows(
    module: str, *arguments: str, cache: Path | None = None, packages: Path | None = None, **variables: str
) -> list[dict[str, Any]]:
    """The JSON objects that ``python -m farshore.benchmarks.gpu.dry.MODULE`` prints, one a line.

    ``cache``: the folder of triton's compiled kernels; None: the user's. ``packages``: a folder whose
    packages, such as another triton, are imported before the installed ones. Raises Internal with the last
    line of the process's errors if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != INTERPRET} | variables
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"farshore.benchmarks.gpu.dry.{module}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise Internal(f"{module} {' '.join(arguments)}: {last}\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(kernel: Mapping[str, Any], *, rare: bool = False) -> list[str]:
    """What is wrong with a compiled kernel, given as the object that ``kernels`` and ``launches`` print.
    ``rare``: of a shape that no supported model has; its loads may be narrow."""
    found = []
    if kernel["spills"]:
        found.append(f"{kernel['spills']} registers or bytes are spilled")
    if kernel["shared"] > SHARED_BYTES[kernel["target"]]:
        found.append(f"{kernel['shared']} bytes of shared memory, of {SHARED_BYTES[kernel['target']]}")
    if not rare and not kernel["wide_loads"] and kernel["kernel"] not in ("reduce", "merge", *DENSE):
        found.append("loads of less than 16 bytes")
    return found
