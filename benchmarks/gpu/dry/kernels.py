"""Compiles every GPU kernel by itself, at any head dims, and prints each one's resources, one JSON object per
line. See ``target``.

Run by ``run`` and by tests/kernels/gpu/test_compile.py. It must not know the engine: ``launches`` compiles
what that launches.

    python -P -m farshore.benchmarks.gpu.dry.kernels cuda:90 64,128 bfloat16,int8 [capped]
"""

import json
import sys
from itertools import product

import torch

from farshore.benchmarks.gpu.dry.target import pretend, resources
from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.dense.base import KVRows, KVSlots, Rotation
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import ops
from farshore.kernels.gpu.dense import ops as dense

ROWS = 64
MANY_ROWS = 2048
"""Of a chunk of prefill."""
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


def call_dense(k_dim: int, format: KVFormat) -> None:
    """Calls the dense kernels with one row and with many: 8 KV heads and 4 query heads each, hidden states of
    Llama 8B's size, and of SmolLM2's, which no power of two divides."""
    dtype = torch.bfloat16 if format.quantised else format.dtype
    spec = AttentionSpec(32, 8, 8, k_dim, k_dim, 0.1)
    layout = KVLayout.of(spec, layers=2, format=format)
    memory = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    rotation = Rotation(*torch.zeros(2, 8, k_dim // 2, dtype=dtype))
    for rows in (1, MANY_ROWS):
        positions = torch.zeros(rows, dtype=torch.int64)
        x = torch.zeros(rows, 48 * k_dim, dtype=dtype)
        q = torch.zeros(rows, 32, k_dim, dtype=dtype)
        dense.rotate(x, rotation, positions, q=q, kv=KVSlots(memory, layout, 1, *[positions] * 3))
        dense.rotate(x[:, : 32 * k_dim], rotation, positions, q=q)
        if format.quantised:  # Nothing else reads or writes stored KV.
            continue
        dense.rotate(x, rotation, positions, q=q, kv=KVRows(*torch.zeros(2, rows, 8, k_dim, dtype=dtype)))
        for hidden, inner in ((4096, 14336), (576, 1536)):
            h = torch.zeros(rows, hidden, dtype=dtype)
            for added in (None, h):
                dense.add_norm(h, added, h[0], 1e-5, out=h)
            dense.silu_multiply(torch.zeros(rows, 2 * inner, dtype=dtype), out=h.new_zeros(rows, inner))


def main(name: str, k_dims: str, formats: str, variant: str = "") -> None:
    target, compiled = pretend(name)
    for k_dim, format in product(map(int, k_dims.split(",")), map(KVFormat, formats.split(","))):
        call_all(k_dim, format, capped=variant == "capped")
        if k_dim <= 256 and not variant:
            call_dense(k_dim, format)
        for title, binary in compiled:
            row = {"target": name, "kernel": title, "k_dim": k_dim, "kv": format.value}
            print(json.dumps(row | resources(binary, target)), flush=True)
        compiled.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
