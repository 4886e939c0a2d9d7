"""Which of an engine's choices hold which spans at one shard.

A shard records holds by sequence. Several choices of a sequence may hold one span; the shard is told to drop
it when the last of them releases it. Called by ``shard_queue`` from its thread. It must not call shards.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from farshore.attention_offload.base import Wanted
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.workers.engine.sequence import Holder


class HeldSpans:
    """The spans that this engine holds at one shard. Not thread-safe."""

    def __init__(self) -> None:
        self._holders: dict[tuple[SequenceId, SpanId], set[Holder]] = defaultdict(set)

    def add(self, holder: Holder, spans: Iterable[SpanId]) -> None:
        """Records that ``holder`` holds ``spans``."""
        for span in spans:
            self._holders[holder.sequence, span].add(holder)

    def remove(self, holder: Holder, spans: Sequence[SpanId] | None) -> list[SpanId]:
        """Removes ``holder`` from ``spans``, or from all if None. Returns those without a holder now."""
        if spans is None:
            spans = [span for (_, span), holders in self._holders.items() if holder in holders]
        unheld = []
        for span in spans:
            key = holder.sequence, span
            holders = self._holders.get(key, set())
            holders.discard(holder)
            if not holders and self._holders.pop(key, None) is not None:
                unheld.append(span)
        return unheld

    def wanted(self) -> Wanted:
        """All spans that are held, by sequence and epoch, as a beat lists them."""
        wanted: dict[tuple[SequenceId, Epoch], list[SpanId]] = {}
        for (sequence, span), holders in self._holders.items():
            epoch = max(holder.epoch for holder in holders)
            wanted.setdefault((sequence, epoch), []).append(span)
        return wanted
