"""The GPU benchmark: kernels, engine and peers on one GPU, in eight minutes, without Ray or a network.

Called through ``catalogue``. A section that fails costs its bar, and the others go on: a machine with a GPU
is rarely at hand. ``--dry`` runs what a CPU can: see ``dry.run``.

It needs torch, triton, transformers, and of the server's packages those that ``device.sh`` lists; a C++
compiler too, for the native kernels of CPU shards. That script carries them to a machine without a network::

    benchmarks/gpu/device.sh carry
    benchmarks/gpu/device.sh run --only steps
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu import agreement, attention, correctness, dense, peers, steps
from farshore.benchmarks.gpu.setting import Setting, Sizes
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.errors import InvalidRequest

SECTIONS: Mapping[str, Callable[[Setting], Measured]] = {
    "correctness": correctness.measure,
    "decode": attention.decode,
    "extend": attention.extend,
    "correctness of dense kernels": dense.correctness,
    "dense kernels": dense.speed,
    "agreement float32": agreement.float32,
    "agreement bfloat16": agreement.bfloat16,
    "steps": steps.local,
    "steps without graphs": steps.graphs,
    "CPU shards": steps.offloaded,
    "beside transformers": peers.transformers,
    "beside vllm": peers.vllm,
}


def run(
    facts: Facts, sizes: Sizes, *, only: str = "", model: str | None = None, progress: Callable[[str], None]
) -> Report:
    """Runs the sections whose name contains ``only``. ``model``: the folder that ``truncated`` wrote. Raises
    InvalidRequest if there is no such section or folder, or no GPU."""
    chosen = cases.choose(SECTIONS, only, kind="section")
    if not torch.cuda.is_available():
        raise InvalidRequest(
            "no GPU is visible to PyTorch: check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --dry for what"
            " a CPU can check"
        )
    folder = Path(model) if model is not None else None
    if folder is not None and not (folder / "config.json").is_file():
        raise InvalidRequest(f"--model {folder}: no config.json there; see farshore.benchmarks.gpu.truncated")
    setting = Setting(torch.device("cuda", 0), sizes, folder=folder, progress=progress)
    results, bars = measured(chosen, setting, progress=progress)
    return Report({**_gpu(), **asdict(facts), **setting.rates()}, tuple(results), tuple(bars))


def measured(
    sections: Mapping[str, Callable[[Setting], Measured]],
    setting: Setting,
    *,
    progress: Callable[[str], None],
) -> Measured:
    """Runs sections in order. One that fails gives a bar without a value, whose note is the error."""
    results: list[Result] = []
    bars: list[Bar] = []
    for name, section in sections.items():
        progress(name)
        try:
            section_results, section_bars = section(setting)
            results += section_results
            bars += section_bars
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            bars.append(Bar.at_most(name, None, 0, "errors", f"{type(error).__name__}: {line}"))
        # Engines that ended, and their graphs, lie in cycles; vLLM's process needs what PyTorch keeps.
        gc.collect()
        with suppress(RuntimeError):  # A GPU that a section broke refuses this, too.
            torch.cuda.empty_cache()
    return results, bars


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
