"""The reports of a store: its spans, its memory, and the consistency of its records.

Called by ``store`` alone, which holds its lock meanwhile. It changes nothing.
"""

from collections.abc import Collection, Mapping

from farshore.ids import SpanId
from farshore.kvstore.base import SpanInfo, Usage
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.cached import CachedSpans
from farshore.kvstore.store.holds import HoldTable
from farshore.kvstore.store.span import SpanRecord


def infos(spans: Mapping[SpanId, SpanRecord], holds: HoldTable) -> list[SpanInfo]:
    """One :class:`SpanInfo` per span, in the order of the mapping."""
    return [
        SpanInfo(
            span=span,
            key=record.key,
            sealed_tokens=record.sealed_tokens,
            capacity_tokens=record.capacity_tokens,
            bytes=record.bytes,
            epoch=record.epoch,
            holders=holds.holders(span),
            covers=record.covers,
        )
        for span, record in spans.items()
    ]


def usage(spans: Collection[SpanRecord], cached: CachedSpans, arena: Arena) -> Usage:
    """Memory of all ``spans``, of which those in ``cached`` have no holds."""
    return Usage(
        budget_bytes=arena.budget_bytes,
        granted_bytes=sum(record.bytes for record in spans),
        sealed_bytes=sum(record.sealed_tokens * record.layout.token_bytes for record in spans),
        free_bytes=arena.free_bytes,
        cached_bytes=cached.bytes,
        committed_bytes=arena.committed_bytes,
    )


def check_spans(
    spans: Mapping[SpanId, SpanRecord], holds: HoldTable, cached: CachedSpans, arena: Arena
) -> None:
    """AssertionError unless every span is either held or cache, has its marks in order, and shares none of
    its blocks with another span."""
    owned: set[int] = set()
    assert cached.bytes == sum(spans[span].bytes for span in cached), "the count of cached bytes is wrong"
    for span, record in spans.items():
        holders = holds.holders(span)
        assert (span in cached) == (not holders), f"{span}: cache, with {holders} holders"
        assert record.pins >= 0, f"{span}: {record.pins} pins"
        assert record.sealed_before <= record.sealed_tokens <= record.capacity_tokens, f"{span}: marks"
        assert len(record.bases) * record.layout.block_tokens >= record.capacity_tokens, (
            f"{span}: too few blocks"
        )
        assert not owned.intersection(record.bases), f"{span} shares blocks with another span"
        owned.update(record.bases)
        size = record.layout.block_bytes
        cold = [
            base for base in record.bases[: record.committed_blocks] if not arena.is_committed(base, size)
        ]
        assert not cold, f"{span}: written blocks that are not committed: {cold}"
        for extent in record.extents:
            granted = all(arena.holds(base, extent.stride) for base in extent.block_bases)
            assert granted, f"{span} has {extent}, which the arena has not granted"
