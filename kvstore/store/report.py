"""What a store says about itself: its spans, its memory, and whether its books add up.

For :mod:`farshore.kvstore.store.store` alone, which calls it in its lock. It changes nothing.
"""

from collections.abc import Collection, Mapping

from farshore.ids import SpanId
from farshore.kvstore.base import SpanInfo, Usage
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.holds import Holds
from farshore.kvstore.store.span import Span


def infos(spans: Mapping[SpanId, Span], holds: Holds) -> list[SpanInfo]:
    return [
        SpanInfo(
            span=span,
            key=it.key,
            sealed_tokens=it.sealed_tokens,
            capacity_tokens=it.capacity_tokens,
            bytes=it.bytes,
            epoch=it.epoch,
            holders=holds.holders(span),
            covers=it.covers,
        )
        for span, it in spans.items()
    ]


def usage(spans: Collection[Span], cached: Collection[Span], arena: Arena) -> Usage:
    return Usage(
        budget_bytes=arena.budget_bytes,
        granted_bytes=sum(it.bytes for it in spans),
        sealed_bytes=sum(it.sealed_tokens * it.layout.token_bytes for it in spans),
        free_bytes=arena.free_bytes,
        cached_bytes=sum(it.bytes for it in cached),
        committed_bytes=arena.committed_bytes,
    )


def check_spans(spans: Mapping[SpanId, Span], holds: Holds, cached: Collection[SpanId], arena: Arena) -> None:
    """AssertionError unless every span is held or cache, within its marks, and alone in its blocks."""
    owned: set[int] = set()
    for span, it in spans.items():
        holders = holds.holders(span)
        assert (span in cached) == (not holders), f"{span}: cache, with {holders} holders"
        assert it.pins >= 0, f"{span}: {it.pins} pins"
        assert it.sealed_before <= it.sealed_tokens <= it.capacity_tokens, f"{span}: marks"
        assert len(it.bases) * it.layout.block_tokens >= it.capacity_tokens, f"{span}: too few blocks"
        assert not owned.intersection(it.bases), f"{span} shares blocks with another span"
        owned.update(it.bases)
        for extent in it.extents:
            held = all(arena.holds(base, extent.stride) for base in extent.block_bases)
            assert held, f"{span} has {extent}, which the arena has not granted"
