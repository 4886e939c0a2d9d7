"""The GPU's kernels behind the reference's signatures: checks, then one or two launches.

Called by shards and the engine on an accelerator. All tensors live on one device, which must be the current
one; work lists may lie on the CPU. q, stored KV and outputs: float32, bfloat16 or float16; stored KV also
int8. Products are taken in q's dtype where KV has it too or is int8, else in float32; sums always in
float32.

A plan is for one stream at a time: it owns the scratch between its two kernels. How a long segment is split
depends on the step's other work, so the last bits of a row's result may too; equal steps give equal bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from farshore.kernels.base import AttentionSpec, KVLayout, Rows, Segments, State
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu.extend import extend_kernel
from farshore.kernels.gpu.merge import merge_kernel
from farshore.kernels.gpu.partial import partial_kernel, reduce_kernel
from farshore.kernels.gpu.tuning import (
    NARROW_M,
    Tiles,
    device_of,
    dims_constants,
    extend_tiles,
    merge_constants,
    partial_tiles,
    reduce_constants,
    stored_constants,
)
from farshore.kernels.gpu.work import Heads, flatten

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_STORED = {
    KVFormat.FLOAT32: torch.float32,
    KVFormat.BFLOAT16: torch.bfloat16,
    KVFormat.FLOAT16: torch.float16,
    KVFormat.INT8: torch.int8,
}
_LOAD_BYTES = 16
# States that one launch merges. To compile it for sm_90 takes 1.7 s for 16; for 64 24 s, and registers spill.
_MERGED_AT_ONCE = 16
# Multiply-add in one instruction: triton 3.9's default, which it warns is going to change.
_FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's work on the device, with its scratch, for every layer of one layer class."""

    spec: AttentionSpec
    layout: KVLayout
    heads: Heads
    group0: int
    q_heads: int
    """Those of the groups that q shows."""
    positions: Tensor
    kv: Tensor
    """The memory in elements of the format."""
    scales: Tensor
    """The memory as bf16."""
    align_bytes: int
    """What every base, stride and run is a multiple of."""
    segments: tuple[Tensor, ...]
    """The fields that the kernel reads: all but the count, which the tiles hold."""
    tiles: Tensor
    launches: tuple[tuple[int, int, Tiles], ...]
    """(first tile, tiles, shape) of each launch of the partial kernel"""
    parts: Tensor
    starts: Tensor
    part_o: Tensor
    part_lse: Tensor


def plan(
    rows: Rows,
    segments: Segments,
    memory: Tensor,
    layout: KVLayout,
    spec: AttentionSpec,
    *,
    positions: Tensor,
    group0: int = 0,
    group1: int | None = None,
    threads: int = 1,
    checked: bool = False,
) -> Plan:
    """As :func:`farshore.kernels.reference.plan`. ValueError also for int4 and float64 KV, for rows that are
    not among ``positions``, and for addresses that are no multiple of the element size (scales: 2 bytes)."""
    if layout.format not in _STORED:
        raise ValueError(
            f"{layout.format.value} KV has no GPU kernel: use one of {[f.value for f in _STORED]}"
        )
    stored = _STORED[layout.format]
    group1 = spec.groups if group1 is None else group1
    item_bytes = max(stored.itemsize, 2 if layout.format.quantised else 1)
    numbers = torch.cat([segments.base, segments.stride]).tolist()
    align = gcd(_LOAD_BYTES, layout.k_run_bytes, layout.v_run_bytes, *numbers)
    if align % item_bytes:
        raise ValueError(
            f"segments in {layout.format.value} must lie at multiples of {item_bytes} bytes, not {align}"
        )
    memory = memory[: memory.numel() // item_bytes * item_bytes]

    device = device_of(memory.device.index if memory.is_cuda else None)
    wide = partial_tiles(device.arch, spec.k_dim, layout.format)
    heads = Heads.of(spec, wide_m=wide.block_m)
    work = flatten(
        rows,
        segments,
        spec,
        heads,
        positions,
        group0=group0,
        group1=group1,
        narrow_m=NARROW_M,
        wide_m=wide.block_m,
        block_n=wide.block_n,
        processors=device.processors,
    )
    narrow, total = work.narrow, work.tiles.shape[0]
    launches = ((0, narrow, wide._replace(block_m=NARROW_M)), (narrow, total - narrow, wide))
    there = memory.device
    return Plan(
        spec=spec,
        layout=layout,
        heads=heads,
        group0=group0,
        q_heads=(group1 - group0) * spec.q_heads_per_group,
        positions=positions.to(there, torch.int64),
        kv=memory.view(stored),
        scales=memory.view(torch.bfloat16) if layout.format.quantised else memory,
        align_bytes=align,
        segments=tuple(
            field.to(there)
            for field in (
                segments.base,
                segments.stride,
                segments.first,
                segments.position,
                segments.group0,
                segments.group1,
            )
        ),
        tiles=work.tiles.to(there),
        launches=tuple(launch for launch in launches if launch[1]),
        parts=work.parts.to(there),
        starts=work.starts.to(there),
        part_o=torch.empty(work.slots, spec.v_dim, device=there),
        part_lse=torch.empty(work.slots, device=there),
    )


def partial(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """As :func:`farshore.kernels.reference.partial`; at most three launches, nothing allocated."""
    spec, layout, heads = plan.spec, plan.layout, plan.heads
    n_rows, q_heads = plan.positions.numel(), plan.q_heads
    if q.shape != (n_rows, q_heads, spec.k_dim):
        raise ValueError(f"q {tuple(q.shape)} is not of {n_rows} rows and {q_heads} heads of {spec.k_dim}")
    if not 0 <= layer < layout.layers:
        raise ValueError(f"layer {layer} of {layout.layers}")
    q_strides, out_strides = _strides(q), _state_strides(out, (n_rows, q_heads, spec.v_dim))
    shape = {**dims_constants(spec), "HEADS": heads.heads, "TILE_HEADS": heads.tile_heads}
    for first_tile, tiles, tile in plan.launches:
        partial_kernel[(tiles,)](
            q,
            *q_strides,
            plan.positions,
            plan.kv,
            plan.scales,
            *plan.segments,
            plan.tiles,
            first_tile,
            plan.part_o,
            plan.part_lse,
            layer,
            plan.group0,
            spec.scale,
            **shape,
            **stored_constants(layout),
            ALIGN_BYTES=plan.align_bytes,
            SOFT_CAP=spec.soft_cap,
            WINDOW=spec.window_tokens,
            DTYPE=_product_dtype(q, plan.kv),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **_launch(tile),
        )
    if n_rows and q_heads:
        merging = reduce_constants(spec, heads)
        cuts = triton.cdiv(heads.tile_heads, merging["BLOCK_H"])
        reduce_kernel[(n_rows, q_heads // heads.heads * heads.head_tiles * cuts)](
            plan.part_o,
            plan.part_lse,
            plan.parts,
            plan.starts,
            out.o,
            *out_strides[:2],
            out.lse,
            *out_strides[2:],
            **merging,
            **_FUSED,
        )


def offer(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """As :func:`farshore.kernels.reference.offer`: no launch waits for the one before it to end."""
    partial(plan, layer, q, out=out)


def complete() -> None:
    """As :func:`farshore.kernels.reference.complete`: what follows in the stream finds it done."""


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    *,
    q_positions: Tensor,
    k_position: int,
    out: State,
    threads: int = 1,
) -> None:
    """As :func:`farshore.kernels.reference.extend`; k and v in one dtype, their elements contiguous."""
    n, q_heads, _ = q.shape
    groups = q_heads // spec.q_heads_per_group
    k_per_group, v_per_group = spec.k_heads // spec.groups, spec.v_heads // spec.groups
    expected = (groups * k_per_group, k.shape[1], spec.k_dim), (groups * v_per_group, k.shape[1], spec.v_dim)
    if q.shape != (q_positions.numel(), groups * spec.q_heads_per_group, spec.k_dim) or expected != (
        k.shape,
        v.shape,
    ):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not match {spec}")
    if k.dtype != v.dtype:
        raise ValueError(f"k {k.dtype}, v {v.dtype}")
    strides = _state_strides(out, (n, q_heads, spec.v_dim))
    q_strides, k_strides, v_strides = _strides(q), _strides(k), _strides(v)
    dtype = _product_dtype(q, k)
    arch = device_of(q.device.index if q.is_cuda else None).arch
    tile = extend_tiles(arch, spec.k_dim, full_precision=dtype == tl.float32)
    heads = Heads.of(spec, wide_m=tile.block_m)
    if not (n and q_heads):
        return
    grid = (triton.cdiv(n, tile.block_m // heads.tile_heads), q_heads // heads.heads * heads.head_tiles)
    extend_kernel[grid](
        q,
        *q_strides,
        q_positions,
        k,
        *k_strides,
        v,
        *v_strides,
        k_position,
        out.o,
        *strides[:2],
        out.lse,
        *strides[2:],
        n,
        k.shape[1],
        spec.scale,
        **dims_constants(spec),
        HEADS=heads.heads,
        TILE_HEADS=heads.tile_heads,
        K_HEADS_PER_GROUP=k_per_group,
        V_HEADS_PER_GROUP=v_per_group,
        SOFT_CAP=spec.soft_cap,
        WINDOW=spec.window_tokens,
        DTYPE=dtype,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **_launch(tile),
    )


def merge(states: Sequence[State], *, sink: Tensor | None = None, out: State) -> None:
    """As :func:`farshore.kernels.reference.merge`, which one kernel does, compiled anew for each number of
    states; of more than 16, the first ones are merged into one in float32, again and again. ValueError for
    no states, or for shapes that differ from ``out``'s."""
    rows, heads, v_dim = out.o.shape
    if not states or (sink is not None and sink.shape != (heads,)):
        raise ValueError(f"{len(states)} states, a sink of {None if sink is None else tuple(sink.shape)}")
    while len(states) > _MERGED_AT_ONCE:
        first = State(torch.empty_like(out.o, dtype=torch.float32), torch.empty_like(out.lse))
        merge(states[:_MERGED_AT_ONCE], out=first)
        states = [first, *states[_MERGED_AT_ONCE:]]
    strides = tuple(_state_strides(state, out.o.shape) for state in states)
    out_strides = _state_strides(out, out.o.shape)
    if not (rows and heads):
        return
    shape = merge_constants(heads, v_dim)
    merge_kernel[(rows, triton.cdiv(heads, shape["BLOCK_H"]))](
        tuple(states),
        strides,
        sink,
        out.o,
        *out_strides[:2],
        out.lse,
        *out_strides[2:],
        heads,
        **shape,
        **_FUSED,
    )


def _launch(tile: Tiles) -> dict[str, int | bool]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, **_FUSED}


def _product_dtype(q: Tensor, kv: Tensor) -> tl.dtype:
    """ValueError unless both are dtypes the kernels know."""
    if q.dtype not in _DTYPES or kv.dtype not in (*_DTYPES, torch.int8):
        raise ValueError(f"q {q.dtype} on KV {kv.dtype}: not float32, bfloat16, float16 (KV: int8)")
    return _DTYPES[q.dtype] if kv.dtype in (q.dtype, torch.int8) else tl.float32


def _strides(x: Tensor) -> tuple[int, int]:
    """The outer two strides of a tensor whose rows are contiguous."""
    if x.stride(2) != 1 and x.shape[2] != 1:
        raise ValueError(f"rows must be contiguous, not {x.stride()} apart")
    return x.stride()[:2]


def _state_strides(state: State, shape: Sequence[int]) -> tuple[int, int, int, int]:
    o, lse = state
    if o.shape != shape or lse.shape != shape[:2] or o.dtype not in _DTYPES or lse.dtype != torch.float32:
        raise ValueError(
            f"o {tuple(o.shape)} {o.dtype}, lse {tuple(lse.shape)} {lse.dtype}: no state of {tuple(shape)}"
        )
    return (*_strides(o), *lse.stride())
