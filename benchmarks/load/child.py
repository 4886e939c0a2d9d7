"""Loads a checkpoint and prints what that took.

``python -P -m farshore.benchmarks.load.child MODEL DTYPE THREADS`` is run by ``benchmark`` and by tests: a
process of its own, whose memory nothing else has used before. Prints one JSON object: ``before_bytes`` and
``peak_bytes``, resident memory before loading and at most during it, ``load_s``, ``cpu_s`` of all
threads, and the model's ``content``.
"""

import json
import sys
import time
from pathlib import Path

import torch

from farshore.attention_offload.codec import dtype_of
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model


def main(model: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    # The kernels' module counts as before: it is loaded once, whatever the checkpoint's size.
    __import__("farshore.models.native_llama")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_bytes = _status("VmRSS")
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    loaded = load_model(resolve(model), dtype=dtype_of(dtype))
    figures = {
        "load_s": time.perf_counter() - begun_s,
        "cpu_s": time.process_time() - begun_cpu_s,
        "before_bytes": before_bytes,
        "peak_bytes": _status("VmHWM"),
        "content": loaded.content,
    }
    print(json.dumps(figures))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
