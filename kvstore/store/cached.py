"""Spans without holds: named KV that stays until its memory is needed.

Called by ``store`` alone, which holds its lock meanwhile. It must not know names or holds.
"""

from collections import OrderedDict
from collections.abc import Iterator

from farshore.ids import SpanId
from farshore.kvstore.store.span import SpanRecord


class CachedSpans:
    """Spans in the order in which they lost their last hold. Not thread-safe."""

    def __init__(self) -> None:
        self._spans: OrderedDict[SpanId, SpanRecord] = OrderedDict()
        self.bytes = 0
        """Memory of all spans, counted here so that no call needs to look at each span."""

    def __contains__(self, span: object) -> bool:
        return span in self._spans

    def __iter__(self) -> Iterator[SpanId]:
        return iter(self._spans)

    def add(self, span: SpanId, record: SpanRecord) -> None:
        """Adds a span that is not cached."""
        self._spans[span] = record
        self.bytes += record.bytes

    def discard(self, span: SpanId) -> None:
        """Removes a span. Does nothing if it is not cached."""
        if (record := self._spans.pop(span, None)) is not None:
            self.bytes -= record.bytes

    def evictable(self, missing_bytes: int) -> tuple[list[SpanId], int]:
        """Chooses the spans to evict for ``missing_bytes``, the least recently held first; none if all
        together are too small. Returns them, and the bytes of all that could be evicted.

        Pinned spans are left out: evicting them would not free their memory yet.
        """
        idle = [(span, record.bytes) for span, record in self._spans.items() if not record.pins]
        total = sum(size for _, size in idle)
        chosen = []
        if total >= missing_bytes:
            for span, size in idle:
                if missing_bytes <= 0:
                    break
                chosen.append(span)
                missing_bytes -= size
        return chosen, total
