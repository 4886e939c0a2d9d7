"""Native CPU kernels: launchers with checks over the C++ in `native/`, signatures as in the reference.

Arithmetic is float32, with two exceptions where q is bfloat16: products with bfloat16 or quantised KV are
bfloat16's, summed in float32, on a CPU that is fast at them; and those of few queries with quantised KV are
of 16-bit integers (docs/decisions/004-kernels.md). The instruction set is chosen at import. Neither `partial`
nor `merge` allocates. Thread-safe, but a plan serves one call at a time: it owns the scratch that its splits
are merged in.

Floors (design.md §6, lse included; B bytes of KV a row reads, n new tokens, m keys, H heads, d dims):
partial moves B and little else, so time >= B / read bandwidth; extend computes 4 n m H d / 2 operations, so
time >= that / GEMM rate; merge is a few microseconds of arithmetic in cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, KVLayout, Rows, Segments, State
from farshore.kernels.cpu import _native
from farshore.kernels.cpu.checks import check_layout, check_spec, check_work
from farshore.kernels.formats import KVFormat

_FORMATS = {
    KVFormat.FLOAT32: 0,
    KVFormat.BFLOAT16: 1,
    KVFormat.FLOAT16: 2,
    KVFormat.INT8: 3,
    KVFormat.INT4: 4,
}
_ELEMENTS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int16: 4,
    torch.int32: 5,
    torch.int64: 6,
}
"""The numbers of ``Element`` in ``native/runtime/tensors.h``."""

instruction_sets: list[str] = _native.instruction_sets()
"""Those this machine has, best first; the first is in use."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's work, laid out for every layer of one layer class."""

    native: Any
    memory: Tensor
    """Kept alive: the native plan points into it."""
    layers: int


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
    """As :func:`farshore.kernels.reference.plan`. Long segments are split so that ``threads`` threads have
    equal work; a plan's bits do not depend on which thread runs what, or when.
    """
    if layout.format not in _FORMATS:
        raise ValueError(f"KV format {layout.format.value}: only the reference kernels attend to it")
    group1 = spec.groups if group1 is None else group1
    if not 0 <= group0 <= group1 <= spec.groups:
        raise ValueError(f"groups {group0}..{group1} of {spec.groups}")
    n_rows, groups = positions.numel(), group1 - group0
    if not checked:
        check_spec(spec)
        check_layout(layout, spec, memory)
        check_work(rows, segments, layout, memory.numel(), n_rows=n_rows, group0=group0, group1=group1)
    native = _native.plan(
        shape=_shape(spec),
        layout=_layout(layout, spec),
        window_tokens=spec.window_tokens or 0,
        memory=memory,
        positions=positions.to(torch.int64).contiguous(),
        rows=rows,
        segments=segments,
        group0=group0,
        groups=groups,
        threads=threads,
    )
    return Plan(native, memory, layout.layers)


def partial(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """As :func:`farshore.kernels.reference.partial`; one native call, nothing allocated."""
    if not 0 <= layer < plan.layers:
        raise ValueError(f"layer {layer} of {plan.layers}")
    _native.partial(plan.native, layer, q, *out)


def offer(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """As :func:`farshore.kernels.reference.offer`: a thread that waits awake for the next call takes it;
    if none does, :func:`complete` comes to it."""
    if not 0 <= layer < plan.layers:
        raise ValueError(f"layer {layer} of {plan.layers}")
    _native.partial_async(plan.native, layer, q, *out)


def complete() -> None:
    """As :func:`farshore.kernels.reference.complete`."""
    _native.wait()


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
    """As :func:`farshore.kernels.reference.extend`; k and v in one of float32, bfloat16 and float16."""
    check_spec(spec)
    rows, heads, keys = q_positions.numel(), q.shape[1], k.shape[1]
    groups = heads // spec.q_heads_per_group
    if (
        q.shape != (rows, groups * spec.q_heads_per_group, spec.k_dim)
        or k.shape != (groups * spec.k_heads // spec.groups, keys, spec.k_dim)
        or v.shape != (groups * spec.v_heads // spec.groups, keys, spec.v_dim)
    ):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not match {spec}")
    if k.dtype != v.dtype or not (k.is_cpu and v.is_cpu):
        raise ValueError(f"k {k.dtype} on {k.device}, v {v.dtype} on {v.device}")
    _native.extend(
        shape=_shape(spec),
        groups=groups,
        window_tokens=spec.window_tokens or 0,
        q=_dense_rows(q),
        k=_dense_rows(k),
        v=_dense_rows(v),
        k_position=k_position,
        q_positions=q_positions.to(torch.int64).contiguous(),
        o=out.o,
        lse=out.lse,
        threads=threads,
    )


def merge(states: Sequence[State], *, sink: Tensor | None = None, out: State) -> None:
    """As :func:`farshore.kernels.reference.merge`."""
    if sink is not None:
        sink = sink.to(torch.float32).contiguous()
    _native.merge(states, sink, *out)


def _shape(spec: AttentionSpec) -> tuple[float, ...]:
    groups = spec.groups
    return (
        spec.q_heads_per_group,
        spec.k_heads // groups,
        spec.v_heads // groups,
        spec.k_dim,
        spec.v_dim,
        spec.scale,
        spec.soft_cap or 0.0,
    )


def _layout(layout: KVLayout, spec: AttentionSpec) -> tuple[int, ...]:
    """``layout`` of the native ``plan``. A V that is the beginning of K has K's strides."""
    k = (layout.k_row_bytes, layout.k_run_bytes, layout.k_scales)
    v = k if spec.v_in_k else (layout.v_row_bytes, layout.v_run_bytes, layout.v_scales)
    sizes = (size for pair in zip(k, v, strict=True) for size in pair)
    return (_FORMATS[layout.format], spec.v_in_k, layout.block_tokens, *sizes)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _describe(x: Tensor) -> tuple[int, ...]:
    """(address, *shape, *strides, element) for ``set_tensors`` in ``native/runtime/tensors.h``."""
    return (x.data_ptr(), *x.shape, *x.stride(), _ELEMENTS.get(x.dtype, -1) if x.is_cpu else -1)


_native.use_tensors(Tensor, getattr(Tensor, "__dlpack_c_exchange_api__", None), _describe)
