"""Full blocks of tails on their way to shards, in the background.

When the shards have sealed them the tail lets go, and the next step plan reads them there. Called by
``cache`` from the engine's thread; one helper thread does the moves.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from farshore.attention_offload.base import Peer
from farshore.attention_offload.placement import Share
from farshore.errors import FarshoreError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS, KVLayout
from farshore.kvstore.prefix import PrefixBlock, chain
from farshore.kvstore.tail import Tail
from farshore.workers import spans
from farshore.workers.sequence import PlacedSpan, Sequence

MOST_BLOCKS = 8
"""Of a span that tails grow into: each is granted twice the one before it, so that a step of a long answer
reads few spans, and a short answer holds little more than it needs."""


class _Target(NamedTuple):
    """Where a head class's part of the blocks goes: behind what is in a span, or to a new one."""

    share: Share
    """What a new one is granted; its worker and groups are the old one's otherwise."""
    into: PlacedSpan | None


class _HandOff(NamedTuple):
    """A move under way: up to where, to whom, and the spans that will hold it."""

    boundary: int
    targets: list[_Target]
    placed: Future[list[PlacedSpan]]


class HandOffs:
    """``layout``: of blocks with all head groups."""

    def __init__(self, peers: Mapping[WorkerId, Peer], layout: KVLayout) -> None:
        self._peers = peers
        self._layout = layout
        self._under_way: dict[SequenceId, _HandOff] = {}
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="hand-off")

    def advance(self, sequence: Sequence) -> None:
        """Start, or finish, moving the full blocks of the sequence's tail. Never waits.

        A refusal keeps them in the tail: the next full block tries again.
        """
        pending = self._under_way.get(sequence.id)
        if pending is not None:
            if pending.placed.done():
                self._settle(sequence)
            return
        tail = sequence.placed_tail
        boundary = sequence.committed // BLOCK_TOKENS * BLOCK_TOKENS
        if boundary > tail.start:
            sequence.blocks = chain(
                sequence.tokens[:boundary], fingerprint=sequence.fingerprint, begun=sequence.blocks
            )
            targets = self._targets(sequence, boundary)
            boundary = min([boundary, *(it.into.capacity for it in targets if it.into is not None)])
            names = [
                block for block in sequence.blocks if tail.start <= block.first and block.last <= boundary
            ]
            placed = self._helper.submit(
                self._move, sequence.id, sequence.epoch, tail, boundary, targets, names
            )
            self._under_way[sequence.id] = _HandOff(boundary, targets, placed)

    def settle_all(self) -> None:
        """Wait for those under way (they have deadlines)."""
        for pending in list(self._under_way.values()):
            pending.placed.exception()

    def forget(self, sequence: SequenceId) -> None:
        """Wait for the sequence's own, which reads its tail; what comes of it goes with the sequence."""
        pending = self._under_way.pop(sequence, None)
        if pending is not None:
            pending.placed.exception()

    def close(self) -> None:
        self._helper.shutdown(wait=True)

    def _targets(self, sequence: Sequence, boundary: int) -> list[_Target]:
        """For each head class: what is left of the span that its last blocks went to; else whoever has least
        of this sequence, and did not refuse the last time."""
        start = sequence.placed_tail.start
        held: dict[WorkerId, int] = {room.worker: 0 for c in sequence.classes for room in c.workers}
        for span in sequence.spans:
            if span.worker in held:
                held[span.worker] += span.last - span.first

        def rank(worker: WorkerId) -> tuple[bool, int, WorkerId]:
            return worker in sequence.refused_by, held[worker], worker

        targets = []
        for c in sequence.classes:
            mine = [s for s in sequence.spans if s.origin >= sequence.prompt_tokens and s.group0 == c.group0]
            newest = max(mine, key=lambda span: span.first, default=None)
            if newest and newest.capacity > start and newest.worker not in sequence.refused_by:
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
        sequence: SequenceId,
        epoch: Epoch,
        tail: Tail,
        boundary: int,
        targets: list[_Target],
        names: list[PrefixBlock],
    ) -> list[PlacedSpan]:
        """Runs in the helper thread. New spans come of it for all targets without one, or for none; what went
        behind an old one's end and is not told of is scratch."""
        placed: list[PlacedSpan] = []
        try:
            for share, into in targets:
                placed.append(
                    into or spans.create(self._peers[share.worker], share, self._layout, sequence, epoch)
                )
            first = tail.start
            k, v = tail.read_layers(first, boundary, dtype=torch.uint8)
            for span in placed:
                store = self._peers[span.worker].store
                at = max(first, span.sealed)  # sealed in an attempt that failed elsewhere
                for layer in range(self._layout.layers) if at < boundary else ():
                    parts = k[layer][:, at - first :], v[layer][:, at - first :]
                    spans.write(store, span, layer, at, *parts, self._layout, sequence, epoch)
                store.seal(span.span, boundary - span.origin, sequence=sequence, epoch=epoch, blocks=names)
                span.sealed = boundary
        except FarshoreError:
            old = {id(it.into) for it in targets}
            for span in placed:
                if id(span) not in old:
                    spans.drop(self._peers[span.worker], span, sequence, epoch)
            raise
        return placed

    def _settle(self, sequence: Sequence) -> None:
        pending = self._under_way.pop(sequence.id)
        if isinstance(pending.placed.exception(), FarshoreError):
            sequence.refused_by |= {it.share.worker for it in pending.targets}
            return
        sequence.refused_by.clear()
        for span, target in zip(pending.placed.result(), pending.targets, strict=True):
            span.last = pending.boundary
            if target.into is None:
                sequence.spans.append(span)
        sequence.placed_tail.release_below(pending.boundary)
