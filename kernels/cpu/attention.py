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
from farshore.kernels.cpu.checks import check_layout, check_spec, check_work
from farshore.kernels.cpu.native_module import native as _native
from farshore.kernels.formats import CODES, KVFormat
from farshore.kernels.host import PlanRoom, Send

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
    last: Plan | None = None,
    send: Send | None = None,
    room: PlanRoom | None = None,
) -> Plan:
    """Splits long segments so that ``threads`` threads have equal work. The bits of a result do not depend on
    which thread computes a split, or when."""
    if layout.format is KVFormat.FLOAT64:
        raise ValueError(f"KV format {layout.format.value}: only the reference kernels attend to it")
    group1 = spec.groups if group1 is None else group1
    if not 0 <= group0 <= group1 <= spec.groups:
        raise ValueError(f"groups {group0}..{group1} of {spec.groups}")
    n_rows, groups = positions.numel(), group1 - group0
    if last is None:
        check_spec(spec)
        check_layout(layout, spec, memory)
        check_work(work, segments, layout, memory.numel(), n_rows=n_rows, group0=group0, group1=group1)
    native_plan = _native.plan(
        shape=_shape(spec),
        layout=_layout(layout, spec),
        window_tokens=spec.window_tokens or 0,
        memory=memory,
        positions=positions.to(torch.int64).contiguous(),
        rows=work,
        segments=segments,
        group0=group0,
        groups=groups,
        threads=threads,
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
    _native.partial_async(plan.native, layer, q, *out)


def wait() -> None:
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
        q=_contiguous_rows(q),
        k=_contiguous_rows(k),
        v=_contiguous_rows(v),
        k_position=k_position,
        q_positions=q_positions.to(torch.int64).contiguous(),
        o=out.o,
        lse=out.lse,
        threads=threads,
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


def _layout(layout: KVLayout, spec: AttentionSpec) -> tuple[int, ...]:
    """The native arguments for a layout. A V that is the beginning of K has K's strides."""
    k = (layout.k_row_bytes, layout.k_run_bytes, layout.k_scales)
    v = k if spec.v_in_k else (layout.v_row_bytes, layout.v_run_bytes, layout.v_scales)
    sizes = (size for pair in zip(k, v, strict=True) for size in pair)
    return (CODES[layout.format], spec.v_in_k, layout.block_tokens, *sizes)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
