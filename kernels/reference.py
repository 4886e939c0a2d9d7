"""The reference kernels: plain PyTorch, any float dtype, on any device PyTorch runs on.

They are the oracle of every faster kernel (in float64) and the implementation of last resort. Arithmetic is
done in float32, or in float64 for float64 input, whatever the stored format: quantised KV is dequantised.

Called by shards and the engine. Allocates freely; faster implementations keep the signatures and do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, KVLayout, Rows, Segments, State
from farshore.kernels.formats import dequantise

QUERY_CHUNK = 512
"""Query rows per pass of :func:`extend`: bounds the logits to ``QUERY_CHUNK * keys * heads``."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One item of the work list, as plain integers."""

    rows: slice
    heads: slice
    run: tuple[int, int, int, int]  # base, stride, first, count (1 or more) of the segment
    position: int
    stored: KVLayout  # of the segment's blocks
    k_heads: slice  # of the stored ones
    v_heads: slice


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's work, prepared once and run for every layer of one layer class."""

    work: tuple[_Work, ...]
    memory: Tensor
    spec: AttentionSpec
    positions: Tensor


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
    """Prepare one step's partial attention over stored KV.

    ``memory`` is ``u8[bytes]``, what the segments' bases refer to; ``layout`` describes blocks holding every
    group (a segment's own group range narrows it); ``positions`` is ``i64[R]``. q and the output hold the
    heads of groups ``group0`` up to ``group1`` (all by default): a shard may see only some.
    ``threads``: of native kernels; PyTorch has its own. ``checked``: the same rows and segments have been
    planned before, and only positions and counts moved, inside of the same blocks: not looked at again
    where looking takes long.
    Raises ValueError for work outside of these groups, or outside a segment's.
    """
    group1 = spec.groups if group1 is None else group1
    runs = list(zip(*(field.tolist() for field in segments), strict=True))
    work = []
    per_group = spec.q_heads_per_group
    for row, n_rows, segment, g0, g1 in zip(*(field.tolist() for field in rows), strict=True):
        base, stride, first, count, position, stored0, stored1 = runs[segment]
        if not max(stored0, group0) <= g0 < g1 <= min(stored1, group1):
            raise ValueError(f"groups {g0}..{g1} asked of a segment holding {stored0}..{stored1}")
        if not count:
            continue
        ks, vs = layout.k_heads_per_group, layout.v_heads_per_group
        work.append(
            _Work(
                rows=slice(row, row + n_rows),
                heads=slice((g0 - group0) * per_group, (g1 - group0) * per_group),
                run=(base, stride, first, count),
                position=position,
                stored=layout.of_groups(stored1 - stored0),
                k_heads=slice((g0 - stored0) * ks, (g1 - stored0) * ks),
                v_heads=slice((g0 - stored0) * vs, (g1 - stored0) * vs),
            )
        )
    return Plan(tuple(work), memory, spec, positions)


def partial(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """Attention state of each row over the tokens its work list names, written to ``out``.

    q ``[R, heads, k_dim]``; out.o ``[R, heads, v_dim]`` any float dtype, out.lse ``[R, heads]``. A row never
    sees a key above its own position, nor one outside the window. Rows without work get the identity.
    """
    total = State.identity(*q.shape[:2], plan.spec.v_dim, dtype=_compute_dtype(q.dtype))
    for item in plan.work:
        k, v = _gather(plan.memory, item, layer, dtype=total.o.dtype)
        state = _attend(
            q[item.rows, item.heads],
            k,
            v,
            plan.spec,
            q_positions=plan.positions[item.rows],
            k_position=item.position,
        )
        here = State(total.o[item.rows, item.heads], total.lse[item.rows, item.heads])
        merge([State(here.o.clone(), here.lse.clone()), state], out=here)
    out.o.copy_(total.o)
    out.lse.copy_(total.lse)


def offer(plan: Plan, layer: int, q: Tensor, *, out: State) -> None:
    """As :func:`partial`, but it may be done only when :func:`complete` returns, which the same thread calls:
    what is given must stay as it is until then, and ``out`` holds nothing. One at a time."""
    partial(plan, layer, q, out=out)


def complete() -> None:
    """What was offered is done."""


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
    """Attention of a chunk of new tokens on a contiguous stretch of keys: itself, or its past (prefill).

    q ``[n, q_heads, k_dim]``, k ``[k_heads, m, k_dim]``, v ``[v_heads, m, v_dim]`` head-major; q_positions
    ``i64[n]``; k_position: position of the first key. Causal by position. Writes o ``[n, q_heads, v_dim]``
    and lse ``[n, q_heads]``. ``threads``: of native kernels; PyTorch has its own.
    """
    for start in range(0, q.shape[0], QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        state = _attend(q[rows], k, v, spec, q_positions=q_positions[rows], k_position=k_position)
        out.o[rows] = state.o
        out.lse[rows] = state.lse


def merge(states: Sequence[State], *, sink: Tensor | None = None, out: State) -> None:
    """Merge states of disjoint token sets, in the order given; any number of them, 1 or more.

    lse = ln sum exp(lse_i), o = sum o_i exp(lse_i - lse), with weight 0 where lse_i is -inf, so that merging
    empty states gives the empty state. ``sink``: learned logit per head ``[heads]``, which joins the
    denominator once, here. ``out`` gets the cast to its own dtype; it may alias none of the states.
    """
    lses = torch.stack([s.lse for s in states])
    peak = lses.amax(dim=0)
    if sink is not None:
        peak = torch.maximum(peak, sink.to(peak.dtype))
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    # Not relative to the total: around 1e4 float32 rounds that so far off that the weights' sum is not 1.
    weights = torch.exp(lses - peak)
    mass = weights.sum(dim=0)
    if sink is not None:
        mass = mass + torch.exp(sink.to(peak.dtype) - peak)
    total = peak + torch.log(mass)
    weights = weights / torch.where(mass == 0, 1.0, mass)
    o = torch.zeros_like(states[0].o, dtype=lses.dtype)
    for state, weight in zip(states, weights, strict=True):
        # An empty state's o carries no information, so not even a NaN in it may count.
        o += torch.where(weight[..., None] == 0, 0.0, state.o.to(o.dtype) * weight[..., None])
    out.o.copy_(o)
    out.lse.copy_(total)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather(memory: Tensor, item: _Work, layer: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K ``[k_heads, count, k_dim]`` and V of one work item, as stored or, if quantised, in ``dtype``."""
    layout = item.stored
    base, stride, first, count = item.run
    ks, vs = [], []
    for index in range(first // layout.block_tokens, (first + count - 1) // layout.block_tokens + 1):
        start = base + index * stride
        block = memory[start : start + layout.block_bytes]
        t0 = max(first - index * layout.block_tokens, 0)
        t1 = min(first + count - index * layout.block_tokens, layout.block_tokens)
        in_k, in_v = (item.k_heads, slice(t0, t1)), (item.v_heads, slice(t0, t1))
        if layout.format.quantised:
            q = layout.stored(block, layer)
            k = dequantise(q.k[in_k], q.k_scales[in_k], layout.format, layout.k_dim, dtype=dtype)
            v = dequantise(q.v[in_v], q.v_scales[in_v], layout.format, layout.v_dim, dtype=dtype)
        else:
            whole_k, whole_v = layout.views(block, layer)
            k, v = whole_k[in_k], whole_v[in_v]
        ks.append(k)
        vs.append(v)
    return (
        ks[0] if len(ks) == 1 else torch.cat(ks, dim=1),
        vs[0] if len(vs) == 1 else torch.cat(vs, dim=1),
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, q_positions: Tensor, k_position: int
) -> State:
    """q ``[n, heads, k_dim]`` on k ``[k_heads, m, k_dim]``, v ``[v_heads, m, v_dim]``."""
    n, heads, _ = q.shape
    tokens = k.shape[1]
    dtype = _compute_dtype(q.dtype)
    if tokens == 0:
        return State.identity(n, heads, spec.v_dim, dtype=dtype)
    k_heads, v_heads = k.shape[0], v.shape[0]
    # Query heads that share a K head form one matrix product: [k_heads, group * n, tokens].
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
        distance = q_positions[:, None] - torch.arange(k_position, k_position + tokens)[None, :]
        hidden = distance < 0
        if spec.window_tokens is not None:
            hidden |= distance >= spec.window_tokens
        logits.masked_fill_(hidden, -torch.inf)
    peak = logits.amax(dim=-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(logits - peak)
    mass = weights.sum(dim=-1, keepdim=True)
    values = torch.bmm(weights.view(v_heads, -1, tokens), v.to(dtype)).view(heads, n, spec.v_dim)
    o = torch.where(mass == 0, 0.0, values / mass)
    lse = (peak + torch.log(mass)).squeeze(-1)
    return State(o.transpose(0, 1), lse.transpose(0, 1))
