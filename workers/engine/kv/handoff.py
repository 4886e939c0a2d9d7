"""Full blocks of tails on their way to shards, in the background.

When the shards have sealed them the tail lets go, and the next step plan reads them there. Called by
``cache`` from the engine's thread; the moves run in the shards' queues.
"""

from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import torch

from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.plan.placement import Share
from farshore.errors import FarshoreError, Full
from farshore.ids import SequenceId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS, KVLayout
from farshore.kvstore.prefix import PrefixBlock, chain
from farshore.kvstore.store.tail import Tail
from farshore.workers.engine.kv import span_writer as spans
from farshore.workers.engine.kv.pool import Pool, first_error
from farshore.workers.engine.kv.shard_queue import ShardQueue
from farshore.workers.engine.sequence import Holder, PlacedSpan, Sequence

MOST_BLOCKS = 8
"""Of a span that tails grow into: each is granted twice the one before it, so that a step of a long answer
reads few spans, and a short answer holds little more than it needs."""


class _Target(NamedTuple):
    """Where a head class's part of the blocks goes: behind what is in a span, or to a new one."""

    share: Share
    """What a new one is granted; its worker and groups are the old one's otherwise."""
    into: PlacedSpan | None


class _HandOff(NamedTuple):
    """A move under way: up to where, to which targets, and the spans that will hold it."""

    boundary: int
    targets: list[_Target]
    moves: list[Future[PlacedSpan]]


class HandOffs:
    """``layout``: of blocks with all head groups."""

    def __init__(self, pool: Pool, layout: KVLayout) -> None:
        self._pool = pool
        self._layout = layout
        self._under_way: dict[tuple[SequenceId, int], _HandOff] = {}

    def advance(self, sequence: Sequence) -> None:
        """Start, or finish, moving the full blocks of the sequence's tail. Never waits.

        A refusal keeps them in the tail: the next full block tries again.
        """
        pending = self._under_way.get(sequence.key)
        if pending is not None:
            if all(move.done() for move in pending.moves):
                self._settle(sequence)
            return
        tail = sequence.placed_tail
        boundary = sequence.committed // BLOCK_TOKENS * BLOCK_TOKENS
        if boundary > tail.start and boundary != sequence.refused_at:
            sequence.blocks = chain(
                sequence.tokens[:boundary], fingerprint=sequence.fingerprint, begun=sequence.blocks
            )
            targets = self._targets(sequence, boundary)
            boundary = min([boundary, *(it.into.capacity for it in targets if it.into is not None)])
            names = [
                block for block in sequence.blocks if tail.start <= block.first and block.last <= boundary
            ]
            moves = []
            for target in targets:
                queue = self._pool[target.share.worker]
                move = partial(self._move, queue, sequence.placed_holder, tail, boundary, target, names)
                moves.append(queue.submit(move))
            self._under_way[sequence.key] = _HandOff(boundary, targets, moves)

    def forget(self, sequence: Sequence) -> list[Future[PlacedSpan]]:
        """Cancels the sequence's own, and returns the moves that run already: they read its tail."""
        pending = self._under_way.pop(sequence.key, None)
        return [move for move in pending.moves if not move.cancel() and not move.done()] if pending else []

    def _targets(self, sequence: Sequence, boundary: int) -> list[_Target]:
        """For each head class: what is left of the span that its last blocks went to; else the worker that
        has least of this sequence, answers, and did not refuse the last time."""
        start = sequence.placed_tail.start
        held: dict[WorkerId, int] = {room.worker: 0 for c in sequence.classes for room in c.workers}
        for span in sequence.spans:
            if span.worker in held:
                held[span.worker] += span.last - span.first
        silent = set(self._pool.silent())

        def rank(worker: WorkerId) -> tuple[bool, bool, int, WorkerId]:
            return worker in silent, worker in sequence.refused_by, held[worker], worker

        targets = []
        for c in sequence.classes:
            mine = [s for s in sequence.spans if s.origin >= sequence.prefill_tokens and s.group0 == c.group0]
            newest = max(mine, key=lambda span: span.first, default=None)
            if newest and newest.capacity > start and newest.worker not in sequence.refused_by | silent:
                share = Share(newest.worker, start, newest.capacity, c.group0, c.group1)
                targets.append(_Target(share, newest))
                continue
            blocks = -(-(newest.capacity - newest.origin) // BLOCK_TOKENS) if newest else 0
            most = sequence.prompt_tokens + sequence.sampling.max_tokens
            wanted = start // BLOCK_TOKENS * BLOCK_TOKENS + min(2 * blocks, MOST_BLOCKS) * BLOCK_TOKENS
            last = max(boundary, min(wanted, most))
            worker = min((room.worker for room in c.workers), key=rank)
            targets.append(_Target(Share(worker, start, last, c.group0, c.group1), None))
        return targets

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
        """Runs in the shard's queue. What went behind an old span's end and is not told of is scratch; a new
        span that failed is given back."""
        span = target.into or self._granted(queue, holder, target.share, boundary)
        first = tail.start
        try:
            at = max(first, span.sealed)  # sealed in an attempt that failed elsewhere
            if at < boundary:
                k, v = tail.read_layers(at, boundary, dtype=torch.uint8)
                for layer in range(self._layout.layers):
                    spans.write(
                        client,
                        span=span,
                        layer=layer,
                        position=at,
                        k=k[layer],
                        v=v[layer],
                        layout=self._layout,
                        holder=holder,
                    )
            spans.seal(client, span=span, last=boundary, names=names, holder=holder)
        except FarshoreError:
            if target.into is None:
                queue.release(holder, [span.span])
            raise
        span.sealed = boundary
        return span

    def _granted(self, queue: ShardQueue, holder: Holder, share: Share, boundary: int) -> PlacedSpan:
        """A new span; where the shard has no room to grow into, one that is no longer than it must be."""
        try:
            return self._grant(queue, holder, share)
        except Full:
            if share.last == boundary:
                raise
            return self._grant(queue, holder, share._replace(last=boundary))

    def _grant(self, queue: ShardQueue, holder: Holder, share: Share) -> PlacedSpan:
        span = queue.grant(
            holder,
            spans.key_of(share, holder),
            capacity_tokens=share.last - share.first,
            layout=self._layout.of_groups(share.group1 - share.group0),
        )
        return spans.placed(share, span)

    def _settle(self, sequence: Sequence) -> None:
        pending = self._under_way.pop(sequence.key)
        error = first_error(pending.moves)
        if error is not None:
            new = [it for it in zip(pending.moves, pending.targets, strict=True) if it[1].into is None]
            for move, target in new:
                if not move.cancelled() and move.exception() is None:
                    self._pool[target.share.worker].release(sequence.placed_holder, [move.result().span])
            if not isinstance(error, FarshoreError):
                raise error
            sequence.refused_by |= {
                it.share.worker
                for move, it in zip(pending.moves, pending.targets, strict=True)
                if move.cancelled() or move.exception() is not None
            }
            if {room.worker for c in sequence.classes for room in c.workers} <= sequence.refused_by:
                # Nothing has room: not before there is another block, or memory was given back.
                sequence.refused_at = pending.boundary
                sequence.refused_by.clear()
            return
        sequence.refused_by.clear()
        sequence.refused_at = None
        for move, target in zip(pending.moves, pending.targets, strict=True):
            span = move.result()
            span.last = pending.boundary
            if target.into is None:
                sequence.spans.append(span)
        sequence.spans_changed()
        sequence.placed_tail.release_below(pending.boundary)
