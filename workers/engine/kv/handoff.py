"""Hand-off: moves full blocks of tails to shards, in the background.

When the shards have sealed a block, the tail releases it, and the next step plan reads it from the shards.
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


class _HandOff(NamedTuple):
    """A hand-off under way: the end of its positions, its targets, and the calls that return their spans."""

    boundary: int
    targets: list[_Target]
    moves: list[Future[PlacedSpan]]


class HandOffs:
    """The hand-offs of one engine. Not thread-safe: only the engine's thread calls it.

    ``layout`` is the layout of blocks with all head groups.
    """

    def __init__(self, pool: ShardPool, layout: KVLayout, *, shard_by: ShardBy) -> None:
        self._pool = pool
        self._shard_by: ShardBy = shard_by
        self._layout = layout
        self._under_way: dict[tuple[SequenceId, int], _HandOff] = {}

    def advance(self, sequence: Sequence) -> None:
        """Starts or finishes the hand-off of the tail's full blocks. Never blocks.

        Refused blocks stay in the tail; the hand-off is tried again with the next full block. Raises an error
        of a move that is not a FarshoreError.
        """
        pending = self._under_way.get(sequence.key)
        if pending is not None:
            if all(move.done() for move in pending.moves):
                self._settle(sequence)
            return
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
            names = [
                block for block in sequence.blocks if tail.start <= block.first and block.last <= boundary
            ]
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

    def forget(self, sequence: Sequence) -> list[Future[PlacedSpan]]:
        """Cancels the sequence's hand-off; returns the moves that already run and so still read its tail."""
        pending = self._under_way.pop(sequence.key, None)
        return [move for move in pending.moves if not move.cancel() and not move.done()] if pending else []

    def _targets(self, sequence: Sequence, boundary: int) -> list[_Target]:
        """Chooses a target for each placement of head groups.

        It is the rest of the span that its last blocks went to; else a new span on the worker that
        answers, did not refuse the last time, and stores the fewest tokens of this sequence.
        """
        start = sequence.placed_tail.start
        stored_tokens: Counter[WorkerId] = Counter()
        for span in sequence.spans:
            stored_tokens[span.worker] += span.last - span.first
        silent = set(self._pool.silent())
        targets_now = set(self._pool.targets)

        def rank(worker: WorkerId) -> tuple[bool, bool, int, WorkerId]:
            return worker in silent, worker in sequence.refused_by, stored_tokens[worker], worker

        targets = []
        for placement in sequence.classes:
            group0, group1 = placement.group0, placement.group1
            handed_off = [
                span
                for span in sequence.spans
                if span.origin >= sequence.prefill_tokens and span.group0 == group0
            ]
            newest = max(handed_off, key=lambda span: span.first, default=None)
            usable = targets_now - silent - sequence.refused_by
            if newest and newest.capacity > start and newest.worker in usable:
                share = Share(newest.worker, start, newest.capacity, group0, group1)
                targets.append(_Target(share, newest))
                continue
            blocks = -(-(newest.capacity - newest.origin) // BLOCK_TOKENS) if newest else 0
            most = sequence.prompt_tokens + sequence.sampling.max_tokens
            wanted = start // BLOCK_TOKENS * BLOCK_TOKENS + min(2 * blocks, MOST_BLOCKS) * BLOCK_TOKENS
            last = max(boundary, min(wanted, most))
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
            capacity_tokens=share.last - share.first,
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
        for move, target in zip(pending.moves, pending.targets, strict=True):
            span = move.result()
            span.last = pending.boundary
            if target.into is None:
                sequence.spans.append(span)
        sequence.spans_changed()
        sequence.placed_tail.release_below(pending.boundary)
