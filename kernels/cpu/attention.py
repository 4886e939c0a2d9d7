"""The native attention kernels: checks the arguments, then calls the C++ in ``native/``.

Chosen by :mod:`farshore.kernels.select`. :class:`farshore.kernels.base.Kernels` says what the functions do;
q, outputs and plain KV may be float32, bfloat16 or float16, sinks any float dtype.

Arithmetic is float32, with two exceptions if q is bfloat16. Products with bfloat16 or quantised KV are
bfloat16, summed in float32, on CPUs with instructions for them. Products of few queries with quantised KV are
16-bit integer products (docs/decisions/004-kernels.md). The instruction set is chosen at import. ``partial``
and ``merge`` allocate no memory. A plan owns the scratch in which its splits are merged.

Lower bounds of the time, lse included (B bytes of KV that a row reads, n new tokens, m keys, H heads, d
dims): ``partial`` reads B and little else, so B / read bandwidth; ``extend`` computes 4 n m H d / 2
operations, so that / GEMM rate; ``merge`` takes a few microseconds of arithmetic in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.cpu import _native
from farshore.kernels.cpu.checks import check_layout, check_spec, check_work
from farshore.kernels.formats import CODES, DTYPE_CODES, NATIVE_DTYPES, KVFormat

native = True

instruction_sets: list[str] = _native.instruction_sets()
"""The instruction sets that this machine has, best first. The first one is in use."""


@dataclass(frozen=True, slots=True)
class Plan:
    native: Any
    """A capsule, which native loops read too."""
    memory: Tensor
    """Kept alive because the native plan points into it."""
    layers: int


def plan(
    work: WorkList,
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
    """Splits long segments so that ``threads`` threads have equal work. The bits of a result do not depend on
    which thread computes a split, or when."""
    if layout.format is KVFormat.FLOAT64:
        raise ValueError(f"KV format {layout.format.value}: only the reference kernels attend to it")
    group1 = spec.groups if group1 is None else group1
    if not 0 <= group0 <= group1 <= spec.groups:
        raise ValueError(f"groups {group0}..{group1} of {spec.groups}")
    n_rows, groups = positions.numel(), group1 - group0
    if not checked:
        check_spec(spec)
        check_layout(layout, spec, memory)
        check_work(work, segments, layout, memory.numel(), n_rows=n_rows, group0=group0, group1=group1)
    positions = positions.to(torch.int64).contiguous()
    native_plan = _native.plan(
        *_shape(spec),
        CODES[layout.format],
        spec.v_in_k,
        spec.window_tokens or 0,
        layout.block_tokens,
        layout.k_row_bytes,
        (layout.k_row_bytes if spec.v_in_k else layout.v_row_bytes),
        layout.k_run_bytes,
        (layout.k_run_bytes if spec.v_in_k else layout.v_run_bytes),
        layout.k_scales,
        (layout.k_scales if spec.v_in_k else layout.v_scales),
        memory.data_ptr(),
        n_rows,
        groups,
        threads,
        positions.data_ptr(),
        work.row.numel(),
        *(field.data_ptr() for field in work),
        *(field.data_ptr() for field in segments),
        group0,
    )
    return Plan(native_plan, memory, layout.layers)


def partial(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    if not 0 <= layer < plan.layers:
        raise ValueError(f"layer {layer} of {plan.layers}")
    _native.partial(plan.native, layer, q, *out)


def partial_async(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """A pool thread that spins for the next call takes it. If none does, :func:`wait` computes it."""
    if not 0 <= layer < plan.layers:
        raise ValueError(f"layer {layer} of {plan.layers}")
    _native.offer(plan.native, layer, q, *out)


def wait() -> None:
    _native.complete()


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
    k, v = _contiguous_rows(k), _contiguous_rows(v)
    size = k.element_size()
    positions = q_positions.to(torch.int64).contiguous()
    _native.extend(
        *_shape(spec),
        groups,
        _dtype(k),
        spec.window_tokens or 0,
        k.data_ptr(),
        k.stride(1) * size,
        k.stride(0) * size,
        v.data_ptr(),
        v.stride(1) * size,
        v.stride(0) * size,
        keys,
        k_position,
        rows,
        positions.data_ptr(),
        threads,
        *_array(_contiguous_rows(q)),
        *_state(out, (rows, heads, spec.v_dim)),
    )


def merge(states: Sequence[State], *, sink: Tensor | None = None, out: State) -> None:
    if sink is not None:
        sink = sink.to(torch.float32).contiguous()
    _native.merge(states, sink, *out)


def _shape(spec: AttentionSpec) -> tuple[float, ...]:
    """The native arguments for a spec."""
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


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _array(x: Tensor) -> tuple[int, int, int, int]:
    """(address, row stride, head stride, dtype code) of ``[rows, heads, dim]``, with strides in elements."""
    row_stride, head_stride, element_stride = x.stride()
    if element_stride != 1:
        raise ValueError("the last dimension must be contiguous")
    return x.data_ptr(), row_stride, head_stride, _dtype(x)


def _dtype(x: Tensor) -> int:
    if x.dtype not in NATIVE_DTYPES or not x.is_cpu:
        raise ValueError(f"{x.dtype} on {x.device}: give float32, bfloat16 or float16 on the CPU")
    return DTYPE_CODES[x.dtype]


def _state(state: State, shape: Sequence[int]) -> tuple[int, ...]:
    """The native arguments for a state whose o has ``shape``."""
    o, lse = state
    if o.shape != shape or lse.shape != shape[:2] or lse.dtype != torch.float32:
        raise ValueError(
            f"a state of o {tuple(o.shape)}, lse {tuple(lse.shape)} {lse.dtype}; expected o {tuple(shape)}"
        )
    return (*_array(o), lse.data_ptr(), *lse.stride())


def _describe(x: Tensor) -> tuple[int, ...]:
    """(address, *shape, *strides, code of the dtype or -1), for the native code where this torch version has
    no C table of functions that read tensors."""
    known = x.is_cpu and x.dtype in NATIVE_DTYPES
    return (x.data_ptr(), *x.shape, *x.stride(), DTYPE_CODES[x.dtype] if known else -1)


_native.use_tensors(Tensor, getattr(Tensor, "__dlpack_c_exchange_api__", None), _describe)
