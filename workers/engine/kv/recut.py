"""Takes the ranges that a prompt has not written yet off shards that drain.

Called by ``cache`` between two segments of a prompt's prefill. A span on a draining shard is cut where its
sealed tokens end: these can move (see ``move``), and the rest gets a new span on another shard. Without room
elsewhere the span stays as it is, and is moved when it is written. It must not know how a segment is
computed.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from farshore.attention_offload.plan.placement import Share
from farshore.ids import SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.workers.engine.kv import span_writer
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.sequence import Holder, PlacedSpan, Sequence

_log = logging.getLogger(__name__)


class _Grant(NamedTuple):
    """A new span for the rest of ``span``, on its way."""

    span: PlacedSpan
    share: Share
    granted: Future[SpanId]


class _Recut(NamedTuple):
    """The grants of one placement of a sequence."""

    holder: Holder
    grants: list[_Grant]


class Recuts:
    """The recuts of one engine. Only the engine's thread calls it.

    ``layout`` is the layout of blocks with all head groups. ``target`` chooses a shard for a range, described
    as a span of the given sequence; None if none has room.
    """

    def __init__(
        self,
        pool: ShardPool,
        layout: KVLayout,
        *,
        target: Callable[[PlacedSpan, Sequence], WorkerId | None],
    ) -> None:
        self._pool = pool
        self._layout = layout
        self._target = target
        self._under_way: dict[tuple[SequenceId, int], _Recut] = {}

    def advance(self, sequence: Sequence) -> list[Future[None]]:
        """Starts or ends the recut of a sequence that writes nothing at present. Never blocks.

        Returns futures, which do not fail: the sequence must not write before they are done, and then this is
        called again. Returns [] if it may write now.
        """
        recut = self._under_way.pop(sequence.key, None)
        if recut is not None and recut.holder is sequence.holder:
            for grant in recut.grants:
                self._apply(sequence, grant)
            sequence.spans_changed()
            return []
        if not sequence.workers & self._pool.draining:
            return []
        grants = [
            self._grant(share, span, sequence.placed_holder)
            for span in sequence.spans
            if span.worker in self._pool.draining and span.sealed < span.last
            if (share := self._share(span, sequence)) is not None
        ]
        if grants:
            self._under_way[sequence.key] = _Recut(sequence.placed_holder, grants)
        return [_end_of(grant.granted) for grant in grants]

    def forget(self, sequence: Sequence) -> set[WorkerId]:
        """Gives up the recut of a sequence that is released; returns the workers that may have granted spans
        for it."""
        recut = self._under_way.pop(sequence.key, None)
        return {grant.share.worker for grant in recut.grants} if recut is not None else set()

    def _share(self, span: PlacedSpan, sequence: Sequence) -> Share | None:
        """Returns where the unwritten rest of the span may go; None if no shard has room."""
        rest = PlacedSpan(
            worker=span.worker,
            span=span.span,
            first=span.sealed,
            last=span.last,
            group0=span.group0,
            group1=span.group1,
            sealed=span.sealed,
            origin=span.sealed,
            capacity=span.last,
        )
        worker = self._target(rest, sequence)
        if worker is None:
            return None
        return Share(worker, rest.first, rest.last, rest.group0, rest.group1)

    def _grant(self, share: Share, span: PlacedSpan, holder: Holder) -> _Grant:
        granted = self._pool[share.worker].create(
            holder,
            span_writer.key_of(share, holder),
            capacity_tokens=share.last - share.first,
            layout=self._layout.of_groups(share.group1 - share.group0),
        )
        return _Grant(span, share, granted)

    def _apply(self, sequence: Sequence, grant: _Grant) -> None:
        """Puts a granted span into the sequence's list, after the cut one or instead of an empty one."""
        if (error := grant.granted.exception()) is not None:
            _log.info("%s keeps writing to %s: %s", sequence.key, grant.span.worker, error)
            return
        cut = grant.span
        index = next(index for index, span in enumerate(sequence.spans) if span is cut)
        sequence.spans.insert(index + 1, span_writer.placed(grant.share, grant.granted.result()))
        if cut.sealed > cut.first:
            cut.last = cut.capacity = cut.sealed
            return
        del sequence.spans[index]
        self._pool[cut.worker].release(sequence.placed_holder, [cut.span])


def _end_of(call: Future[SpanId]) -> Future[None]:
    """A future that is done when the call has ended, whatever its result."""
    ended: Future[None] = Future()
    call.add_done_callback(lambda _: ended.set_result(None))
    return ended
