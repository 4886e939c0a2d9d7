"""Writes one span on a shard: its key, its description as placed, KV by layer, and the seal.

Called by ``kv.cache``, ``kv.handoff`` and ``prefill.segment``, which decide what is written and when. It must
not know why a span is written.
"""

from collections.abc import Sequence

from torch import Tensor

from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.plan.placement import Share
from farshore.ids import SpanId
from farshore.kernels.base import BLOCK_TOKENS, KVLayout
from farshore.kvstore.base import SpanKey
from farshore.kvstore.prefix import PrefixBlock
from farshore.workers.engine.sequence import Holder, PlacedSpan

LAYER_CLASS = 0
"""The only layer class: supported models have one kind of attention layer."""


def key_of(share: Share, holder: Holder) -> SpanKey:
    """Returns the key under which a span for ``share`` is granted."""
    return SpanKey(
        sequence=holder.sequence,
        layer_class=LAYER_CLASS,
        first=share.first,
        group0=share.group0,
        group1=share.group1,
    )


def capacity_tokens(share: Share) -> int:
    """Returns the tokens to grant for ``share``: up to the end of its last block, which takes no more memory.
    A hand-off fills the rest of a prompt's last block, so that the block lies in one span and gets a name."""
    return -(-share.last // BLOCK_TOKENS) * BLOCK_TOKENS - share.first


def placed(share: Share, span: SpanId) -> PlacedSpan:
    """Describes a span that was granted for ``share`` and is not written yet."""
    return PlacedSpan(
        worker=share.worker,
        span=span,
        first=share.first,
        last=share.last,
        group0=share.group0,
        group1=share.group1,
        sealed=share.first,
        origin=share.first,
        capacity=share.first + capacity_tokens(share),
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
    """Writes one layer of tokens, from ``position`` on, to the span.

    ``k`` and ``v`` are ``[heads, tokens, dim or bytes]`` of all heads of ``layout``; the heads of the span's
    groups are written. Raises the errors of ``ShardStore.write``.
    """
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
    """Seals the span below position ``last``, whose tokens are all written.

    ``names`` are the hashes of full blocks in the newly sealed range. Raises the errors of
    ``ShardStore.seal``.
    """
    client.store.seal(
        span.span, last - span.origin, sequence=holder.sequence, epoch=holder.epoch, blocks=names
    )
