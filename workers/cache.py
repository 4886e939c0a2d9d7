"""Where a sequence's KV goes: finds what is stored already, grants the rest, forks, gives everything back.

The engine's side of the shard stores. It decides nothing global: which shards may be used, and how sequences
are cut, it is told.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.placement import HeadClass, Room, ShardBy, Share, head_classes, spread
from farshore.errors import FarshoreError, Full, TransportError
from farshore.ids import SpanId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.arena import Arena
from farshore.kvstore.base import SpanSlice
from farshore.kvstore.tail import Tail
from farshore.workers import spans
from farshore.workers.handoff import HandOffs
from farshore.workers.pool import Pool
from farshore.workers.prefix import assemble
from farshore.workers.sequence import PlacedSpan, Sequence


class SequenceCache:
    """KV of all sequences of one engine.

    Called by the engine's thread. ``arena`` is the engine's own memory, for tails; ``targets`` are the
    workers that spans go to.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        peers: Mapping[WorkerId, Peer],
        targets: list[WorkerId],
        model: AttentionModel,
        shard_by: ShardBy,
    ) -> None:
        self._arena = arena
        self._peers = peers
        self._targets = targets
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="pool")
        self._pool = Pool(peers, targets, helper=self._helper)
        self._layout = model.layouts[spans.LAYER_CLASS]
        self._shard_by: ShardBy = shard_by
        self._hand_offs = HandOffs(peers, self._layout)

    def fits_ever(self, tokens: int) -> None:
        """Raises Full where a sequence of ``tokens`` would not fit even into the empty pool. Of a pool whose
        size is not known, since a shard has never answered, nothing is said."""
        budgets = self._pool.budgets()
        if budgets is not None:
            self._spread(tokens, budgets)

    def place(self, sequence: Sequence, *, promised_tokens: int) -> None:
        """Find the prompt's longest stored prefix, and commit it; grant spans for the rest; open the tail. By
        the shards that answer: one that turns silent meanwhile is left out, and placing begins anew.

        Raises Full, with nothing kept, where the rest of the prompt and what it may generate don't fit next
        to ``promised_tokens`` that running sequences may still need; TransportError where no shard answers.
        """
        for left in reversed(range(len(self._targets))):
            try:
                return self._place(sequence, promised_tokens)
            except FarshoreError as error:
                self.release(sequence)
                # Whoever broke off is silent from now on.
                if not left or not isinstance(error, TransportError):
                    raise

    def _place(self, sequence: Sequence, promised_tokens: int) -> None:
        sequence.spans = self._find_prefix(sequence)
        hit = max((span.last for span in sequence.spans), default=0)
        free = self._pool.free()
        if not free:
            raise TransportError(f"no attention worker answers: {', '.join(self._targets)}")
        if gone := {span.worker for span in sequence.spans} - free.keys():
            raise TransportError(f"attention workers do not answer any more: {', '.join(sorted(gone))}")
        promised_bytes = promised_tokens * self._layout.token_bytes // len(free)
        free = {worker: size - promised_bytes for worker, size in free.items()}
        self._spread(sequence.most_tokens - hit, free)
        sequence.classes, shares = self._spread(sequence.prompt_tokens - hit, free)
        for share in shares:
            share = share._replace(first=share.first + hit, last=share.last + hit)
            with self._pool.watching(share.worker):
                peer = self._peers[share.worker]
                sequence.spans.append(spans.create(peer, share, self._layout, sequence.id, sequence.epoch))
        sequence.tail = Tail(arena=self._arena, layout=self._layout, start=sequence.prompt_tokens)
        sequence.committed = hit

    def seal(self, sequence: Sequence, until: int) -> None:
        """Seal every span of the prompt up to position ``until``, name its blocks, and so commit it.
        Idempotent."""
        for span in sequence.spans:
            last = min(until, span.last)
            if last > span.sealed:
                names = [block for block in sequence.blocks if span.sealed < block.last <= last]
                store = self._peers[span.worker].store
                store.seal(
                    span.span,
                    last - span.origin,
                    sequence=sequence.id,
                    epoch=sequence.epoch,
                    blocks=names,
                )
                span.sealed = last
        sequence.committed = until

    def fork(self, sequence: Sequence, child: Sequence) -> None:
        """``child`` holds the sequence's spans too, and a copy of its tail. Raises with nothing kept."""
        by_worker: dict[WorkerId, list[SpanId]] = {}
        for span in sequence.spans:
            by_worker.setdefault(span.worker, []).append(span.span)
        child.spans = [replace(span) for span in sequence.spans]
        child.classes = sequence.classes
        try:
            for worker, held in by_worker.items():
                self._peers[worker].store.hold(held, sequence=child.id, epoch=child.epoch)
            child.tail = sequence.placed_tail.fork()
        except FarshoreError:
            self.release(child)
            raise
        child.committed = sequence.committed

    def hand_off(self, sequence: Sequence) -> None:
        """Start, or finish, moving the tail's full blocks to shards. Never waits."""
        self._hand_offs.advance(sequence)

    def settle_all(self) -> None:
        """Wait for the hand-offs under way (they have deadlines). For shutting down, and tests."""
        self._hand_offs.settle_all()

    def release(self, sequence: Sequence) -> None:
        """Give back everything the sequence has, wherever it is. A shard that cannot be reached keeps its
        spans until it hears of a newer epoch, or ends."""
        self._hand_offs.forget(sequence.id)
        for worker in {span.worker for span in sequence.spans} | self._pool.answering().keys():
            try:
                self._peers[worker].store.drop_sequence(sequence.id, epoch=sequence.epoch)
            except FarshoreError:
                continue
        sequence.spans = []
        if sequence.tail is not None:
            sequence.tail.free()
            sequence.tail = None

    def close(self) -> None:
        self._hand_offs.close()
        self._helper.shutdown(wait=True)

    def _find_prefix(self, sequence: Sequence) -> list[PlacedSpan]:
        """Held spans of the prompt's longest stored prefix, never all of it: logits are wanted of its end."""
        blocks = [block for block in sequence.blocks if block.last < sequence.prompt_tokens]
        found: dict[WorkerId, list[SpanSlice]] = {}
        for worker, peer in self._pool.answering().items() if blocks else ():
            with suppress(TransportError), self._pool.watching(worker):  # lost: less of a hit
                found[worker] = peer.store.find_prefix(
                    blocks, layer_class=spans.LAYER_CLASS, sequence=sequence.id, epoch=sequence.epoch
                )
        placed = assemble(found, groups=self._layout.groups)
        used = {span.span for span in placed}
        for worker, slices in found.items():
            if unused := [it.span for it in slices if it.span not in used]:
                with self._pool.watching(worker):
                    self._peers[worker].store.drop(unused, sequence=sequence.id, epoch=sequence.epoch)
        return placed

    def _spread(self, tokens: int, bytes_of: Mapping[WorkerId, int]) -> tuple[list[HeadClass], list[Share]]:
        layout = self._layout
        # A share ends in a partly filled block, and so does the growth behind it: plan for both.
        rooms = [
            Room(worker, max(0, size // layout.block_bytes - 1) * BLOCK_TOKENS)
            for worker, size in bytes_of.items()
        ]
        classes = head_classes(rooms, groups=layout.groups, shard_by=self._shard_by)
        try:
            return classes, spread(classes, tokens=tokens, groups=layout.groups)
        except Full as error:
            silent = self._pool.silent()
            why = f"; attention workers that do not answer: {', '.join(silent)}" if silent else ""
            raise Full(f"{error}{why}", free_bytes=sum(bytes_of.values())) from None
