"""The GPU kernels' public functions: check the arguments, then launch kernels on the current stream.

Chosen by :mod:`farshore.kernels.select`; :class:`farshore.kernels.base.Kernels` says what the functions do.
All tensors lie on one device, which must be the current one; work lists and segments may lie on the CPU. q,
stored KV and outputs are float32, bfloat16 or float16; stored KV may be int8 or int4 too. Products are in q's
dtype if KV has the same dtype or is quantised, else in float32; sums are always float32.

A plan serves one stream at a time, because it owns the scratch between its two kernels. How a long segment
is split depends on the step's other work, and on the plan that it advanced; so do the last bits of a row's
result. Equal plans give equal bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from farshore.kernels.base import AttentionSpec, State
from farshore.kernels.gpu import tuning
from farshore.kernels.gpu.extend import extend_kernel
from farshore.kernels.gpu.merge import merge_kernel
from farshore.kernels.gpu.partial import partial_kernel, reduce_kernel
from farshore.kernels.gpu.plans import STORED_DTYPES, Plan
from farshore.kernels.gpu.plans import plan as plan
from farshore.kernels.gpu.tuning import TileShape
from farshore.kernels.gpu.work import Heads

native = False

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# States that one launch merges. Compiling for sm_90 takes 1.7 s for 16; for 64 it takes 24 s and spills.
_MERGED_AT_ONCE = 16
# Fused multiply-add is the default of triton 3.9, which warns that the default will change.
_FUSED = {"enable_fp_fusion": True}


def partial(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """At most three launches. Allocates no memory."""
    spec, layout, heads = plan.spec, plan.layout, plan.heads
    n_rows, q_heads = plan.positions.numel(), plan.q_heads
    if q.shape != (n_rows, q_heads, spec.k_dim):
        raise ValueError(f"q {tuple(q.shape)} is not of {n_rows} rows and {q_heads} heads of {spec.k_dim}")
    if not 0 <= layer < layout.layers:
        raise ValueError(f"layer {layer} of {layout.layers}")
    q_strides, out_strides = _strides(q), _state_strides(out, (n_rows, q_heads, spec.v_dim))
    shape = {**tuning.dims_constants(spec), "HEADS": heads.heads, "TILE_HEADS": heads.tile_heads}
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
            plan.split_o,
            plan.split_lse,
            layer,
            plan.group0,
            spec.scale,
            **shape,
            **tuning.stored_constants(layout),
            ALIGN_BYTES=plan.align_bytes,
            SOFT_CAP=spec.soft_cap,
            WINDOW=spec.window_tokens,
            DTYPE=_product_dtype(q, plan.kv),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **_launch(tile),
        )
    if n_rows and q_heads:
        merging = tuning.reduce_constants(spec, heads)
        cuts = triton.cdiv(heads.tile_heads, merging["BLOCK_H"])
        reduce_kernel[(n_rows, q_heads // heads.heads * heads.head_tiles * cuts)](
            plan.split_o,
            plan.split_lse,
            plan.slots,
            plan.starts,
            out.o,
            *out_strides[:2],
            out.lse,
            *out_strides[2:],
            **merging,
            **_FUSED,
        )


def partial_async(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """As :func:`partial`, because a launch returns before the kernel ends."""
    partial(plan, layer, q, out=out)


def wait() -> None:
    """Returns at once: later work in the stream runs after the kernels."""


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
    """The elements of each row of q, k and v must be adjacent."""
    n, q_heads, _ = q.shape
    groups = q_heads // spec.q_heads_per_group
    k_per_group, v_per_group = spec.k_heads // spec.groups, spec.v_heads // spec.groups
    expected = (groups * k_per_group, k.shape[1], spec.k_dim), (groups * v_per_group, k.shape[1], spec.v_dim)
    if q.shape != (q_positions.numel(), groups * spec.q_heads_per_group, spec.k_dim) or expected != (
        k.shape,
        v.shape,
    ):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not match {spec}")
    if k.dtype != v.dtype or k.dtype not in _DTYPES:
        raise ValueError(f"k {k.dtype}, v {v.dtype}: not one of float32, bfloat16 and float16")
    strides = _state_strides(out, (n, q_heads, spec.v_dim))
    q_strides, k_strides, v_strides = _strides(q), _strides(k), _strides(v)
    dtype = _product_dtype(q, k)
    arch = tuning.device_of(q.device.index if q.is_cuda else None).arch
    tile = tuning.extend_tiles(arch, spec.k_dim, full_precision=dtype == tl.float32)
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
        **tuning.dims_constants(spec),
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
    """One kernel, compiled once for each number of states. Of more than 16 states, the first 16 are merged
    into one in float32, repeatedly."""
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
    shape = tuning.merge_constants(heads, v_dim)
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


def _launch(tile: TileShape) -> dict[str, int | bool]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, **_FUSED}


def _product_dtype(q: Tensor, kv: Tensor) -> tl.dtype:
    """The dtype of products. ``kv``: in the dtype of ``STORED_DTYPES``. Raises ValueError unless the kernels
    know both dtypes."""
    if q.dtype not in _DTYPES or kv.dtype not in STORED_DTYPES.values():
        raise ValueError(f"q {q.dtype} on KV {kv.dtype}: not float32, bfloat16, float16 (KV: int8, int4)")
    return tl.float32 if kv.dtype in _DTYPES and kv.dtype != q.dtype else _DTYPES[q.dtype]


def _strides(x: Tensor) -> tuple[int, int]:
    """The outer two strides. Raises ValueError unless the elements of the last dimension are adjacent."""
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
