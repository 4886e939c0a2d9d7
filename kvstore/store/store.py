"""Spans in this process's arena: the one implementation of :class:`~farshore.kvstore.base.ShardStore`.

Called by the shard process for its peers and by the engine for what it keeps itself ("everything local" is a
placement, not a mode). It must not know who asks, where its peers are, or what attention is.

How the one lock is used: it guards the table of spans and every change to a span, the copying in ``write``
included, so that no late write lands in memory that was freed or sealed meanwhile. Long work on sealed bytes
(``read``, the digest) runs without it; the span is *pinned* for as long, which puts off freeing its memory.
The arena comes back through the same lock when it is full and wants cache freed, so it is a reentrant one.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count

import torch
from torch import Tensor

from farshore.errors import Fenced, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout, Segments
from farshore.kvstore.base import Chunk, Covered, Digest, SpanInfo, SpanKey, SpanSlice, Stored, Usage
from farshore.kvstore.prefix import PrefixBlock, PrefixIndex
from farshore.kvstore.store import blocks, forms, images, report, transfer
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.holds import Holds
from farshore.kvstore.store.ranges import Ranges
from farshore.kvstore.store.span import Span, check_readable, check_sealed, check_shape
from farshore.kvstore.store.transfer import Header, Piece


class LocalStore:
    """See :class:`~farshore.kvstore.base.ShardStore` for the contract. The arena may be shared with tails.

    ``fences``: of how many sequences that hold nothing the last fence is remembered at most.
    """

    def __init__(self, *, worker: WorkerId, arena: Arena, fences: int = 65_536) -> None:
        self._worker = worker
        self._arena = arena
        self.memory = arena.memory
        self.incarnation = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._serials = count()
        self._spans: dict[SpanId, Span] = {}
        self._holds = Holds(fences=fences)
        self._names = PrefixIndex()
        with torch.inference_mode(False):  # Counted in any thread, whatever mode the store is made in.
            self.removals = torch.zeros(1, dtype=torch.int64)
        self._cached: OrderedDict[SpanId, Span] = OrderedDict()  # held by nobody, longest first
        arena.on_full(self._reclaim)

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        check_shape(key, capacity_tokens, layout)
        with self._lock:
            self._holds.admit(key.sequence, epoch)
        # Without the lock: to touch new memory may take a second.
        extents = self._arena.allocate(-(-capacity_tokens // layout.block_tokens), layout.block_bytes)
        with self._lock:
            try:
                self._holds.admit(key.sequence, epoch)
            except Fenced:
                self._arena.free(extents)
                raise
            span = SpanId(f"{self._worker}/{self.incarnation}/{next(self._serials)}")
            self._spans[span] = Span(
                key=key,
                layout=layout,
                capacity_tokens=capacity_tokens,
                epoch=epoch,
                extents=extents,
                bases=[base for extent in extents for base in extent.block_bases],
                written=[Ranges() for _ in range(layout.layers)],
            )
            self._holds.add(key.sequence, span, epoch)
        return span

    def write(
        self,
        span: SpanId,
        layer: int,
        first: int,
        k: Tensor,
        v: Tensor,
        *,
        sequence: SequenceId,
        epoch: Epoch,
    ) -> None:
        with self._lock:
            it = self._writable(span, sequence, epoch)
            last = first + forms.check_tokens(it.layout, layer, k, v)
            if not it.sealed_tokens <= first <= last <= it.capacity_tokens:
                raise InvalidRequest(
                    f"tokens {first} to {last} of {span}: write from {it.sealed_tokens} (sealed below)"
                    f" to {it.capacity_tokens} (capacity)"
                )
            blocks.copy_in(self.memory, it.layout, it.bases, layer=layer, first=first, k=k, v=v)
            it.written[layer].add(first, last)

    def seal(
        self,
        span: SpanId,
        tokens: int,
        *,
        sequence: SequenceId,
        epoch: Epoch,
        blocks: Sequence[PrefixBlock] = (),
    ) -> Digest:
        with self._lock:
            it = self._writable(span, sequence, epoch)
            self._seal(span, it, tokens)
            key, last = it.key, it.key.first + tokens
            within = [block for block in blocks if key.first <= block.first and block.last <= last]
            self._names.name(span, within, layer_class=key.layer_class, group0=key.group0, group1=key.group1)
            first = it.sealed_before
            it.pins += 1
        try:
            sealed = transfer.digest(self._pieces(it, first, tokens))
            if not first:
                it.digest = (tokens, sealed)
            return sealed
        finally:
            self._unpin(it)

    def digest(self, span: SpanId, tokens: int) -> Digest:
        with self._pinned(span) as it:
            check_sealed(span, it, 0, tokens)
            known = it.digest
            if known is None or known[0] != tokens:
                it.digest = known = (tokens, transfer.digest(self._pieces(it, 0, tokens)))
            return known[1]

    def segments(self, span: SpanId, first: int, last: int) -> Segments:
        it = self._span(span)
        check_readable(span, it, first, last)
        key = it.key
        return blocks.describe(
            it.layout, it.bases, first=first, last=last, position=key.first + first, group0=key.group0
        )

    def read(
        self,
        span: SpanId,
        layer: int,
        first: int,
        last: int,
        *,
        sequence: SequenceId,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        with self._pinned(span, holder=sequence) as it:
            check_readable(span, it, first, last)
            forms.check_layer(it.layout, layer)
            layers = range(layer, layer + 1)
            k, v = blocks.copy_out(
                self.memory, it.layout, it.bases, layers=layers, first=first, last=last, dtype=dtype
            )
            return k[0], v[0]

    def pieces(self, span: SpanId, first: int, last: int) -> Iterator[Piece]:
        """What :meth:`export` sends, for use in this process: not copied, not checksummed."""
        check_sealed(span, self._span(span), first, last)
        if first == last:
            raise InvalidRequest(f"an export of no tokens: {span} from {first} to {last}")
        return self._pinned_pieces(span, first, last)

    def export(self, span: SpanId, first: int, last: int) -> Iterator[Chunk]:
        return transfer.chunks(self.pieces(span, first, last))

    def import_span(
        self,
        chunks: Iterable[Chunk],
        *,
        sequence: SequenceId,
        epoch: Epoch,
        covers: tuple[Covered, ...] = (),
    ) -> SpanId:
        pieces = transfer.verified(chunks)
        return self.import_pieces(pieces, sequence=sequence, epoch=epoch, covers=covers)

    def import_pieces(
        self,
        pieces: Iterable[Piece],
        *,
        sequence: SequenceId,
        epoch: Epoch,
        covers: tuple[Covered, ...] = (),
    ) -> SpanId:
        """As :meth:`import_span`, of pieces that were checked or never left this process, one or more."""
        pieces = iter(pieces)
        opening = next(pieces)
        header = opening.header
        if bool(covers) != header.parity:
            raise InvalidRequest(
                f"parity={header.parity}, but {len(covers)} spans covered: say what parity covers,"
                " and of nothing else"
            )
        span = self.create(
            replace(header.key, sequence=sequence),
            capacity_tokens=header.tokens,
            layout=header.layout,
            epoch=epoch,
        )
        try:
            for piece in chain((opening,), pieces):
                with self._lock:
                    it, part = self._writable(span, sequence, epoch), piece.part
                    images.restore(self.memory, it.layout, it.bases, part, piece.image)
                    for written in it.written[part.layer0 : part.layer1]:
                        written.add(part.first, part.last)
            with self._lock:
                it = self._writable(span, sequence, epoch)
                it.covers = covers
                self._seal(span, it, header.tokens)
        except BaseException:
            self.drop([span], sequence=sequence, epoch=epoch)
            raise
        return span

    @contextmanager
    def stored_runs(
        self, span: SpanId, layer: int, first: int, last: int, *, sequence: SequenceId
    ) -> Iterator[list[int]]:
        """Where sealed tokens lie, for a transport that sends them from there: see
        :func:`farshore.kvstore.store.blocks.runs`. They stay for as long as the context lasts."""
        with self._pinned(span, holder=sequence) as it:
            check_readable(span, it, first, last)
            forms.check_layer(it.layout, layer)
            yield blocks.runs(self.memory, it.layout, it.bases, layer=layer, first=first, last=last)

    def look_up(self, span: SpanId, *, holder: SequenceId) -> Stored:
        with self._lock:
            it = self._held(span, holder)
            return Stored(it.key, it.layout)

    def find_prefix(
        self, blocks: Sequence[PrefixBlock], *, layer_class: int, sequence: SequenceId, epoch: Epoch
    ) -> list[SpanSlice]:
        with self._lock:
            self._holds.admit(sequence, epoch)
            slices = []
            for found in self._names.find(blocks, layer_class=layer_class):
                it = self._spans[found.span]
                self._hold(found.span, sequence, epoch)
                slices.append(
                    SpanSlice(
                        span=found.span, key=it.key, layout=it.layout, first=found.first, last=found.last
                    )
                )
        return slices

    def hold(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            self._holds.admit(sequence, epoch)
            for span in spans:
                self._span(span)
            for span in spans:
                self._hold(span, sequence, epoch)

    def drop(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            self._give_back(sequence, spans, epoch)

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch, keep: Collection[SpanId] = ()) -> None:
        with self._lock:
            self._give_back(sequence, (it for it in self._holds.of(sequence) if it not in keep), epoch)

    def sequences(self) -> frozenset[SequenceId]:
        with self._lock:
            return self._holds.sequences()

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            self._holds.fence(sequence, epoch)

    def announce(self) -> list[SpanInfo]:
        with self._lock:
            return report.infos(self._spans, self._holds)

    def usage(self) -> Usage:
        with self._lock:
            return report.usage(self._spans.values(), self._cached.values(), self._arena)

    def check_integrity(self) -> None:
        self._arena.check_integrity()
        with self._lock:
            self._holds.check_integrity(self._spans)
            self._names.check_integrity(self._spans)
            report.check_spans(self._spans, self._holds, self._cached, self._arena)

    def _span(self, span: SpanId) -> Span:
        try:
            return self._spans[span]
        except KeyError:
            raise NotFound(f"no span {span} on {self._worker}: dropped by its last holder?") from None

    def _held(self, span: SpanId, sequence: SequenceId) -> Span:
        it = self._span(span)
        if not self._holds.holds(sequence, span):
            raise NotFound(f"{sequence} does not hold {span}: it never did, or gave it back")
        return it

    def _writable(self, span: SpanId, sequence: SequenceId, epoch: Epoch) -> Span:
        it = self._held(span, sequence)
        if it.key.sequence != sequence:
            raise InvalidRequest(f"{span} was not granted to {sequence}: only a sequence's own spans grow")
        self._holds.admit(sequence, epoch)
        return it

    def _seal(self, span: SpanId, it: Span, tokens: int) -> None:
        """Moves the mark, in the lock."""
        if not it.sealed_tokens <= tokens <= it.capacity_tokens:
            raise InvalidRequest(
                f"{span} cannot be sealed at {tokens} tokens: the mark is at {it.sealed_tokens} and only"
                f" rises, to {it.capacity_tokens} at most"
            )
        if tokens == it.sealed_tokens:
            return
        for layer, written in enumerate(it.written):
            if not written.cover(it.sealed_tokens, tokens):
                raise InvalidRequest(f"{span} cannot be sealed at {tokens}: layer {layer} has gaps")
        for written in it.written:
            written.remove(0, tokens)
        it.sealed_before, it.sealed_tokens = it.sealed_tokens, tokens

    def _pinned_pieces(self, span: SpanId, first: int, last: int) -> Iterator[Piece]:
        with self._pinned(span) as it:
            yield from self._pieces(it, first, last)

    def _pieces(self, it: Span, first: int, last: int) -> Iterator[Piece]:
        """Of sealed tokens of a pinned span."""
        key = replace(it.key, first=it.key.first + first)
        header = Header(key=key, layout=it.layout, tokens=last - first, parity=bool(it.covers))
        for part in images.cut(it.layout, last - first):
            yield Piece(header, part, images.image(self.memory, it.layout, it.bases, part, offset=first))

    @contextmanager
    def _pinned(self, span: SpanId, *, holder: SequenceId | None = None) -> Iterator[Span]:
        """The span, whose memory is not freed inside the context even if its last holder drops it.
        ``holder``: must hold it."""
        with self._lock:
            it = self._span(span) if holder is None else self._held(span, holder)
            it.pins += 1
        try:
            yield it
        finally:
            self._unpin(it)

    def _unpin(self, it: Span) -> None:
        with self._lock:
            it.pins -= 1
            self._free_if_unused(it)

    def _hold(self, span: SpanId, sequence: SequenceId, epoch: Epoch) -> None:
        self._holds.add(sequence, span, epoch)
        self._cached.pop(span, None)

    def _give_back(self, sequence: SequenceId, spans: Iterable[SpanId], epoch: Epoch) -> None:
        held = [span for span in spans if self._holds.holds(sequence, span)]
        if not held:
            return
        unheld = self._holds.remove(sequence, held, epoch)
        self.removals += 1
        # The end of a prefix is of no use without its beginning, so it is to be evicted first.
        for span in sorted(unheld, key=lambda span: -self._spans[span].key.first):
            if self._names.redundant(span):
                self._remove(span)
            else:
                self._cached[span] = self._spans[span]

    def _reclaim(self, missing_bytes: int) -> int:
        """Called by the arena when it is full: evicts cache of ``missing_bytes`` or more. Where there is
        less, evicts nothing; returns how much there was."""
        with self._lock:
            idle = [(span, it.bytes) for span, it in self._cached.items() if not it.pins]
            total = sum(size for _, size in idle)
            if total >= missing_bytes:
                for span, size in idle:
                    if missing_bytes <= 0:
                        break
                    del self._cached[span]
                    self._remove(span)
                    missing_bytes -= size
        return total

    def _remove(self, span: SpanId) -> None:
        it = self._spans.pop(span)
        self._names.forget(span)
        it.removed = True
        self.removals += 1
        self._free_if_unused(it)

    def _free_if_unused(self, it: Span) -> None:
        if it.removed and not it.pins:
            self._arena.free(it.extents)
