"""The reference kernels, in PyTorch: every float dtype and KV format, on every device that PyTorch supports.

Tests compare every faster kernel with them (in float64), and :mod:`farshore.kernels.select` falls back to
them. :class:`farshore.kernels.base.Kernels` says what the functions do. Arithmetic is float32, or float64 if
q is float64, in every stored format: quantised KV is dequantised first. Memory is allocated in every call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import dequantise
from farshore.kernels.host import PlanRoom, Send

native = False

QUERY_CHUNK = 512
"""Query rows per pass of :func:`extend`. Limits the logits to ``QUERY_CHUNK * keys * heads``."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One item of the work list whose segment is not empty."""

    rows: slice
    heads: slice
    base: int
    stride: int
    first: int
    count: int
    position: int
    layout: KVLayout
    """The layout of the segment's blocks, which hold some groups only."""
    k_heads: slice
    """The item's K heads among those that the blocks hold."""
    v_heads: slice


@dataclass(frozen=True, slots=True)
class Plan:
    items: tuple[_Item, ...]
    memory: Tensor
    spec: AttentionSpec
    positions: Tensor


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
    """Checks the groups only."""
    group1 = spec.groups if group1 is None else group1
    listed = list(zip(*(field.tolist() for field in segments), strict=True))
    items = []
    per_group = spec.q_heads_per_group
    ks, vs = layout.k_heads_per_group, layout.v_heads_per_group
    for row, n_rows, segment, g0, g1 in zip(*(field.tolist() for field in work), strict=True):
        base, stride, first, count, position, stored0, stored1 = listed[segment]
        if not max(stored0, group0) <= g0 < g1 <= min(stored1, group1):
            raise ValueError(f"groups {g0}..{g1} asked of a segment holding {stored0}..{stored1}")
        if not count:
            continue
        items.append(
            _Item(
                rows=slice(row, row + n_rows),
                heads=slice((g0 - group0) * per_group, (g1 - group0) * per_group),
                base=base,
                stride=stride,
                first=first,
                count=count,
                position=position,
                layout=layout.of_groups(stored1 - stored0),
                k_heads=slice((g0 - stored0) * ks, (g1 - stored0) * ks),
                v_heads=slice((g0 - stored0) * vs, (g1 - stored0) * vs),
            )
        )
    return Plan(tuple(items), memory, spec, positions)


def partial(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    state = State.identity(*q.shape[:2], plan.spec.v_dim, dtype=_compute_dtype(q.dtype), device=q.device)
    for item in plan.items:
        k, v = _gather(plan.memory, item, layer, dtype=state.o.dtype)
        new = _attend(
            q[item.rows, item.heads],
            k,
            v,
            plan.spec,
            q_positions=plan.positions[item.rows],
            k_position=item.position,
        )
        merged = State(state.o[item.rows, item.heads], state.lse[item.rows, item.heads])
        merge([State(merged.o.clone(), merged.lse.clone()), new], out=merged)
    out.o.copy_(state.o)
    out.lse.copy_(state.lse)


def partial_async(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """Computes before it returns."""
    partial(plan, layer, q, out=out)


def wait() -> None:
    """Returns at once, because :func:`partial_async` has computed."""


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
    for start in range(0, q.shape[0], QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        state = _attend(q[rows], k, v, spec, q_positions=q_positions[rows], k_position=k_position)
        out.o[rows] = state.o
        out.lse[rows] = state.lse


def merge(states: Sequence[State], *, sink: Tensor | None = None, out: State) -> None:
    lses = torch.stack([state.lse for state in states])
    row_max = lses.amax(dim=0)
    if sink is not None:
        row_max = torch.maximum(row_max, sink.to(row_max.dtype))
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    # Relative to the maximum, not to the merged lse: float32 rounds an lse around 1e4 so coarsely that the
    # weights would not sum to 1.
    weights = torch.exp(lses - row_max)
    row_sum = weights.sum(dim=0)
    if sink is not None:
        row_sum = row_sum + torch.exp(sink.to(row_max.dtype) - row_max)
    lse = row_max + torch.log(row_sum)
    weights = weights / torch.where(row_sum == 0, 1.0, row_sum)
    o = torch.zeros_like(states[0].o, dtype=lses.dtype)
    for state, weight in zip(states, weights, strict=True):
        # The o of an empty state may be NaN and must not count.
        o += torch.where(weight[..., None] == 0, 0.0, state.o.to(o.dtype) * weight[..., None])
    out.o.copy_(o)
    out.lse.copy_(lse)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather(memory: Tensor, item: _Item, layer: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K ``[k_heads, count, k_dim]`` and V ``[v_heads, count, v_dim]`` of one work item, in ``dtype`` if the
    format is quantised, else as stored."""
    layout, first, last = item.layout, item.first, item.first + item.count
    ks, vs = [], []
    for index in range(first // layout.block_tokens, (last - 1) // layout.block_tokens + 1):
        start = item.base + index * item.stride
        block = memory[start : start + layout.block_bytes]
        slots = slice(
            max(first - index * layout.block_tokens, 0),
            min(last - index * layout.block_tokens, layout.block_tokens),
        )
        in_k, in_v = (item.k_heads, slots), (item.v_heads, slots)
        if layout.format.quantised:
            stored = layout.stored(block, layer)
            k = dequantise(stored.k[in_k], stored.k_scales[in_k], layout.format, layout.k_dim, dtype=dtype)
            v = dequantise(stored.v[in_v], stored.v_scales[in_v], layout.format, layout.v_dim, dtype=dtype)
        else:
            block_k, block_v = layout.views(block, layer)
            k, v = block_k[in_k], block_v[in_v]
        ks.append(k)
        vs.append(v)
    return (
        ks[0] if len(ks) == 1 else torch.cat(ks, dim=1),
        vs[0] if len(vs) == 1 else torch.cat(vs, dim=1),
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, q_positions: Tensor, k_position: int
) -> State:
    """The state of q ``[n, heads, k_dim]`` over k ``[k_heads, m, k_dim]`` and v ``[v_heads, m, v_dim]``."""
    n, heads, _ = q.shape
    tokens = k.shape[1]
    dtype = _compute_dtype(q.dtype)
    if tokens == 0:
        return State.identity(n, heads, spec.v_dim, dtype=dtype, device=q.device)
    k_heads, v_heads = k.shape[0], v.shape[0]
    # The query heads that share a K head make one matrix product: [k_heads, heads per K head * n, tokens].
    queries = q.to(dtype).transpose(0, 1).reshape(k_heads, -1, q.shape[2])
    logits = torch.bmm(queries, k.to(dtype).transpose(1, 2)).view(heads, n, tokens)
    logits *= spec.scale
    if spec.soft_cap is not None:
        logits = torch.tanh(logits / spec.soft_cap) * spec.soft_cap
    first_query, last_query = int(q_positions.min()), int(q_positions.max())
    sees_all = k_position + tokens - 1 <= first_query
    if spec.window_tokens is not None:
        sees_all = sees_all and last_query - k_position < spec.window_tokens
    if not sees_all:
        distance = (
            q_positions[:, None]
            - torch.arange(k_position, k_position + tokens, device=q_positions.device)[None, :]
        )
        hidden = distance < 0
        if spec.window_tokens is not None:
            hidden |= distance >= spec.window_tokens
        logits.masked_fill_(hidden, -torch.inf)
    row_max = logits.amax(dim=-1, keepdim=True)
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
    weights = torch.exp(logits - row_max)
    row_sum = weights.sum(dim=-1, keepdim=True)
    values = torch.bmm(weights.view(v_heads, -1, tokens), v.to(dtype)).view(heads, n, spec.v_dim)
    o = torch.where(row_sum == 0, 0.0, values / row_sum)
    lse = (row_max + torch.log(row_sum)).squeeze(-1)
    return State(o.transpose(0, 1), lse.transpose(0, 1))
