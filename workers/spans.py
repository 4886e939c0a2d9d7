"""One span from its owner's side: granted by a shard, written head by head, given back.

Called by ``cache``, ``handoff`` and ``prefill``, which say where and when.
"""

from torch import Tensor

from farshore.attention_offload.base import Peer
from farshore.attention_offload.placement import Share
from farshore.errors import FarshoreError
from farshore.ids import Epoch, SequenceId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import ShardStore, SpanKey
from farshore.workers.sequence import PlacedSpan

LAYER_CLASS = 0
"""Models served so far have one kind of attention layer."""


def create(peer: Peer, share: Share, layout: KVLayout, sequence: SequenceId, epoch: Epoch) -> PlacedSpan:
    """``layout``: of all head groups. Raises Full."""
    span = peer.store.create(
        SpanKey(
            sequence=sequence,
            layer_class=LAYER_CLASS,
            first=share.first,
            group0=share.group0,
            group1=share.group1,
        ),
        capacity_tokens=share.last - share.first,
        layout=layout.of_groups(share.group1 - share.group0),
        epoch=epoch,
    )
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
    store: ShardStore,
    span: PlacedSpan,
    layer: int,
    position: int,
    k: Tensor,
    v: Tensor,
    layout: KVLayout,
    sequence: SequenceId,
    epoch: Epoch,
) -> None:
    """k, v of all heads from ``position`` on: the span takes those of its groups."""
    k_heads = slice(span.group0 * layout.k_heads_per_group, span.group1 * layout.k_heads_per_group)
    v_heads = slice(span.group0 * layout.v_heads_per_group, span.group1 * layout.v_heads_per_group)
    at = position - span.origin
    store.write(span.span, layer, at, k[k_heads], v[v_heads], sequence=sequence, epoch=epoch)


def drop(peer: Peer, span: PlacedSpan, sequence: SequenceId, epoch: Epoch) -> None:
    try:
        peer.store.drop([span.span], sequence=sequence, epoch=epoch)
    except FarshoreError:
        # Unreachable: the shard frees it with the sequence, or with itself.
        return
