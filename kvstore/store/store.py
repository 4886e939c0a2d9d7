"""Spans in this process's arena: the implementation of :class:`~farshore.kvstore.base.ShardStore`.

Called by the shard process for its engines, and by the engine for KV that it keeps itself (a worker that
keeps everything is a placement, not a mode). It must not know its callers, other shards, or attention.

One lock guards the table of spans and every change to a span, including the copying in ``write``, so that no
late write reaches memory that was freed or sealed meanwhile. Long work on sealed KV (``read``, digests) runs
without the lock; the span is *pinned* meanwhile, so its memory is not freed. The lock is reentrant: a full
arena calls back to evict cache, possibly under the lock.
"""

import secrets
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count

import torch
from torch import Tensor

from farshore.errors import Fenced, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout, Segments
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.kvstore.base import (
    CoveredSpan,
    Digest,
    ExportChunk,
    PrefixFound,
    Removals,
    SpanInfo,
    SpanKey,
    SpanShape,
    SpanSlice,
    Usage,
)
from farshore.kvstore.prefix import NameLog, PrefixBlock, PrefixIndex, PrefixMatch
from farshore.kvstore.store import report, transfer
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.cached import CachedSpans
from farshore.kvstore.store.holds import HoldTable
from farshore.kvstore.store.layout import blocks, forms
from farshore.kvstore.store.layout.memory import kv_memory
from farshore.kvstore.store.span import SpanRecord, check_readable, check_sealed, check_shape, check_unsealed
from farshore.kvstore.store.transfer import ChunkImage


class LocalStore:
    """See :class:`~farshore.kvstore.base.ShardStore` for the contract. The arena may be shared with tails.

    ``fences``: the number of fences that are remembered of sequences without holds. ``runtime``: of the
    arena's device; None: a new one for a GPU, and none for host memory.
    """

    def __init__(
        self,
        *,
        worker: WorkerId,
        arena: Arena,
        fences: int = 65_536,
        runtime: DeviceRuntime | None = None,
    ) -> None:
        self._worker = worker
        self._arena = arena
        self.memory = arena.memory
        self._kv = kv_memory(arena.memory, runtime)
        self.runtime = self._kv.runtime
        self.incarnation = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._serials = count()
        self._spans: dict[SpanId, SpanRecord] = {}
        self._holds = HoldTable(fences=fences)
        self._names = PrefixIndex()
        self._cached = CachedSpans()
        arena.on_full(self._reclaim)

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        check_shape(key, capacity_tokens, layout)
        with self._lock:
            self._holds.admit(key.sequence, epoch)
        # Memory is committed by writes: a long prompt's takes seconds, and the prompt may be cancelled.
        count = -(-capacity_tokens // layout.block_tokens)
        extents = self._arena.allocate(count, layout.block_bytes, commit=False)
        with self._lock:
            try:
                self._holds.admit(key.sequence, epoch)
            except Fenced:
                self._arena.free(extents)
                raise
            span = SpanId(f"{self._worker}/{self.incarnation}/{next(self._serials)}")
            self._spans[span] = SpanRecord(
                key=key,
                layout=layout,
                capacity_tokens=capacity_tokens,
                epoch=epoch,
                extents=extents,
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
        while True:
            with self._lock:
                record = self._writable(span, sequence, epoch)
                last = first + forms.check_tokens(record.layout, layer, k, v)
                check_unsealed(span, record, first, last)
                if record.is_committed(last):
                    return record.write(self._kv, layer, first, k, v)
            record.commit(self._arena, last)  # without the lock: it may take long

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
            record = self._writable(span, sequence, epoch)
            record.seal(span, tokens)
            key, last = record.key, record.key.first + tokens
            within = [block for block in blocks if key.first <= block.first and block.last <= last]
            self._names.name(span, within, layer_class=key.layer_class, group0=key.group0, group1=key.group1)
            first = record.sealed_before
            record.pins += 1
        try:
            sealed = transfer.digest(record.images(self._kv, first, tokens))
            if not first:
                record.digest = (tokens, sealed)
            return sealed
        finally:
            self._unpin(record)

    def digest(self, span: SpanId, tokens: int) -> Digest:
        with self._pinned(span) as record:
            check_sealed(span, record, 0, tokens)
            known = record.digest
            if known is None or known[0] != tokens:
                record.digest = known = (tokens, transfer.digest(record.images(self._kv, 0, tokens)))
            return known[1]

    def sealed(self, span: SpanId, *, holder: SequenceId) -> tuple[int, list[PrefixBlock]]:
        """(number of sealed tokens, the named ones of their blocks). NotFound unless ``holder`` holds it."""
        with self._lock:
            return self._checked_hold(span, holder).sealed_tokens, self._names.names_of(span)

    def segments(self, span: SpanId, first: int, last: int) -> Segments:
        record = self._span(span)
        check_readable(span, record, first, last)
        key = record.key
        return blocks.to_segments(
            record.layout, record.bases, first=first, last=last, position=key.first + first, group0=key.group0
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
        with self._pinned(span, holder=sequence) as record:
            check_readable(span, record, first, last)
            forms.check_layer(record.layout, layer)
            return record.read(self._kv, layer, first, last, dtype)

    def chunk_images(self, span: SpanId, first: int, last: int) -> Iterator[ChunkImage]:
        """Like :meth:`export`, for use in this process: neither copied nor checksummed."""
        check_sealed(span, self._span(span), first, last)
        if first == last:
            raise InvalidRequest(f"an export of no tokens: {span} from {first} to {last}")
        return self._pinned_images(span, first, last)

    def export(self, span: SpanId, first: int, last: int) -> Iterator[ExportChunk]:
        return transfer.to_chunks(self.chunk_images(span, first, last))

    def import_span(
        self,
        chunks: Iterable[ExportChunk],
        *,
        sequence: SequenceId,
        epoch: Epoch,
        covers: tuple[CoveredSpan, ...] = (),
    ) -> SpanId:
        images = transfer.verified_images(chunks)
        return self.import_images(images, sequence=sequence, epoch=epoch, covers=covers)

    def import_images(
        self,
        images: Iterable[ChunkImage],
        *,
        sequence: SequenceId,
        epoch: Epoch,
        covers: tuple[CoveredSpan, ...] = (),
    ) -> SpanId:
        """Like :meth:`import_span`, for one or more images that were verified or never left this process."""
        images_left = iter(images)
        opening = next(images_left)
        header = opening.header
        header.check_covers(covers)
        span = self.create(
            replace(header.key, sequence=sequence),
            capacity_tokens=header.tokens,
            layout=header.layout,
            epoch=epoch,
        )
        try:
            for _, chunk, image in chain((opening,), images_left):
                with self._pinned(span, holder=sequence) as record:
                    record.commit(self._arena, chunk.last)  # without the lock: it may take long
                    with self._lock:
                        self._writable(span, sequence, epoch).write_image(self._kv, chunk, image)
            with self._lock:
                record = self._writable(span, sequence, epoch)
                record.covers = covers
                record.seal(span, header.tokens)
        except BaseException:
            self.drop([span], sequence=sequence, epoch=epoch)
            raise
        return span

    @contextmanager
    def stored_runs(
        self, span: SpanId, layer: int, first: int, last: int, *, sequence: SequenceId
    ) -> Iterator[list[int]]:
        """Locates sealed tokens as stored, in host memory: see :meth:`KVMemory.runs`. The memory is not freed
        inside the context. NotFound unless ``sequence`` holds the span."""
        with self._pinned(span, holder=sequence) as record:
            check_readable(span, record, first, last)
            forms.check_layer(record.layout, layer)
            yield from record.runs(self._kv, layer, first, last)

    def look_up(self, span: SpanId, *, holder: SequenceId) -> SpanShape:
        with self._lock:
            record = self._checked_hold(span, holder)
            return SpanShape(record.key, record.layout)

    def watch(self, removals: Removals, sequences: Collection[SequenceId]) -> None:
        with self._lock:
            self._holds.watch(removals, sequences)

    @property
    def names(self) -> NameLog:
        """The names of the blocks that :meth:`find_prefix` finds, and their changes."""
        return self._names.log

    def find_prefix(self, names: Sequence[bytes], *, layer_class: int) -> PrefixFound:
        with self._lock:
            return self._found(self._names.locate(names, layer_class=layer_class))

    def hold_prefix(
        self, blocks: Sequence[PrefixBlock], *, layer_class: int, sequence: SequenceId, epoch: Epoch
    ) -> PrefixFound:
        with self._lock:
            self._holds.admit(sequence, epoch)
            matches = self._names.find(blocks, layer_class=layer_class)
            for match in matches:
                self._hold(match.span, sequence, epoch)
            return self._found(matches)

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
            self._give_back(sequence, (span for span in self._holds.of(sequence) if span not in keep), epoch)

    def sequences(self) -> frozenset[SequenceId]:
        """The sequences that hold a span."""
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
            return report.usage(self._spans.values(), self._cached, self._arena)

    def check_integrity(self) -> None:
        self._arena.check_integrity()
        with self._lock:
            self._holds.check_integrity(self._spans)
            self._names.check_integrity(self._spans)
            report.check_spans(self._spans, self._holds, self._cached, self._arena)

    def _found(self, matches: Iterable[PrefixMatch]) -> PrefixFound:
        slices = []
        for span, first, last in matches:
            record = self._spans[span]
            slices.append(SpanSlice(span=span, key=record.key, layout=record.layout, first=first, last=last))
        return PrefixFound(slices, self._arena.free_bytes + self._cached.bytes)

    def _span(self, span: SpanId) -> SpanRecord:
        try:
            return self._spans[span]
        except KeyError:
            raise NotFound(f"no span {span} on {self._worker}: dropped by its last holder?") from None

    def _checked_hold(self, span: SpanId, sequence: SequenceId) -> SpanRecord:
        record = self._span(span)
        if not self._holds.has(sequence, span):
            raise NotFound(f"{sequence} does not hold {span}: it never did, or gave it back")
        return record

    def _writable(self, span: SpanId, sequence: SequenceId, epoch: Epoch) -> SpanRecord:
        """The span's record, if ``sequence`` may write it: it created the span and holds it."""
        record = self._checked_hold(span, sequence)
        if record.key.sequence != sequence:
            raise InvalidRequest(f"{span} was not granted to {sequence}: only a sequence's own spans grow")
        self._holds.admit(sequence, epoch)
        return record

    def _pinned_images(self, span: SpanId, first: int, last: int) -> Iterator[ChunkImage]:
        with self._pinned(span) as record:
            yield from record.images(self._kv, first, last)

    @contextmanager
    def _pinned(self, span: SpanId, *, holder: SequenceId | None = None) -> Iterator[SpanRecord]:
        """A context in which the span's memory is not freed, even if its last hold is dropped. NotFound
        unless ``holder``, if given, holds the span."""
        with self._lock:
            record = self._span(span) if holder is None else self._checked_hold(span, holder)
            record.pins += 1
        try:
            yield record
        finally:
            self._unpin(record)

    def _unpin(self, record: SpanRecord) -> None:
        with self._lock:
            record.pins -= 1
            self._free_if_unused(record)

    def _hold(self, span: SpanId, sequence: SequenceId, epoch: Epoch) -> None:
        self._holds.add(sequence, span, epoch)
        self._cached.discard(span)

    def _give_back(self, sequence: SequenceId, spans: Iterable[SpanId], epoch: Epoch) -> None:
        held = [span for span in spans if self._holds.has(sequence, span)]
        if not held:
            return
        unheld = self._holds.remove(sequence, held, epoch)
        # The end of a prefix is useless without its beginning, so it is evicted first.
        for span in sorted(unheld, key=lambda span: -self._spans[span].key.first):
            if self._names.redundant(span):
                self._remove(span)
            else:
                self._cached.add(span, self._spans[span])

    def _reclaim(self, missing_bytes: int) -> int:
        """Called by the arena when it is full. Evicts ``missing_bytes`` of cache or more, or nothing if there
        is less. Returns how many bytes of cache there were."""
        with self._lock:
            evicted, cached_bytes = self._cached.evictable(missing_bytes)
            for span in evicted:
                self._cached.discard(span)
                self._remove(span)
        return cached_bytes

    def _remove(self, span: SpanId) -> None:
        record = self._spans.pop(span)
        self._names.forget(span)
        record.removed = True
        self._free_if_unused(record)

    def _free_if_unused(self, record: SpanRecord) -> None:
        if record.removed and not record.pins:
            self._arena.free(record.extents)
