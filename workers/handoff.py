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


class _HandOff(NamedTuple):
    """A move under way: to whom, and the spans that will come of it."""

    shares: list[Share]
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
            names = [block for block in sequence.blocks if block.first >= tail.start]
            shares = self._shares(sequence, boundary)
            placed = self._helper.submit(self._move, sequence.id, sequence.epoch, tail, shares, names)
            self._under_way[sequence.id] = _HandOff(shares, placed)

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

    def _shares(self, sequence: Sequence, boundary: int) -> list[Share]:
        """The tail up to ``boundary`` goes, for each head class, to whoever has least of this sequence
        and did not refuse the last time."""
        held: dict[WorkerId, int] = {room.worker: 0 for c in sequence.classes for room in c.workers}
        for span in sequence.spans:
            if span.worker in held:
                held[span.worker] += span.last - span.first

        def rank(worker: WorkerId) -> tuple[bool, int, WorkerId]:
            return worker in sequence.refused_by, held[worker], worker

        start = sequence.placed_tail.start
        return [
            Share(min((room.worker for room in c.workers), key=rank), start, boundary, c.group0, c.group1)
            for c in sequence.classes
        ]

    def _move(
        self, sequence: SequenceId, epoch: Epoch, tail: Tail, shares: list[Share], names: list[PrefixBlock]
    ) -> list[PlacedSpan]:
        """Runs in the helper thread. All of ``shares`` or nothing."""
        placed: list[PlacedSpan] = []
        try:
            for share in shares:
                span = spans.create(self._peers[share.worker], share, self._layout, sequence, epoch)
                placed.append(span)
            k, v = tail.read_layers(shares[0].first, shares[0].last, dtype=torch.uint8)
            for span in placed:
                store = self._peers[span.worker].store
                for layer in range(self._layout.layers):
                    spans.write(store, span, layer, span.first, k[layer], v[layer], self._layout, epoch)
                store.seal(span.span, span.last - span.origin, epoch=epoch, blocks=names)
                span.sealed = span.last
        except FarshoreError:
            for span in placed:
                spans.drop(self._peers[span.worker], span, sequence, epoch)
            raise
        return placed

    def _settle(self, sequence: Sequence) -> None:
        pending = self._under_way.pop(sequence.id)
        if isinstance(pending.placed.exception(), FarshoreError):
            sequence.refused_by |= {share.worker for share in pending.shares}
            return
        placed = pending.placed.result()
        sequence.refused_by.clear()
        sequence.spans.extend(placed)
        sequence.placed_tail.release_below(placed[0].last)
