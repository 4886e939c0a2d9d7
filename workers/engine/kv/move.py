"""Moves sealed spans off shards that drain, while the sequences that read them run or are prefilled.

Called by ``cache`` from the engine's thread, between two steps. A span is moved in three stages, and no stage
waits on the engine's thread::

    copy     the target imports the span from its shard; a thread of this module waits for the call
    adopt    the sequences' holders hold the copy; runs in the target's queue
    switch   the sequences read the copy from now on, and give their holds on the span back

Until the switch the sequences read the span where it is, so a move that fails changes nothing and is tried
again, elsewhere or later. A span that is still written is not moved: see ``recut`` for prompts; a hand-off
ends, and the next one goes to another shard. It must not know why a shard drains.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from farshore.attention_offload.base import Imported
from farshore.errors import Corrupt, FarshoreError
from farshore.ids import SpanId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.sequence import Holder, PlacedSpan, Sequence

MOST_MOVES = 2
"""Spans that an engine moves at a time."""
IMPORT_DEADLINE_S = 15.0
"""Deadline of an import of few bytes; it may wait for those of other engines."""
SLOWEST_BYTES_PER_S = 16 << 20
"""The slowest accepted rate of an import; it extends the deadline."""
RETRY_S = 1.0
"""Time until a span that no shard took is tried again. It doubles with each further time ..."""
MOST_RETRY_S = 16.0
"""... up to this."""

_log = logging.getLogger(__name__)


class _Sharer(NamedTuple):
    """A sequence that reads the span, and the call by which its holder holds the copy."""

    sequence: Sequence
    holder: Holder
    held: Future[None]


@dataclass(slots=True, eq=False)
class _Move:
    """A move under way."""

    source: WorkerId
    span: SpanId
    target: WorkerId
    size_bytes: int
    copied: Future[Imported]
    sharers: list[_Sharer] | None = None
    """None until the span is copied."""


@dataclass(slots=True)
class _Trouble:
    """Why a span has not moved yet."""

    reason: str = ""
    refused_by: set[WorkerId] = field(default_factory=set)
    """Targets that failed since the last wait."""
    retry_at_s: float = 0.0
    wait_s: float = RETRY_S


class SpanMoves:
    """The moves of one engine. Only the engine's thread calls it, except for :meth:`reasons`.

    ``layout`` is the layout of blocks with all head groups. ``is_written`` returns whether a hand-off writes
    to a span of a sequence.
    """

    def __init__(
        self,
        pool: ShardPool,
        layout: KVLayout,
        *,
        is_written: Callable[[Sequence, SpanId], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._layout = layout
        self._is_written = is_written
        self._clock = clock
        self._under_way: dict[SpanId, _Move] = {}
        self._troubles: dict[SpanId, _Trouble] = {}
        self._reasons: dict[WorkerId, str] = {}
        self._importers = ThreadPoolExecutor(MOST_MOVES, thread_name_prefix="move")

    @property
    def is_under_way(self) -> bool:
        return bool(self._under_way)

    def uses(self, worker: WorkerId) -> bool:
        """Returns whether a span is on its way from or to the worker."""
        return any(worker in (move.source, move.target) for move in self._under_way.values())

    def reasons(self) -> dict[WorkerId, str]:
        """Returns the draining shards, each with the reason why a span stays there; "" if none is known. Any
        thread may call it."""
        return {worker: self._reasons.get(worker, "") for worker in self._pool.draining}

    def advance(self, live: Iterable[Sequence]) -> None:
        """Starts moves, and continues those under way. ``live`` are the sequences that have memory. Never
        blocks."""
        if not self._under_way and not self._pool.draining:
            self._troubles, self._reasons = {}, {}
            return
        readers: dict[tuple[WorkerId, SpanId], list[Sequence]] = defaultdict(list)
        for sequence in live:
            for worker, span in {(span.worker, span.span) for span in sequence.spans}:
                if worker in self._pool.draining or span in self._under_way:
                    readers[worker, span].append(sequence)
        workers = {span: worker for worker, span in readers}
        for move in list(self._under_way.values()):
            if move.copied.done():
                self._continue(move, readers.pop((move.source, move.span), []))
        for (worker, span), sequences in readers.items():
            if len(self._under_way) == MOST_MOVES:
                break
            if worker in self._pool.draining and span not in self._under_way:
                self._start(worker, span, sequences)
        self._report(workers)

    def target(
        self, share: PlacedSpan, readers: Collection[Sequence], *, avoid: Collection[WorkerId] = ()
    ) -> WorkerId | None:
        """Chooses a shard for the tokens of ``share``, which ``readers`` read; None if none has room.

        It is one of the emptiest, and preferably one that stores no other head groups of the readers: these
        would cost it frames over all groups. Engines choose alike, so that they share the copy of a span.
        """
        size_bytes = self._size_bytes(share)
        on_the_way = Counter[WorkerId]()
        for move in self._under_way.values():
            on_the_way[move.target] += move.size_bytes
        free = {
            worker: beat.free_bytes - on_the_way[worker]
            for worker in self._pool.placeable()
            if worker not in avoid and self._pool[worker].client.address
            if (beat := self._pool[worker].beat) is not None
        }
        fits = [worker for worker, free_bytes in free.items() if free_bytes >= size_bytes]
        mixed = {
            span.worker
            for reader in readers
            for span in reader.spans
            if (span.group0, span.group1) != (share.group0, share.group1)
        }
        most = max((free[worker] for worker in fits), default=0)
        return max(
            fits,
            key=lambda worker: (
                worker not in mixed,
                2 * free[worker] >= most,
                crc32(f"{share.span} {worker}".encode()),
            ),
            default=None,
        )

    def close(self) -> None:
        """Makes no further import. One under way ends when its client is closed."""
        self._importers.shutdown(wait=False, cancel_futures=True)

    def _size_bytes(self, share: PlacedSpan) -> int:
        layout = self._layout.of_groups(share.group1 - share.group0)
        return -(-(share.last - share.origin) // layout.block_tokens) * layout.block_bytes

    def _start(self, source: WorkerId, span: SpanId, readers: list[Sequence]) -> None:
        """Starts the move of a span, unless it is still written or has to wait."""
        placed = [placed for reader in readers for placed in _placed(reader, source, span)]
        if (
            not placed
            or any(placed.sealed < placed.last for placed in placed)
            or any(self._is_written(reader, span) for reader in readers)
        ):
            return
        trouble = self._troubles.setdefault(span, _Trouble())
        if trouble.retry_at_s > self._clock():
            return
        largest = max(placed, key=lambda placed: placed.last)
        client = self._pool[source].client
        target = None
        if not client.address:
            trouble.reason = "its spans are in the engine's own memory"
        elif not self._pool[source].is_placeable:
            trouble.reason = "it does not answer"
        else:
            target = self.target(largest, readers, avoid=trouble.refused_by)
            if target is None and not trouble.refused_by:
                size = self._size_bytes(largest)
                trouble.reason = f"no other attention worker has {size / 2**20:.1f} MiB free"
        if target is None:
            trouble.refused_by.clear()
            trouble.retry_at_s = self._clock() + min(trouble.wait_s, MOST_RETRY_S)
            trouble.wait_s = min(2 * trouble.wait_s, MOST_RETRY_S)
            return
        size_bytes = self._size_bytes(largest)
        copied = self._importers.submit(
            self._pool[target].client.import_span,
            client.address,
            span,
            tokens=largest.last - largest.origin,
            holder=readers[0].id,
            deadline_s=IMPORT_DEADLINE_S + size_bytes / SLOWEST_BYTES_PER_S,
        )
        self._under_way[span] = _Move(source, span, target, size_bytes, copied)

    def _continue(self, move: _Move, readers: list[Sequence]) -> None:
        """Goes on with a move whose copy was made, or has failed."""
        if move.sharers is None:
            error = move.copied.exception()
            if error is not None or move.target not in self._pool:
                del self._under_way[move.span]
                self._fail(move, error)
                return
            copy = move.copied.result().span
            queue = self._pool[move.target]
            holders = [(reader, reader.placed_holder) for reader in readers]
            move.sharers = [_Sharer(*reader, queue.adopt(reader[1], copy)) for reader in holders]
        if all(sharer.held.done() for sharer in move.sharers):
            del self._under_way[move.span]
            self._switch(move, move.sharers)

    def _switch(self, move: _Move, sharers: list[_Sharer]) -> None:
        """Lets the sequences whose holders hold the copy read it. The others are moved again."""
        copy = move.copied.result()
        for sequence, holder, held in sharers:
            if (error := held.exception()) is not None:
                self._fail(move, error)
                continue
            spans = _placed(sequence, move.source, move.span) if sequence.holder is holder else []
            wrong = next((reason for span in spans if (reason := self._differs(span, copy))), "")
            if not spans or wrong:
                self._pool[move.target].release(holder, [copy.span])
                if wrong:
                    self._fail(move, Corrupt(f"{copy.span} is no copy of {move.span}: {wrong}"))
                continue
            for span in spans:
                span.worker, span.span = move.target, copy.span
                span.sealed = span.capacity = span.last  # Nothing can be written to a copy.
            sequence.spans_changed()
            self._pool[move.source].release(holder, [move.span])

    def _differs(self, span: PlacedSpan, copy: Imported) -> str:
        """Returns why the copy cannot be read instead of the span; "" if it can."""
        key, layout = copy.key, self._layout.of_groups(span.group1 - span.group0)
        if (key.first, key.group0, key.group1) != (span.origin, span.group0, span.group1):
            return f"it begins at {key.first}, with groups {key.group0} to {key.group1}"
        if copy.layout != layout:
            return f"it is stored as {copy.layout}, not as {layout}"
        return f"it has {copy.tokens} tokens" if copy.tokens < span.last - span.origin else ""

    def _fail(self, move: _Move, error: BaseException | None) -> None:
        trouble = self._troubles.setdefault(move.span, _Trouble())
        trouble.refused_by.add(move.target)
        trouble.reason = str(error or f"attention worker {move.target} has left")
        if error is not None and not isinstance(error, FarshoreError):
            _log.error("%s could not be moved to %s", move.span, move.target, exc_info=error)

    def _report(self, workers: dict[SpanId, WorkerId]) -> None:
        """Publishes, and logs when it changes, why spans stay on draining shards."""
        self._troubles = {span: trouble for span, trouble in self._troubles.items() if span in workers}
        reasons = {
            workers[span]: trouble.reason for span, trouble in self._troubles.items() if trouble.reason
        }
        for worker, reason in reasons.items():
            if self._reasons.get(worker) != reason:
                _log.warning("attention worker %s drains, but spans stay there: %s", worker, reason)
        self._reasons = reasons


def _placed(sequence: Sequence, worker: WorkerId, span: SpanId) -> list[PlacedSpan]:
    """Returns the sequence's entries for a span."""
    return [placed for placed in sequence.spans if (placed.worker, placed.span) == (worker, span)]
