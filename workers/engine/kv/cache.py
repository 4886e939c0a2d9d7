"""Where a sequence's KV goes: finds what is stored already, grants the rest, forks, gives everything back.

The engine's side of the shard stores. It decides nothing global: which shards may be used, and how sequences
are cut, it is told.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.placement import (
    FreeTokens,
    GroupPlacement,
    ShardBy,
    Share,
    place_groups,
    spread,
)
from farshore.errors import FarshoreError, Full, TransportError
from farshore.ids import SpanId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.base import ShardStore, SpanSlice
from farshore.kvstore.prefix import chain
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.tail import Tail
from farshore.workers.engine.kv import span_writer as spans
from farshore.workers.engine.kv.handoff import HandOffs
from farshore.workers.engine.kv.pool import Pool
from farshore.workers.engine.kv.prefix import assemble
from farshore.workers.engine.sequence import Holder, PlacedSpan, Sequence


class SequenceCache:
    """KV of all sequences of one engine.

    ``arena`` is the engine's own memory, for tails. :meth:`place` runs beside the engine's thread and waits
    for shards; all other calls come from the engine's thread and wait for nothing.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        pool: Pool,
        model: AttentionModel,
        shard_by: ShardBy,
        store: ShardStore | None = None,
    ) -> None:
        """``store``: the one in the same arena, if there is one; what it caches can go for tails."""
        self._arena = arena
        self._store = store
        self._pool = pool
        self._layout = model.layouts[spans.LAYER_CLASS]
        self._shard_by: ShardBy = shard_by
        self._hand_offs = HandOffs(pool, self._layout)

    def fits_ever(self, tokens: int) -> None:
        """Raises Full where one completion of ``tokens``, prompt included, would not fit even into the empty
        pool. Of a pool whose size is not known, since a shard has never answered, nothing is said."""
        budgets = self._pool.budgets()
        if budgets is not None:
            self._spread(tokens, budgets)

    def tail_blocks_free(self) -> int:
        """How many more blocks of tails fit into the engine's memory."""
        free_bytes = self._store.usage().available_bytes if self._store else self._arena.free_bytes
        return free_bytes // Tail.bytes_for(self._layout, 0, BLOCK_TOKENS)

    def place(self, sequence: Sequence, *, promised_tokens: int) -> None:
        """Find the longest stored prefix of what is to be prefilled, and commit it; grant spans for the rest;
        open the tail. By the shards that answer: one that turns silent meanwhile is left out, and placing
        begins anew.

        Raises Full, with nothing kept, where the rest of the prompt and a block of what it generates don't
        fit next to ``promised_tokens`` that running sequences will need soon; TransportError where no shard
        answers.
        """
        tokens = sequence.prefill_tokens = sequence.known_tokens
        sequence.blocks = chain(
            sequence.tokens[:tokens], fingerprint=sequence.fingerprint, begun=sequence.blocks
        )
        failed: set[WorkerId] = set()
        while True:
            sequence.holder = Holder(sequence.id, sequence.epoch)
            before = len(failed)
            try:
                return self._place(sequence, sequence.holder, promised_tokens, failed)
            except FarshoreError as error:
                self.release(sequence)
                if len(failed) == before or not isinstance(error, TransportError):
                    raise

    def _place(self, sequence: Sequence, holder: Holder, promised_tokens: int, failed: set[WorkerId]) -> None:
        """``failed``: shards that did not answer while this sequence was placed; more may be added."""
        found, free = self._find_prefix(sequence, holder, failed)
        if not free:
            raise TransportError(f"no attention worker answers: {', '.join(self._pool.targets)}")
        sequence.spans = found
        hit = max((span.last for span in found), default=0)
        tokens = sequence.prefill_tokens
        promised_bytes = promised_tokens * self._layout.token_bytes // len(free)
        promised_free = {worker: size - promised_bytes for worker, size in free.items()}
        self._spread(tokens - hit + min(BLOCK_TOKENS, sequence.growth_tokens), promised_free)
        sequence.classes, shares = self._spread(tokens - hit, promised_free)
        shares = [share._replace(first=share.first + hit, last=share.last + hit) for share in shares]
        granted, failures = self._pool.gather({share.worker: self._grant(share, holder) for share in shares})
        for share in shares:
            if share.worker in failures:
                failed.update(failures)
                raise failures[share.worker]
            sequence.spans.append(spans.placed(share, granted[share.worker]))
        sequence.spans_changed()
        sequence.tail = Tail(arena=self._arena, layout=self._layout, start=tokens)
        sequence.committed = hit

    def seal(self, sequence: Sequence, until: int) -> list[Future[None]]:
        """Begins to seal every span of what is prefilled up to position ``until``, and to name its blocks.
        Idempotent. Once all have succeeded: :meth:`sealed`."""
        calls = []
        for span in sequence.spans:
            last = min(until, span.last)
            if last > span.sealed:
                names = [block for block in sequence.blocks if span.sealed < block.last <= last]
                seal = partial(spans.seal, span=span, last=last, names=names, holder=sequence.placed_holder)
                calls.append(self._pool[span.worker].submit(seal))
        return calls

    def sealed(self, sequence: Sequence, until: int) -> None:
        """Everything up to ``until`` is sealed, and so committed."""
        for span in sequence.spans:
            span.sealed = max(span.sealed, min(until, span.last))
        sequence.committed = until

    def fork(self, sequence: Sequence, child: Sequence) -> None:
        """``child``, another choice, shares the spans of ``sequence`` and has a copy of its tail. Raises
        Full, with nothing kept."""
        tail = sequence.placed_tail.fork()
        child.holder = Holder(child.id, child.epoch)
        child.spans = [replace(span) for span in sequence.spans]
        child.spans_changed()
        child.classes = sequence.classes
        for worker in {span.worker for span in child.spans}:
            held = [span.span for span in child.spans if span.worker == worker]
            self._pool[worker].retain(child.holder, held)
        child.tail = tail
        child.prefill_tokens = sequence.prefill_tokens
        child.committed = sequence.committed

    def hand_off(self, sequence: Sequence) -> None:
        """Start, or finish, moving the tail's full blocks to shards. Never waits."""
        self._hand_offs.advance(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give back everything the sequence has, wherever it is. Never waits: shards hear of it in their
        turn, and one that does not answer when it is back. The tail's memory is free now, or when the
        hand-off that reads it has ended."""
        busy = self._hand_offs.forget(sequence)
        tail, sequence.tail = sequence.tail, None
        if tail is not None:
            _when_done(busy, tail.free)
        holder, sequence.holder = sequence.holder, None
        if holder is not None:
            holder.closed = True
            for worker in {*self._pool.targets, *(span.worker for span in sequence.spans)}:
                self._pool[worker].release(holder)
        sequence.spans = []
        sequence.spans_changed()

    def _find_prefix(
        self, sequence: Sequence, holder: Holder, failed: set[WorkerId]
    ) -> tuple[list[PlacedSpan], dict[WorkerId, int]]:
        """Held spans of the longest stored prefix, and the free bytes of the shards that answered. Never all
        of a prompt: logits are wanted of its end."""
        below = sequence.prefill_tokens + sequence.forked
        blocks = [block for block in sequence.blocks if block.last < below]
        calls = {
            worker: self._pool[worker].find(holder, blocks, layer_class=spans.LAYER_CLASS)
            for worker in self._pool.placeable()
            if worker not in failed
        }
        found, failures = self._pool.gather(calls)
        failed.update(failures)  # less of a hit
        slices: dict[WorkerId, list[SpanSlice]] = {worker: its for worker, (its, _) in found.items()}
        placed = assemble(slices, groups=self._layout.groups)
        used = {span.span for span in placed}
        for worker, its in slices.items():
            if unused := [it.span for it in its if it.span not in used]:
                self._pool[worker].release(holder, unused)
        return placed, {worker: free_bytes for worker, (_, free_bytes) in found.items()}

    def _grant(self, share: Share, holder: Holder) -> Future[SpanId]:
        key = spans.key_of(share, holder)
        return self._pool[share.worker].create(
            holder,
            key,
            capacity_tokens=share.last - share.first,
            layout=self._layout.of_groups(share.group1 - share.group0),
        )

    def _spread(
        self, tokens: int, bytes_of: Mapping[WorkerId, int]
    ) -> tuple[list[GroupPlacement], list[Share]]:
        layout = self._layout
        # A share ends in a partly filled block, and so does the growth behind it: plan for both.
        free = [
            FreeTokens(worker, max(0, size // layout.block_bytes - 1) * BLOCK_TOKENS)
            for worker, size in bytes_of.items()
        ]
        classes = place_groups(free, groups=layout.groups, shard_by=self._shard_by)
        try:
            return classes, spread(classes, tokens=tokens, groups=layout.groups)
        except Full as error:
            silent = self._pool.silent()
            why = f"; attention workers that do not answer: {', '.join(silent)}" if silent else ""
            raise Full(f"{error}{why}", free_bytes=sum(bytes_of.values())) from None


def _when_done(calls: list[Future[PlacedSpan]], then: Callable[[], None]) -> None:
    """Calls ``then`` once, when all ``calls`` have ended."""
    if not calls:
        then()
        return
    calls[0].add_done_callback(lambda _: _when_done(calls[1:], then))
