"""Prefill, segment by segment (design §5).

A segment's new K and V go to their shards layer by layer; the past of a layer is pulled, never kept. Engine
memory is bounded by one segment's hidden states plus one layer of one span.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.ids import WorkerId
from farshore.kernels.base import State
from farshore.kernels.select import implementation
from farshore.models.llama import Llama
from farshore.workers.sequence import PlacedSpan, Sequence

PULL_TOKENS = 4096
"""Past tokens attended to at a time: bounds the pulled KV and the logits."""

MERGED_AT_ONCE = 16
"""States of one layer held at a time: bounds their memory, however long the past is, and kernels' merges."""


def prefill_segment(
    sequence: Sequence,
    first: int,
    last: int,
    *,
    model: Llama,
    attention: AttentionModel,
    peers: Mapping[WorkerId, Peer],
) -> Tensor:
    """Run prompt positions ``first .. last``; their KV is written, not sealed. Returns logits ``f32[vocab]``
    of the last one.

    Positions at and above ``sequence.committed`` are scratch: when this raises, run it again.
    """
    positions = torch.arange(first, last)
    h = model.embed(torch.tensor(sequence.tokens[first:last]))
    for layer in range(model.config.layers):
        normed = model.attention_input(layer, h)
        q = model.query(layer, normed, positions)
        k, v = (x.transpose(0, 1) for x in model.key_value(layer, normed, positions))
        _write(sequence, layer, first, k, v, peers, attention)
        states: list[State] = []
        for state in _past_states(sequence, layer, q, positions, first, attention, peers):
            states.append(state)
            if len(states) == MERGED_AT_ONCE:
                states = [_merged(states, state.o.dtype)]
        states.append(_own_state(q, k, v, positions, first, attention))
        h = model.finish(layer, h, _merged(states, q.dtype).o)
    return model.logits(h[-1:])[0]


def _write(
    sequence: Sequence,
    layer: int,
    first: int,
    k: Tensor,
    v: Tensor,
    peers: Mapping[WorkerId, Peer],
    attention: AttentionModel,
) -> None:
    layout = attention.layouts[0]
    for span in sequence.spans:
        # A seal whose reply was lost must not make the repeated write fail: skip what is sealed already.
        a, b = max(first, span.sealed), min(first + k.shape[1], span.last)
        if a < b:
            tokens = slice(a - first, b - first)
            k_heads = slice(span.group0 * layout.k_heads_per_group, span.group1 * layout.k_heads_per_group)
            v_heads = slice(span.group0 * layout.v_heads_per_group, span.group1 * layout.v_heads_per_group)
            store = peers[span.worker].store
            store.write(
                span.span, layer, a - span.first, k[k_heads, tokens], v[v_heads, tokens], epoch=sequence.epoch
            )


def _past_states(
    sequence: Sequence,
    layer: int,
    q: Tensor,
    positions: Tensor,
    first: int,
    attention: AttentionModel,
    peers: Mapping[WorkerId, Peer],
) -> Iterator[State]:
    """States over ``[0, first)`` in span order, pulled piece by piece."""
    for span in sorted(sequence.spans, key=lambda s: (s.first, s.group0)):
        store = peers[span.worker].store
        for a in range(span.first, min(span.last, first), PULL_TOKENS):
            b = min(a + PULL_TOKENS, span.last, first)
            k, v = store.read(span.span, layer, a - span.first, b - span.first)
            yield _extend(q, k, v, positions, a, attention, span)


def _merged(states: list[State], dtype: torch.dtype) -> State:
    out = State(torch.empty_like(states[0].o, dtype=dtype), torch.empty_like(states[0].lse))
    implementation(out.o.device, dtype).merge(states, out=out)
    return out


def _own_state(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, first: int, attention: AttentionModel
) -> State:
    dtype = attention.layouts[0].format.dtype
    # The store is the truth: attend to the values as they are stored.
    return _extend(q, k.to(dtype), v.to(dtype), positions, first, attention, None)


def _extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_position: int,
    attention: AttentionModel,
    span: PlacedSpan | None,
) -> State:
    """State of all heads; the identity for heads that ``span`` does not hold."""
    spec = attention.specs[0]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = State.identity(q.shape[0], spec.q_heads, spec.v_dim, dtype=dtype)
    heads = slice(0, spec.q_heads)
    if span is not None:
        heads = slice(span.group0 * spec.q_heads_per_group, span.group1 * spec.q_heads_per_group)
    implementation(q.device, q.dtype).extend(
        q[:, heads],
        k,
        v,
        spec,
        q_positions=positions,
        k_position=k_position,
        out=State(out.o[:, heads], out.lse[:, heads]),
        threads=torch.get_num_threads(),
    )
    return out
