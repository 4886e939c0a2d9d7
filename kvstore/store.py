"""Spans in this process's arena: the one implementation of :class:`~farshore.kvstore.base.ShardStore`.

Called by the shard process for its peers and by the engine for what it keeps itself ("everything local" is a
placement, not a mode). It must not know who asks, where its peers are, or what attention is.

How the one lock is used: it guards the table of spans and every change to a span, the copying in ``write``
included, so that no late write lands in memory that was freed or sealed meanwhile. Long work on sealed bytes
(``read``, the digest) runs without it; the span is *pinned* for as long, which puts off freeing its memory.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from farshore.errors import Fenced, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout, Segments
from farshore.kvstore import blocks, forms
from farshore.kvstore.arena import Arena, Extent
from farshore.kvstore.base import Digest, SpanInfo, SpanKey, Usage
from farshore.kvstore.ranges import Ranges


@dataclass(slots=True, kw_only=True, eq=False)
class _Span:
    key: SpanKey
    layout: KVLayout
    capacity_tokens: int
    epoch: Epoch
    """Of creation."""
    newest: Epoch
    """Newest seen on this span: older ones may not change it."""
    extents: list[Extent]
    bases: list[int]
    written: list[Ranges]
    """Per layer, the tokens at or above the sealed mark that were written (below it: all)."""
    sealed_tokens: int = 0
    sealed_before: int = 0
    """The mark before the last seal: the last digest is of [sealed_before, sealed_tokens)."""
    holders: int = 1
    owned: bool = True
    """Whether the sequence's own hold was not yet given back by drop_sequence."""
    pins: int = 0
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(extent.bytes for extent in self.extents)


class LocalStore:
    """See :class:`~farshore.kvstore.base.ShardStore` for the contract. The arena may be shared with tails.

    ``fences``: of how many sequences without spans the last fence is remembered at most.
    """

    def __init__(self, *, worker: WorkerId, arena: Arena, fences: int = 65_536) -> None:
        self._worker = worker
        self._arena = arena
        self._fence_limit = fences
        self._lock = threading.Lock()
        self._serials = count()
        self._spans: dict[SpanId, _Span] = {}
        self._fences: OrderedDict[SequenceId, Epoch] = OrderedDict()

    @property
    def memory(self) -> Tensor:
        return self._arena.memory

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        _check_shape(key, capacity_tokens, layout)
        with self._lock:
            newest = max(
                (s.newest for s in self._spans.values() if s.key.sequence == key.sequence),
                default=epoch,
            )
            _check_epoch(key.sequence, epoch, max(newest, self._fences.get(key.sequence, epoch)))
            extents = self._arena.allocate(-(-capacity_tokens // layout.block_tokens), layout.block_bytes)
            span = SpanId(f"{self._worker}/{next(self._serials)}")
            self._spans[span] = _Span(
                key=key,
                layout=layout,
                capacity_tokens=capacity_tokens,
                epoch=epoch,
                newest=epoch,
                extents=extents,
                bases=[base for extent in extents for base in extent.block_bases],
                written=[Ranges() for _ in range(layout.layers)],
            )
        return span

    def write(self, span: SpanId, layer: int, first: int, k: Tensor, v: Tensor, *, epoch: Epoch) -> None:
        with self._lock:
            it = self._writable(span, epoch)
            last = first + forms.check_tokens(it.layout, layer, k, v)
            if not it.sealed_tokens <= first <= last <= it.capacity_tokens:
                raise InvalidRequest(
                    f"tokens {first} to {last} of {span}: write from {it.sealed_tokens} (sealed below)"
                    f" to {it.capacity_tokens} (capacity)"
                )
            blocks.copy_in(self.memory, it.layout, it.bases, layer=layer, first=first, k=k, v=v)
            it.written[layer].add(first, last)

    def seal(self, span: SpanId, tokens: int, *, epoch: Epoch) -> Digest:
        with self._lock:
            it = self._writable(span, epoch)
            if not it.sealed_tokens <= tokens <= it.capacity_tokens:
                raise InvalidRequest(
                    f"{span} cannot be sealed at {tokens} tokens: the mark is at {it.sealed_tokens} and only"
                    f" rises, to {it.capacity_tokens} at most"
                )
            if tokens > it.sealed_tokens:
                for layer, written in enumerate(it.written):
                    if not written.cover(it.sealed_tokens, tokens):
                        raise InvalidRequest(f"{span} cannot be sealed at {tokens}: layer {layer} has gaps")
                for written in it.written:
                    written.remove_below(tokens)
                it.sealed_before, it.sealed_tokens = it.sealed_tokens, tokens
            first = it.sealed_before
            it.pins += 1
        try:
            return self._digest(it, first, tokens)
        finally:
            self._unpin(it)

    def segments(self, span: SpanId, first: int, last: int) -> Segments:
        it = self._span(span)
        _check_sealed(span, it, first, last)
        key = it.key
        return blocks.describe(
            it.layout, it.bases, first=first, last=last, position=key.first + first, group0=key.group0
        )

    def read(
        self, span: SpanId, layer: int, first: int, last: int, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        with self._pinned(span) as it:
            _check_sealed(span, it, first, last)
            forms.check_layer(it.layout, layer)
            layers = range(layer, layer + 1)
            k, v = blocks.copy_out(
                self.memory, it.layout, it.bases, layers=layers, first=first, last=last, dtype=dtype
            )
            return k[0], v[0]

    def layout(self, span: SpanId) -> KVLayout:
        """The shape of one span's blocks: what a transport needs to give raw bytes their shape."""
        with self._lock:
            return self._span(span).layout

    def hold(self, span: SpanId) -> None:
        with self._lock:
            self._span(span).holders += 1

    def drop(self, span: SpanId) -> None:
        with self._lock:
            self._release(span)

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        with self._lock:
            for span, it in list(self._spans.items()):
                if it.key.sequence == sequence and it.epoch <= epoch and it.owned:
                    it.owned = False
                    self._release(span)

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            self._fences[sequence] = max(epoch, self._fences.get(sequence, epoch))
            self._fences.move_to_end(sequence)
            for it in self._spans.values():
                if it.key.sequence == sequence:
                    it.newest = max(it.newest, epoch)
            while len(self._fences) > self._fence_limit:
                self._fences.popitem(last=False)

    def announce(self) -> list[SpanInfo]:
        with self._lock:
            return [
                SpanInfo(
                    span=span,
                    key=it.key,
                    sealed_tokens=it.sealed_tokens,
                    capacity_tokens=it.capacity_tokens,
                    bytes=it.bytes,
                    epoch=it.epoch,
                    holders=it.holders,
                )
                for span, it in self._spans.items()
            ]

    def usage(self) -> Usage:
        with self._lock:
            spans = self._spans.values()
            return Usage(
                budget_bytes=self._arena.budget_bytes,
                granted_bytes=sum(it.bytes for it in spans),
                sealed_bytes=sum(it.sealed_tokens * it.layout.token_bytes for it in spans),
                free_bytes=self._arena.free_bytes,
            )

    def check_integrity(self) -> None:
        self._arena.check_integrity()
        with self._lock:
            owned: set[int] = set()
            for span, it in self._spans.items():
                assert it.holders > 0 and it.pins >= 0, f"{span}: {it.holders} holders, {it.pins} pins"
                assert it.sealed_before <= it.sealed_tokens <= it.capacity_tokens, f"{span}: marks"
                assert len(it.bases) * it.layout.block_tokens >= it.capacity_tokens, f"{span}: too few blocks"
                assert not owned.intersection(it.bases), f"{span} shares blocks with another span"
                owned.update(it.bases)
                for extent in it.extents:
                    held = all(self._arena.holds(base, extent.stride) for base in extent.block_bases)
                    assert held, f"{span} has {extent}, which the arena has not granted"

    def _span(self, span: SpanId) -> _Span:
        try:
            return self._spans[span]
        except KeyError:
            raise NotFound(f"no span {span} on {self._worker}: dropped by its last holder?") from None

    def _writable(self, span: SpanId, epoch: Epoch) -> _Span:
        it = self._span(span)
        _check_epoch(it.key.sequence, epoch, it.newest)
        it.newest = epoch
        return it

    @contextmanager
    def _pinned(self, span: SpanId) -> Iterator[_Span]:
        """The span, whose memory is not freed inside the context whoever drops it."""
        with self._lock:
            it = self._span(span)
            it.pins += 1
        try:
            yield it
        finally:
            self._unpin(it)

    def _unpin(self, it: _Span) -> None:
        with self._lock:
            it.pins -= 1
            self._free_if_unused(it)

    def _release(self, span: SpanId) -> None:
        it = self._span(span)
        it.holders -= 1
        if not it.holders:
            del self._spans[span]
            self._free_if_unused(it)

    def _free_if_unused(self, it: _Span) -> None:
        if not it.holders and not it.pins:
            self._arena.free(it.extents)

    def _digest(self, it: _Span, first: int, last: int) -> Digest:
        """Of tokens [first, last): layer by layer, K then V, head-major; so not of where the blocks lie."""
        digest = hashlib.blake2b(digest_size=16)
        for layer in range(it.layout.layers):
            layers = range(layer, layer + 1)
            for at in range(first, last, it.layout.block_tokens):
                end = min(at + it.layout.block_tokens, last)
                for stored in blocks.copy_out(
                    self.memory, it.layout, it.bases, layers=layers, first=at, last=end, dtype=torch.uint8
                ):
                    digest.update(forms.as_bytes(stored))
        return Digest(digest.hexdigest())


def _check_shape(key: SpanKey, capacity_tokens: int, layout: KVLayout) -> None:
    forms.check_layout(layout)
    # The upper bounds are those of the integers in Segments.
    if key.first < 0 or capacity_tokens < 1 or key.first + capacity_tokens > 2**31 - 1:
        raise InvalidRequest(
            f"{capacity_tokens} tokens from {key.first}: ask for 1 or more, within [0, 2^31 - 1)"
        )
    if not 0 <= key.group0 < key.group1 < 2**15:
        raise InvalidRequest(f"groups {key.group0} to {key.group1}: give 0 <= group0 < group1 < 2^15")
    if layout.groups != key.group1 - key.group0:
        raise InvalidRequest(
            f"layout of {layout.groups} groups, key of {key.group1 - key.group0}: narrow it with of_groups"
        )


def _check_epoch(sequence: SequenceId, epoch: Epoch, newest: Epoch) -> None:
    if epoch < newest:
        raise Fenced(f"epoch {epoch} of {sequence} is over: {newest} owns it")


def _check_sealed(span: SpanId, it: _Span, first: int, last: int) -> None:
    if not 0 <= first <= last <= it.sealed_tokens:
        raise InvalidRequest(f"tokens {first} to {last} of {span}: sealed are 0 to {it.sealed_tokens}")
