"""Placement of sequences' KV: finds stored prefixes, grants spans, seals, forks, hands off and releases.

This is the engine's side of the shard stores. Called by ``scheduler``, ``prefill.prompts`` and ``admission``.
It must not decide global placement: which shards may be used, and how a sequence is cut, is configured.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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
from farshore.kvstore.base import PrefixFound, ShardStore, SpanSlice
from farshore.kvstore.prefix import PrefixBlock, chain
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.tail import Tail
from farshore.workers.engine.kv import span_writer
from farshore.workers.engine.kv.handoff import HandOffs
from farshore.workers.engine.kv.locations import PrefixLocations
from farshore.workers.engine.kv.move import SpanMoves
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.kv.prefix import assemble
from farshore.workers.engine.kv.recut import Recuts
from farshore.workers.engine.sequence import Holder, PlacedSpan, Sequence

MOST_FINISHING = 8
"""Most sequences whose last blocks are handed off after their end; the tails take memory meanwhile."""
FINISH_DEADLINE_S = 10.0
"""Longest wait of an engine that stops for such hand-offs. Each of their calls has a shorter deadline."""


class SequenceCache:
    """The KV of all sequences of one engine.

    ``arena`` is the engine's own memory, which holds the tails. ``store`` is the store in the same arena, if
    there is one: its cached blocks can be evicted for tails. ``locations`` says which shards to ask for a
    prefix; None: without a directory. :meth:`place` blocks on shards and runs in a thread of its own.
    :meth:`fits_ever` may be called from any thread. All other methods belong to the engine's thread and never
    block.
    """

    def __init__(
        self,
        *,
        arena: Arena,
        pool: ShardPool,
        model: AttentionModel,
        shard_by: ShardBy,
        store: ShardStore | None = None,
        locations: PrefixLocations | None = None,
    ) -> None:
        self._arena = arena
        self._locations = locations or PrefixLocations(None)
        self.finished = 0
        """Number of ended sequences that gave their memory back in the background."""
        self._finishing = 0
        self._finishing_lock = threading.Condition()
        self._store = store
        self._pool = pool
        self._layout = model.layouts[span_writer.LAYER_CLASS]
        self._shard_by: ShardBy = shard_by
        self._hand_offs = HandOffs(pool, self._layout, shard_by=shard_by, locations=self._locations)
        self._moves = SpanMoves(pool, self._layout, is_written=self._hand_offs.writes)
        self._recuts = Recuts(
            pool, self._layout, target=lambda share, sequence: self._moves.target(share, [sequence])
        )

    def fits_ever(self, tokens: int) -> None:
        """Raises Full if ``tokens`` tokens, prompt and completion, do not fit into the empty pool.

        Does nothing while the pool's size is unknown because a shard has never answered.
        """
        budgets = self._pool.budgets()
        if budgets is not None:
            self._spread(tokens, budgets)

    def tail_blocks_free(self) -> int:
        """Returns the number of tail blocks that still fit into the engine's memory."""
        free_bytes = self._store.usage().available_bytes if self._store else self._arena.free_bytes
        return free_bytes // Tail.bytes_for(self._layout, 0, BLOCK_TOKENS)

    def place(self, sequence: Sequence, *, promised_tokens: int) -> None:
        """Commits the longest stored prefix of a sequence, grants spans for the rest, and opens the tail.

        Only shards that answer are used; if one becomes silent meanwhile, placing restarts without it. Raises
        Full if the rest of the prompt and one block of its completion do not fit beside ``promised_tokens``,
        the tokens that running sequences will need soon; TransportError if no shard answers. Atomic: after an
        error the sequence holds no memory.
        """
        tokens = sequence.prefill_tokens = sequence.known_tokens
        sequence.blocks = chain(
            sequence.tokens[:tokens], fingerprint=sequence.fingerprint, begun=sequence.blocks
        )
        failed: set[WorkerId] = set()
        refreshed = False
        while True:
            sequence.holder = Holder(sequence.id, sequence.epoch)
            before = len(failed)
            try:
                return self._place(sequence, sequence.holder, promised_tokens, failed)
            except FarshoreError as error:
                self.release(sequence)
                if isinstance(error, Full) and not refreshed:
                    # The shards' free memory may be a beat old: others may have taken or given back some.
                    failed.update(self._pool.refresh(self._usable(failed)))
                    refreshed = True
                elif len(failed) == before or not isinstance(error, TransportError):
                    raise

    def _place(self, sequence: Sequence, holder: Holder, promised_tokens: int, failed: set[WorkerId]) -> None:
        """Places once. Adds shards that did not answer to ``failed``, the shards to leave out."""
        found = self._find_prefix(sequence, holder, failed)
        free = self._pool.free_bytes(self._usable(failed))
        if not free:
            names = ", ".join(self._pool.targets)
            raise TransportError(
                f"no attention worker answers: {names}" if names else "no attention worker has joined"
            )
        sequence.spans = found
        prefix_tokens = max((span.last for span in found), default=0)
        tokens = sequence.prefill_tokens
        promised_bytes = promised_tokens * self._layout.token_bytes // len(free)
        promised_free = {worker: size - promised_bytes for worker, size in free.items()}
        self._spread(tokens - prefix_tokens + min(BLOCK_TOKENS, sequence.growth_tokens), promised_free)
        sequence.classes, shares = self._spread(tokens - prefix_tokens, promised_free)
        shares = [
            share._replace(first=share.first + prefix_tokens, last=share.last + prefix_tokens)
            for share in shares
        ]
        granted, failures = self._pool.gather({share.worker: self._grant(share, holder) for share in shares})
        for share in shares:
            if share.worker in failures:
                failed.update(failures)
                raise failures[share.worker]
            sequence.spans.append(span_writer.placed(share, granted[share.worker]))
        sequence.spans_changed()
        sequence.tail = Tail(arena=self._arena, layout=self._layout, start=tokens)
        sequence.committed = prefix_tokens

    def seal(self, sequence: Sequence, until: int) -> list[Future[None]]:
        """Starts to seal all spans up to position ``until``, with the hashes of their blocks.

        All positions below ``until`` must be written. Returns the calls; after all have succeeded, call
        :meth:`sealed`. Idempotent.
        """
        calls = []
        for span in sequence.spans:
            last = min(until, span.last)
            if last > span.sealed:
                names = _named(sequence, span, last)
                holder = sequence.placed_holder
                seal = partial(span_writer.seal, span=span, last=last, names=names, holder=holder)
                calls.append(self._pool[span.worker].submit(seal))
        return calls

    def sealed(self, sequence: Sequence, until: int) -> None:
        """Records that all spans are sealed up to position ``until``, and commits these positions."""
        for span in sequence.spans:
            last = min(until, span.last)
            self._locations.add(span.worker, [block.hash for block in _named(sequence, span, last)])
            span.sealed = max(span.sealed, min(until, span.last))
        sequence.committed = until

    def fork(self, sequence: Sequence, child: Sequence) -> None:
        """Gives ``child``, another choice, the spans of ``sequence`` and a copy of its tail.

        Atomic. Raises Full if there is no room for the tail.
        """
        tail = sequence.placed_tail.fork()
        child.holder = Holder(child.id, child.epoch)
        # Only one choice may fill the rest of the prompt's last block, and name it by its own tokens.
        child.spans = [replace(span, capacity=span.last) for span in sequence.spans]
        child.spans_changed()
        child.classes = sequence.classes
        for worker in {span.worker for span in child.spans}:
            shared = [span.span for span in child.spans if span.worker == worker]
            self._pool[worker].retain(child.holder, shared)
        child.tail = tail
        child.prefill_tokens = sequence.prefill_tokens
        child.committed = sequence.committed

    def hand_off(self, sequence: Sequence) -> None:
        """Starts or finishes the hand-off of the tail's full blocks to shards."""
        self._hand_offs.advance(sequence)

    def move_spans(self, live: Iterable[Sequence]) -> None:
        """Moves spans of ``live``, the sequences that have memory, off shards that drain."""
        self._moves.advance(live)

    def leave_draining(self, sequence: Sequence) -> list[Future[None]]:
        """Takes what a prompt has not written yet off shards that drain. Call it while no segment of the
        prompt is under way. Returns calls to wait for before the next one; then call it again."""
        return self._recuts.advance(sequence)

    @property
    def is_moving_spans(self) -> bool:
        """Whether a span is on its way from one shard to another."""
        return self._moves.is_under_way

    def drains(self) -> dict[WorkerId, str]:
        """Returns the draining shards, each with the reason why spans stay there. Any thread may call it."""
        return self._moves.reasons()

    def moves_to(self, worker: WorkerId) -> bool:
        """Returns whether blocks of a tail may be on their way to the worker, or a span from or to it."""
        return self.is_finishing or self._hand_offs.moves_to(worker) or self._moves.uses(worker)

    def finish(self, sequence: Sequence) -> None:
        """Gives back all memory of a sequence that has ended, after a hand-off of the tail's full blocks: the
        next turn of a conversation finds them.

        The hand-off is left out while memory for tails is short, or while MOST_FINISHING others run.
        """
        with self._finishing_lock:
            begins = sequence.tail is not None and self._finishing < MOST_FINISHING
        moves = self._hand_offs.finish(sequence) if begins and self.tail_blocks_free() > 1 else []
        if not moves:
            return self.release(sequence)
        with self._finishing_lock:
            self._finishing += 1
        tail, holder, workers = sequence.placed_tail, sequence.placed_holder, self._workers_of(sequence)
        sequence.tail = sequence.holder = None
        sequence.spans = []
        sequence.spans_changed()

        def end() -> None:
            tail.free()
            self._drop(holder, workers)
            with self._finishing_lock:
                self._finishing -= 1
                self.finished += 1
                self._finishing_lock.notify_all()

        _when_done(moves, end)

    def release(self, sequence: Sequence) -> None:
        """Gives back all memory of the sequence.

        Shards drop its spans when their queues reach the call, or when they answer again. The tail's memory
        is freed at once, or when the hand-off that reads it has ended.
        """
        busy = self._hand_offs.forget(sequence)
        tail, sequence.tail = sequence.tail, None
        if tail is not None:
            _when_done(busy, tail.free)
        holder, sequence.holder = sequence.holder, None
        granting = self._recuts.forget(sequence)
        if holder is not None:
            self._drop(holder, self._workers_of(sequence) | granting)
        sequence.spans = []
        sequence.spans_changed()

    @property
    def is_finishing(self) -> bool:
        """Whether an ended sequence has not given its memory back yet."""
        return self._finishing > 0

    def close(self) -> None:
        """Starts no further move, and waits for the hand-offs of ended sequences, for FINISH_DEADLINE_S at
        most."""
        self._moves.close()
        with self._finishing_lock:
            self._finishing_lock.wait_for(lambda: not self._finishing, timeout=FINISH_DEADLINE_S)

    def _workers_of(self, sequence: Sequence) -> set[WorkerId]:
        """The workers that may hold spans of the sequence."""
        return {*self._pool.targets, *(span.worker for span in sequence.spans)}

    def _drop(self, holder: Holder, workers: Iterable[WorkerId]) -> None:
        """Closes a holder and releases its spans. Any thread may call it."""
        holder.closed = True
        for worker in workers:
            if worker in self._pool:
                self._pool[worker].release(holder)

    def _usable(self, failed: set[WorkerId]) -> list[WorkerId]:
        """The workers that answer and may get spans, without those that failed to answer just now."""
        return [worker for worker in self._pool.placeable() if worker not in failed]

    def _find_prefix(self, sequence: Sequence, holder: Holder, failed: set[WorkerId]) -> list[PlacedSpan]:
        """Returns the spans of the longest stored prefix, held by ``holder``.

        Two round trips, or one if nothing is stored: first the names go to the shards that may have the
        blocks, then the tokens of the hit to those that do, where they are compared. A block that is gone by
        then makes a shorter prefix. Shards that do not answer are added to ``failed``.

        The prefix never includes the last token of a prompt that is not forked: prefill must compute that
        token's logits. Nor does it include a position whose logits give a log-probability that is owed.
        """
        limit = sequence.prefill_tokens + sequence.forked
        if sequence.owes_prompt_logprobs:
            limit = min(limit, sequence.prompt_logprobs_sent)
        blocks = [block for block in sequence.blocks if block.last < limit]
        names = [block.hash for block in blocks]
        asked = self._locations.shards_to_ask(names, self._usable(failed))
        calls = {
            worker: self._pool[worker].find(names, layer_class=span_writer.LAYER_CLASS) for worker in asked
        }
        located = self._slices(calls, failed)
        for worker, slices in located.items():
            has = {block.hash for block in _blocks_of(blocks, slices)}
            self._locations.add(worker, has)
            self._locations.remove(worker, set(names) - has)
        chosen: dict[WorkerId, list[PlacedSpan]] = defaultdict(list)
        for span in assemble(located, groups=self._layout.groups):
            chosen[span.worker].append(span)
        holds = {
            worker: self._pool[worker].hold_prefix(
                holder, _blocks_of(blocks, spans), layer_class=span_writer.LAYER_CLASS
            )
            for worker, spans in chosen.items()
        }
        held = self._slices(holds, failed)
        placed = assemble(held, groups=self._layout.groups)
        used = {span.span for span in placed}
        for worker, slices in held.items():
            if unused := [span_slice.span for span_slice in slices if span_slice.span not in used]:
                self._pool[worker].release(holder, unused)
        return placed

    def _slices(
        self, calls: Mapping[WorkerId, Future[PrefixFound]], failed: set[WorkerId]
    ) -> dict[WorkerId, list[SpanSlice]]:
        """Waits for ``calls``; returns what each worker found. Those that did not answer are ``failed``."""
        found, failures = self._pool.gather(calls)
        failed.update(failures)
        return {worker: of_worker.slices for worker, of_worker in found.items()}

    def _grant(self, share: Share, holder: Holder) -> Future[SpanId]:
        key = span_writer.key_of(share, holder)
        return self._pool[share.worker].create(
            holder,
            key,
            capacity_tokens=span_writer.capacity_tokens(share),
            layout=self._layout.of_groups(share.group1 - share.group0),
        )

    def _spread(
        self, tokens: int, bytes_of: Mapping[WorkerId, int]
    ) -> tuple[list[GroupPlacement], list[Share]]:
        """Cuts ``tokens`` into shares for workers of ``bytes_of`` bytes; returns (group placements, shares).

        Raises Full if they do not fit.
        """
        layout = self._layout
        # One block per worker is left out: a share and the growth after it both end in a partly filled block.
        free = [
            FreeTokens(worker, max(0, size // layout.block_bytes - 1) * BLOCK_TOKENS)
            for worker, size in bytes_of.items()
        ]
        classes = place_groups(free, groups=layout.groups, shard_by=self._shard_by)
        try:
            return classes, spread(classes, tokens=tokens, groups=layout.groups)
        except Full as error:
            silent = self._pool.silent()
            note = f"; attention workers that do not answer: {', '.join(silent)}" if silent else ""
            raise Full(f"{error}{note}", free_bytes=sum(bytes_of.values())) from None


def _named(sequence: Sequence, span: PlacedSpan, last: int) -> list[PrefixBlock]:
    """The blocks of the sequence that a seal of ``span`` at position ``last`` names."""
    return [block for block in sequence.blocks if span.sealed < block.last <= last]


def _blocks_of(blocks: Iterable[PrefixBlock], ranges: Iterable[SpanSlice | PlacedSpan]) -> list[PrefixBlock]:
    """The blocks that lie within one of the ranges of positions, in order."""
    return [
        block
        for block in blocks
        if any(span.first <= block.first and block.last <= span.last for span in ranges)
    ]


def _when_done(calls: list[Future[PlacedSpan]], then: Callable[[], None]) -> None:
    """Calls ``then`` once, after all ``calls`` have ended."""
    if not calls:
        then()
        return
    calls[0].add_done_callback(lambda _: _when_done(calls[1:], then))
