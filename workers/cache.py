"""Where a sequence's KV goes: grants spans, hands full tail blocks over, gives everything back.

The engine's side of the shard stores. It decides nothing global: which shards may be used, and how sequences
are cut, it is told.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.placement import HeadClass, Room, ShardBy, Share, head_classes, spread
from farshore.errors import FarshoreError, Full
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.arena import Arena
from farshore.kvstore.base import SpanKey
from farshore.kvstore.tail import Tail
from farshore.workers.sequence import PlacedSpan, Sequence

LAYER_CLASS = 0
"""Models served so far have one kind of attention layer."""


class _HandOff(NamedTuple):
    """A move of the tail's full blocks, under way: to whom, and the spans that will come of it."""

    shares: list[Share]
    placed: Future[list[PlacedSpan]]


class SequenceCache:
    """KV of all sequences of one engine.

    Called by the engine's thread; one helper thread of its own does the hand-offs. ``arena`` is the engine's
    own memory, for tails; ``targets`` are the workers that spans go to.
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
        self._layout = model.layouts[LAYER_CLASS]
        self._shard_by: ShardBy = shard_by
        self._handing_off: dict[SequenceId, _HandOff] = {}
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="hand-off")

    def fits_ever(self, tokens: int) -> None:
        """Raises Full where a sequence of ``tokens`` would not fit even into the empty pool."""
        self._spread(tokens, {worker: peer.identify().budget_bytes for worker, peer in self._target_peers()})

    def place(self, sequence: Sequence, *, promised_tokens: int) -> None:
        """Grant spans for the prompt and open the tail. Raises Full, with nothing kept, where the prompt and
        what it may generate don't fit next to ``promised_tokens`` that running sequences may still need."""
        token_bytes = self._layout.token_bytes
        promised_bytes = promised_tokens * token_bytes // len(self._targets)
        free = {worker: peer.identify().free_bytes - promised_bytes for worker, peer in self._target_peers()}
        self._spread(sequence.most_tokens, free)
        sequence.classes, shares = self._spread(sequence.prompt_tokens, free)
        try:
            for share in shares:
                sequence.spans.append(self._create(sequence.id, sequence.epoch, share))
            sequence.tail = Tail(arena=self._arena, layout=self._layout, start=sequence.prompt_tokens)
        except FarshoreError:
            self.release(sequence)
            raise

    def seal(self, sequence: Sequence, until: int) -> None:
        """Seal every span of the prompt up to position ``until``, and so commit it. Idempotent."""
        for span in sequence.spans:
            last = min(until, span.last)
            if last > span.sealed:
                self._peers[span.worker].store.seal(span.span, last - span.first, epoch=sequence.epoch)
                span.sealed = last
        sequence.committed = until

    def hand_off(self, sequence: Sequence) -> None:
        """Start, or finish, moving the tail's full blocks to a shard. Never waits.

        When the shard has sealed them the tail lets go, and the next step plan reads them there. A refusal
        keeps them in the tail: the next full block tries again.
        """
        pending = self._handing_off.get(sequence.id)
        if pending is not None:
            if pending.placed.done():
                self._settle(sequence)
            return
        tail = _tail_of(sequence)
        boundary = sequence.committed // BLOCK_TOKENS * BLOCK_TOKENS
        if boundary > tail.start:
            shares = self._growth_shares(sequence, boundary)
            placed = self._helper.submit(self._move, sequence.id, sequence.epoch, tail, shares)
            self._handing_off[sequence.id] = _HandOff(shares, placed)

    def settle_all(self) -> None:
        """Wait for the hand-offs under way (they have deadlines). For shutting down, and tests."""
        for pending in list(self._handing_off.values()):
            pending.placed.exception()

    def release(self, sequence: Sequence) -> None:
        """Give back everything the sequence has, wherever it is. A shard that cannot be reached keeps its
        spans until it hears of a newer epoch, or ends."""
        pending = self._handing_off.pop(sequence.id, None)
        if pending is not None:
            pending.placed.exception()  # the tail is being read until then
        for worker in {span.worker for span in sequence.spans} | set(self._targets):
            try:
                self._peers[worker].store.drop_sequence(sequence.id, epoch=sequence.epoch)
            except FarshoreError:
                continue
        sequence.spans = []
        if sequence.tail is not None:
            sequence.tail.free()
            sequence.tail = None

    def close(self) -> None:
        self._helper.shutdown(wait=True)

    def _target_peers(self) -> list[tuple[WorkerId, Peer]]:
        return [(worker, self._peers[worker]) for worker in self._targets]

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
            raise Full(str(error), free_bytes=sum(bytes_of.values())) from None

    def _create(self, sequence: SequenceId, epoch: Epoch, share: Share) -> PlacedSpan:
        span = self._peers[share.worker].store.create(
            SpanKey(
                sequence=sequence,
                layer_class=LAYER_CLASS,
                first=share.first,
                group0=share.group0,
                group1=share.group1,
            ),
            capacity_tokens=share.last - share.first,
            layout=self._layout.of_groups(share.group1 - share.group0),
            epoch=epoch,
        )
        return PlacedSpan(
            share.worker, span, share.first, share.last, share.group0, share.group1, sealed=share.first
        )

    def _growth_shares(self, sequence: Sequence, boundary: int) -> list[Share]:
        """The tail up to ``boundary`` goes, for each head class, to whoever has least of this sequence
        and did not refuse the last time."""
        held: dict[WorkerId, int] = {room.worker: 0 for c in sequence.classes for room in c.workers}
        for span in sequence.spans:
            held[span.worker] += span.last - span.first
        start = _tail_of(sequence).start

        def rank(worker: WorkerId) -> tuple[bool, int, WorkerId]:
            return worker in sequence.refused_by, held[worker], worker

        return [
            Share(
                min((room.worker for room in c.workers), key=rank),
                start,
                boundary,
                c.group0,
                c.group1,
            )
            for c in sequence.classes
        ]

    def _move(self, sequence: SequenceId, epoch: Epoch, tail: Tail, shares: list[Share]) -> list[PlacedSpan]:
        """Runs in the helper thread. All of ``shares`` or nothing."""
        placed: list[PlacedSpan] = []
        try:
            for share in shares:
                span = self._create(sequence, epoch, share)
                placed.append(span)
                store = self._peers[share.worker].store
                k_heads = slice(
                    share.group0 * self._layout.k_heads_per_group,
                    share.group1 * self._layout.k_heads_per_group,
                )
                v_heads = slice(
                    share.group0 * self._layout.v_heads_per_group,
                    share.group1 * self._layout.v_heads_per_group,
                )
                for layer in range(self._layout.layers):
                    k, v = tail.read(layer, share.first, share.last)
                    store.write(span.span, layer, 0, k[k_heads], v[v_heads], epoch=epoch)
                store.seal(span.span, share.last - share.first, epoch=epoch)
                span.sealed = span.last
        except FarshoreError:
            for span in placed:
                self._drop(span, sequence, epoch)
            raise
        return placed

    def _drop(self, span: PlacedSpan, sequence: SequenceId, epoch: Epoch) -> None:
        try:
            self._peers[span.worker].store.drop([span.span], sequence=sequence, epoch=epoch)
        except FarshoreError:
            # Unreachable: the shard frees it with the sequence, or with itself.
            return

    def _settle(self, sequence: Sequence) -> None:
        pending = self._handing_off.pop(sequence.id)
        if isinstance(pending.placed.exception(), FarshoreError):
            sequence.refused_by |= {share.worker for share in pending.shares}
            return
        placed = pending.placed.result()
        sequence.refused_by.clear()
        sequence.spans.extend(placed)
        _tail_of(sequence).release_below(placed[0].last)


def _tail_of(sequence: Sequence) -> Tail:
    assert sequence.tail is not None, f"sequence {sequence.id} has not been placed"
    return sequence.tail
