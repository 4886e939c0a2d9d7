"""One span from its owner's side: granted by a shard, written head by head, sealed.

Called by ``cache``, ``handoff`` and ``prefill``, which say where and when.
"""

from collections.abc import Sequence

from torch import Tensor

from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.plan.placement import Share
from farshore.ids import SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import SpanKey
from farshore.kvstore.prefix import PrefixBlock
from farshore.workers.engine.sequence import Holder, PlacedSpan

LAYER_CLASS = 0
"""Models served so far have one kind of attention layer."""


def key_of(share: Share, holder: Holder) -> SpanKey:
    return SpanKey(
        sequence=holder.sequence,
        layer_class=LAYER_CLASS,
        first=share.first,
        group0=share.group0,
        group1=share.group1,
    )


def placed(share: Share, span: SpanId) -> PlacedSpan:
    """A span that was granted for ``share``; nothing of it is written yet."""
    return PlacedSpan(
        worker=share.worker,
        span=span,
        first=share.first,
        last=share.last,
        group0=share.group0,
        group1=share.group1,
        sealed=share.first,
        origin=share.first,
        capacity=share.last,
    )


def write(
    client: ShardClient,
    *,
    span: PlacedSpan,
    layer: int,
    position: int,
    k: Tensor,
    v: Tensor,
    layout: KVLayout,
    holder: Holder,
) -> None:
    """k, v of all heads from ``position`` on: the span takes those of its groups. ``layout``: of all head
    groups."""
    k_heads = slice(span.group0 * layout.k_heads_per_group, span.group1 * layout.k_heads_per_group)
    v_heads = slice(span.group0 * layout.v_heads_per_group, span.group1 * layout.v_heads_per_group)
    client.store.write(
        span.span,
        layer,
        position - span.origin,
        k[k_heads],
        v[v_heads],
        sequence=holder.sequence,
        epoch=holder.epoch,
    )


def seal(
    client: ShardClient, *, span: PlacedSpan, last: int, names: Sequence[PrefixBlock], holder: Holder
) -> None:
    """Everything of the span below position ``last`` is written."""
    client.store.seal(
        span.span, last - span.origin, sequence=holder.sequence, epoch=holder.epoch, blocks=names
    )
