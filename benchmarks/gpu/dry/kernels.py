"""Compiles every GPU kernel by itself, at any head dims, and prints each one's resources, one JSON object per
line. See ``target``.

Run by ``run`` and by tests/kernels/test_gpu_compile.py. It must not know the engine: ``launches`` compiles
what that launches.

    python -P -m farshore.benchmarks.gpu.dry.kernels cuda:90 64,128 bfloat16,int8 [capped]
"""

import json
import sys
from itertools import product

import torch

from farshore.benchmarks.gpu.dry.target import pretend, resources
from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import ops

ROWS = 64
TOKENS = 1000
MERGED_STATES = 8


def call_all(k_dim: int, format: KVFormat, *, capped: bool) -> None:
    """Calls every public function with 8 KV heads and 4 query heads each; at K dim 576 with MLA's shape, one
    group of 128 query heads. ``capped``: with a soft cap and a window, as Gemma has them."""
    spec = AttentionSpec(32, 8, 8, k_dim, k_dim, 0.1)
    if k_dim == 576:
        spec = AttentionSpec(128, 1, 1, 576, 512, 0.1, v_in_k=True)
    if capped:
        spec = spec._replace(soft_cap=50.0, window_tokens=512)
    dtype = torch.bfloat16 if format.quantised else format.dtype
    layout = KVLayout.of(spec, layers=2, format=format)
    q = torch.zeros(ROWS, spec.q_heads, k_dim, dtype=dtype)
    out = State.identity(ROWS, spec.q_heads, spec.v_dim, dtype=torch.bfloat16, device="cpu")

    # All rows on a shared segment take wide tiles; one row on a segment of its own takes narrow ones.
    memory = torch.zeros(layout.block_bytes * (TOKENS // layout.block_tokens + 1), dtype=torch.uint8)
    run = (0, layout.block_bytes, 0, TOKENS, 0, 0, spec.groups)
    work = WorkList.of([(0, ROWS, 0, 0, spec.groups), (0, 1, 1, 0, spec.groups)])
    positions = torch.full((ROWS,), TOKENS)
    plan = ops.plan(work, Segments.of([run, run]), memory, layout, spec, positions=positions)
    ops.partial(plan, 1, q, out=out)
    if format.quantised:
        # Only `partial` reads stored KV; `extend` takes plain tensors, and states are never quantised.
        return
    k = torch.zeros(spec.k_heads, TOKENS, k_dim, dtype=dtype)
    v = torch.zeros(spec.v_heads, TOKENS, spec.v_dim, dtype=dtype)
    ops.extend(q, k, v, spec, q_positions=positions, k_position=0, out=out)
    ops.merge([out] * MERGED_STATES, sink=torch.zeros(spec.q_heads), out=out)


def main(name: str, k_dims: str, formats: str, variant: str = "") -> None:
    target, compiled = pretend(name)
    for k_dim, format in product(map(int, k_dims.split(",")), map(KVFormat, formats.split(","))):
        call_all(k_dim, format, capped=variant == "capped")
        for title, binary in compiled:
            row = {"target": name, "kernel": title, "k_dim": k_dim, "kv": format.value}
            print(json.dumps(row | resources(binary, target)), flush=True)
        compiled.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
