"""The GPU benchmark: kernels, engine and peers on one GPU, in eight minutes, without Ray or a network.

Called through ``catalogue``. A section that fails, hangs or breaks the GPU for its process costs its bar, and
the others go on: a machine with a GPU is rarely at hand. For the same reason the report is written after each
section. ``--dry`` runs what a CPU can: see ``dry.run``.

It needs torch, triton, transformers, and of the server's packages those that ``device.sh`` lists; a C++
compiler too, for the native kernels of CPU shards. That script carries them to a machine without a network::

    benchmarks/gpu/device.sh carry
    benchmarks/gpu/device.sh run --only steps
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from farshore.benchmarks import cases
from farshore.benchmarks.gpu import process
from farshore.benchmarks.gpu.sections import SECTIONS
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.errors import InvalidRequest


def run(
    facts: Facts,
    *,
    only: str = "",
    model: str | None = None,
    progress: Callable[[str], None],
    so_far: Callable[[Report], None],
) -> Report:
    """Runs the sections whose name contains ``only``. ``model``: the folder that ``truncated`` wrote.
    ``so_far`` gets the report of all sections that have ended, after each. Raises InvalidRequest if there is
    no such section or folder, or no GPU."""
    chosen = cases.choose(SECTIONS, only, kind="section")
    if not torch.cuda.is_available():
        raise InvalidRequest(
            "no GPU is visible to PyTorch: check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --dry for what"
            " a CPU can check"
        )
    if model is not None and not (Path(model) / "config.json").is_file():
        raise InvalidRequest(f"--model {model}: no config.json there; see farshore.benchmarks.gpu.truncated")

    def command(names: Sequence[str]) -> list[str]:
        folder = [] if model is None else [model]
        module = "farshore.benchmarks.gpu.sections"
        return [sys.executable, "-P", "-m", module, json.dumps(names), *folder]

    machine: dict[str, Any] = asdict(facts)
    results: list[Result] = []
    bars: list[Bar] = []
    report = Report(machine)
    for section in process.sections(list(chosen), command, limits=process.Limits(), progress=progress):
        machine = machine | section.machine
        results += section.results
        bars += section.bars
        report = Report(machine, tuple(results), tuple(bars))
        so_far(report)
    return report
