"""The sections of the GPU benchmark, the most important ones first, and the process that measures them.

``process`` starts that process, and ``dry`` runs the sections on a CPU. The process prints one JSON object
per line: ``section`` when one begins, ``progress``, and a section's ``results``, ``bars`` and ``machine``
when it ends. It ends with its standard input, and after an error that broke the GPU for it. It must not know
deadlines::

    python -P -m farshore.benchmarks.gpu.sections '["decode", "steps"]' [FOLDER]
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu import agreement, attention, correctness, dense, peers, steps
from farshore.benchmarks.gpu.process import end_with_input, failed
from farshore.benchmarks.gpu.setting import Setting, Sizes

SECTIONS: Mapping[str, Callable[[Setting], Measured]] = {
    "agreement float32": agreement.float32,
    "correctness": correctness.measure,
    "correctness of dense kernels": dense.correctness,
    "decode": attention.decode,
    "agreement bfloat16": agreement.bfloat16,
    "steps": steps.local,
    "beside transformers": peers.transformers,
    "CPU shards": steps.offloaded,
    "extend": attention.extend,
    "dense kernels": dense.speed,
    "steps without graphs": steps.graphs,
    "beside vllm": peers.vllm,
}


def measured(name: str, setting: Setting) -> Measured:
    """Runs a section. One that fails gives a bar without a value, whose note is the error."""
    try:
        results, bars = SECTIONS[name](setting)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        results, bars = [], [failed(name, f"{type(error).__name__}: {line}")]
    # Engines that ended, and their graphs, lie in cycles; vLLM's process needs what PyTorch keeps.
    gc.collect()
    with suppress(RuntimeError):  # A GPU that a section broke refuses this, too.
        torch.cuda.empty_cache()
    return results, bars


def main(names: str, folder: str | None = None) -> None:
    # What libraries print must not come between the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    end_with_input()

    def report(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    setting = Setting(
        torch.device("cuda", 0),
        Sizes(),
        folder=None if folder is None else Path(folder),
        progress=lambda text: report(progress=text),
    )
    for name in json.loads(names):
        report(section=name)
        results, bars = measured(name, setting)
        report(
            results=[asdict(result) for result in results],
            bars=[asdict(bar) for bar in bars],
            machine={**_gpu(), **setting.rates()},
        )
        torch.cuda.synchronize()  # Raises, which ends the process, if the GPU refuses every call from now on.


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
