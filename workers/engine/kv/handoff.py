"""Hand-off: moves full blocks of tails to shards, in the background.

When the shards have sealed a block, the tail releases it, and the next step plan reads it from the shards.
A handed-off block gets a name as a prompt's block does, so that the next turn of a conversation finds the KV
of its own answer. That KV was computed by decode steps and not by prefill: the same values of the same model
for the same tokens, though the last bits may differ, as they do between any two batch sizes (invariants 5 and
6, docs/architecture.md).

Called by ``cache`` from the engine's thread; the moves run in the shards' queues. It must not know steps or
how sequences are scheduled.
"""

from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import torch

from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.plan.placement import GroupPlacement, ShardBy, Share
from farshore.errors import FarshoreError, Full
from farshore.ids import SequenceId, SpanId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS, KVLayout
from farshore.kvstore.prefix import PrefixBlock, chain
from farshore.kvstore.store.tail import Tail
from farshore.workers.engine.kv import span_writer
from farshore.workers.engine.kv.locations import PrefixLocations
from farshore.workers.engine.kv.pool import ShardPool, first_error
from farshore.workers.engine.kv.shard_queue import ShardQueue
from farshore.workers.engine.sequence import Holder, PlacedSpan, Sequence

MOST_BLOCKS = 8
"""Most blocks of a span that a hand-off creates. Each is granted twice as many blocks as the previous one, so
that a step of a long answer reads few spans, and a short answer holds little more than it needs."""


class _Target(NamedTuple):
    """Destination of the blocks of one placement of head groups: the rest of a span, or a new span."""

    share: Share
    """Worker, positions and groups; a new span is granted for all of it."""
    into: PlacedSpan | None
    """The existing span; None for a new one."""
    copied: PlacedSpan | None = None
    """For a new span that begins before the tail: the span of the same worker that its beginning is in."""


class _HandOff(NamedTuple):
    """A hand-off under way: the end of its positions, its targets, and the calls that return their spans."""

    boundary: int
    targets: list[_Target]
    moves: list[Future[PlacedSpan]]


class HandOffs:
    """The hand-offs of one engine. Not thread-safe: only the engine's thread calls it.

    ``layout`` is the layout of blocks with all head groups.
    """

    def __init__(
        self, pool: ShardPool, layout: KVLayout, *, shard_by: ShardBy, locations: PrefixLocations
    ) -> None:
        self._pool = pool
        self._locations = locations
        self._shard_by: ShardBy = shard_by
        self._layout = layout
        self._under_way: dict[tuple[SequenceId, int], _HandOff] = {}

    def advance(self, sequence: Sequence) -> None:
        """Starts or finishes the hand-off of the tail's full blocks. Never blocks.

        Refused blocks stay in the tail; the hand-off is tried again with the next full block. Raises an error
        of a move that is not a FarshoreError.
        """
        pending = self._under_way.get(sequence.key)
        if pending is None:
            self._start(sequence)
        elif all(move.done() for move in pending.moves):
            self._settle(sequence)

    def _start(self, sequence: Sequence) -> None:
        """Starts a hand-off if the tail has full blocks that some worker may take."""
        tail = sequence.placed_tail
        boundary = sequence.committed // BLOCK_TOKENS * BLOCK_TOKENS
        if boundary > tail.start and boundary != sequence.refused_boundary and self._pool.targets:
            sequence.blocks = chain(
                sequence.tokens[:boundary], fingerprint=sequence.fingerprint, begun=sequence.blocks
            )
            targets = self._targets(sequence, boundary)
            boundary = min(
                [boundary, *(target.into.capacity for target in targets if target.into is not None)]
            )
            names = _named(sequence, boundary)
            moves = []
            for target in targets:
                queue = self._pool[target.share.worker]
                move = partial(self._move, queue, sequence.placed_holder, tail, boundary, target, names)
                moves.append(queue.submit(move))
            self._under_way[sequence.key] = _HandOff(boundary, targets, moves)

    def moves_to(self, worker: WorkerId) -> bool:
        """Returns whether a hand-off to the worker is under way."""
        return any(
            target.share.worker == worker
            for pending in self._under_way.values()
            for target in pending.targets
        )

    def writes(self, sequence: Sequence, span: SpanId) -> bool:
        """Returns whether a hand-off of the sequence to an existing span is under way."""
        pending = self._under_way.get(sequence.key)
        return pending is not None and any(
            target.into is not None and target.into.span == span for target in pending.targets
        )

    def finish(self, sequence: Sequence) -> list[Future[PlacedSpan]]:
        """Starts the last hand-off of a sequence that has ended, unless one is under way; returns its moves,
        [] if the tail has no full blocks. The caller keeps the tail and the holds until these are done."""
        if sequence.key not in self._under_way:
            self._start(sequence)
        pending = self._under_way.pop(sequence.key, None)
        return pending.moves if pending else []

    def forget(self, sequence: Sequence) -> list[Future[PlacedSpan]]:
        """Cancels the sequence's hand-off; returns the moves that already run and so still read its tail."""
        pending = self._under_way.pop(sequence.key, None)
        return [move for move in pending.moves if not move.cancel() and not move.done()] if pending else []

    def _targets(self, sequence: Sequence, boundary: int) -> list[_Target]:
        """Chooses a target for each placement of head groups.

        It is the rest of the span that ends where the tail starts: the one that the last blocks went to, or
        the prompt's last one, whose partly filled block then gets a name. Another choice fills that one; this
        choice then gets a span beside it that begins with a copy of the block's beginning. Else it is a new
        span on the worker that answers, did not refuse the last time, and stores the fewest tokens of this
        sequence.
        """
        start = sequence.placed_tail.start
        stored_tokens: Counter[WorkerId] = Counter()
        for span in sequence.spans:
            stored_tokens[span.worker] += span.last - span.first
        silent = set(self._pool.silent())
        targets_now = set(self._pool.targets)

        def rank(worker: WorkerId) -> tuple[bool, bool, int, WorkerId]:
            return worker in silent, worker in sequence.refused_by, stored_tokens[worker], worker

        usable = targets_now - silent - sequence.refused_by
        targets = []
        for placement in sequence.classes:
            group0, group1 = placement.group0, placement.group1
            of_groups = [span for span in sequence.spans if span.group0 == group0]
            before = next((span for span in of_groups if span.last == start), None)
            if before and before.capacity > start and before.worker in usable:
                share = Share(before.worker, start, before.capacity, group0, group1)
                targets.append(_Target(share, before))
                continue
            handed_off = [span for span in of_groups if span.first >= sequence.prefill_tokens]
            newest = max(handed_off, key=lambda span: span.first, default=None)
            blocks = -(-(newest.capacity - newest.first) // BLOCK_TOKENS) if newest else 0
            most = sequence.prompt_tokens + sequence.sampling.max_tokens
            wanted = start // BLOCK_TOKENS * BLOCK_TOKENS + min(2 * blocks, MOST_BLOCKS) * BLOCK_TOKENS
            last = max(boundary, min(wanted, most))
            if start % BLOCK_TOKENS and before and before.group1 == group1 and before.worker in usable:
                share = Share(before.worker, start // BLOCK_TOKENS * BLOCK_TOKENS, last, group0, group1)
                targets.append(_Target(share, None, copied=before))
                continue
            worker = min(self._workers(sequence, placement), key=rank)
            targets.append(_Target(Share(worker, start, last, group0, group1), None))
        return targets

    def _workers(self, sequence: Sequence, placement: GroupPlacement) -> set[WorkerId]:
        """The workers that may store the next blocks of a placement of head groups: its own, without those
        that take no new spans now, and those that joined since the sequence was placed. A placement by head
        keeps to its own workers while one is left, since each further worker of a group costs a hop."""
        targets = set(self._pool.targets)
        own = {free.worker for free in placement.workers} & targets
        placed = {free.worker for other in sequence.classes for free in other.workers}
        if self._shard_by == "head":
            return own or targets
        return own | (targets - placed) or targets

    def _move(
        self,
        queue: ShardQueue,
        holder: Holder,
        tail: Tail,
        boundary: int,
        target: _Target,
        names: list[PrefixBlock],
        client: ShardClient,
    ) -> PlacedSpan:
        """Writes the blocks to the target and seals them; returns its span. Runs in the shard's queue.

        If it fails, tokens after the old ``last`` of an existing span are overwritten by the retry; a new
        span is given back.
        """
        span = target.into or self._grant_or_less(queue, holder, target.share, boundary)
        first = tail.start
        try:
            if target.copied is not None:
                self._copy_beginning(client, target.copied, span, first, holder)
            # A hand-off that failed on another shard may have sealed some of the blocks here.
            position = max(first, span.sealed)
            if position < boundary:
                k, v = tail.read_layers(position, boundary, dtype=torch.uint8)
                for layer in range(self._layout.layers):
                    span_writer.write(
                        client,
                        span=span,
                        layer=layer,
                        position=position,
                        k=k[layer],
                        v=v[layer],
                        layout=self._layout,
                        holder=holder,
                    )
            span_writer.seal(client, span=span, last=boundary, names=names, holder=holder)
        except FarshoreError:
            if target.into is None:
                queue.release(holder, [span.span])
            raise
        span.sealed = boundary
        return span

    def _copy_beginning(
        self, client: ShardClient, source: PlacedSpan, span: PlacedSpan, until: int, holder: Holder
    ) -> None:
        """Copies the new ``span``'s positions below ``until`` from ``source``, as stored. They are there for
        the block's name; steps read them from ``source``."""
        first, last = span.origin - source.origin, until - source.origin
        for layer in range(self._layout.layers):
            k, v = client.store.read(
                source.span, layer, first, last, sequence=holder.sequence, dtype=torch.uint8
            )
            client.store.write(span.span, layer, 0, k, v, sequence=holder.sequence, epoch=holder.epoch)
        span.first = until

    def _grant_or_less(self, queue: ShardQueue, holder: Holder, share: Share, boundary: int) -> PlacedSpan:
        """Grants a span for ``share``, or one that ends at ``boundary`` if the shard lacks room for all."""
        try:
            return self._grant(queue, holder, share)
        except Full:
            if share.last == boundary:
                raise
            return self._grant(queue, holder, share._replace(last=boundary))

    def _grant(self, queue: ShardQueue, holder: Holder, share: Share) -> PlacedSpan:
        span = queue.grant(
            holder,
            span_writer.key_of(share, holder),
            capacity_tokens=span_writer.capacity_tokens(share),
            layout=self._layout.of_groups(share.group1 - share.group0),
        )
        return span_writer.placed(share, span)

    def _settle(self, sequence: Sequence) -> None:
        """Ends a hand-off whose moves are done: releases the tail's blocks, or records the refusals."""
        pending = self._under_way.pop(sequence.key)
        error = first_error(pending.moves)
        if error is not None:
            for move, target in zip(pending.moves, pending.targets, strict=True):
                if target.into is None and not move.cancelled() and move.exception() is None:
                    self._pool[target.share.worker].release(sequence.placed_holder, [move.result().span])
            if not isinstance(error, FarshoreError):
                raise error
            sequence.refused_by |= {
                target.share.worker
                for move, target in zip(pending.moves, pending.targets, strict=True)
                if move.cancelled() or move.exception() is not None
            }
            candidates = (self._workers(sequence, placement) for placement in sequence.classes)
            if any(workers <= sequence.refused_by for workers in candidates):
                # Every worker refused. The scheduler clears refused_boundary when memory is given back.
                sequence.refused_boundary = pending.boundary
                sequence.refused_by.clear()
            return
        sequence.refused_by.clear()
        sequence.refused_boundary = None
        names = [block.hash for block in _named(sequence, pending.boundary)]
        for move, target in zip(pending.moves, pending.targets, strict=True):
            span = move.result()
            span.last = pending.boundary
            self._locations.add(span.worker, names)
            if target.into is None:
                sequence.spans.append(span)
        sequence.spans_changed()
        sequence.placed_tail.release_below(pending.boundary)


def _named(sequence: Sequence, boundary: int) -> list[PrefixBlock]:
    """The blocks that a hand-off of the tail up to ``boundary`` completes. Their names are of the choice's
    own committed tokens. The first may begin before the tail; a store names it only if one span has all of
    it."""
    start = sequence.placed_tail.start
    return [block for block in sequence.blocks if start < block.last <= boundary]
