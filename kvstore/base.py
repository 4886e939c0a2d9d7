"""The interface of stored KV: what a shard grants, takes in and hands out.

Called by the shard process and the engine (``workers``), and by step plans and prefill pulls
(``attention_offload``). Implemented by :class:`farshore.kvstore.store.store.LocalStore`. It must not compute
attention or know networks.

A **span** holds tokens ``[key.first, key.first + capacity)`` of one sequence, for the head groups
``[key.group0, key.group1)`` of every layer in one layer class. Tokens inside a span are counted from 0::

    0 ............ sealed_tokens ............ capacity_tokens
    | readable, never changes | writable, unreadable |

Memory is freed by holds. The sequence that creates a span holds it. When the last hold is dropped, the span
is freed at once, unless some of its blocks have prefix names that no other span has. Such a span stays as
cache until a sequence holds it again or its memory is needed::

    create ──▶ held by 1 ◀──hold, hold_prefix──▶ held by n
                   │ drop, drop_sequence: the last hold is gone
                   ├─ no names, or another span has all of them ──▶ freed
                   └─ named ──▶ cache ──hold, hold_prefix──▶ held by 1
                                  └─ least recently held, when memory is needed ──▶ freed
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NewType, Protocol

import torch
from torch import Tensor

from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout, Segments
from farshore.kernels.host import HOST
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.kvstore.prefix import PrefixBlock

Digest = NewType("Digest", str)
"""XXH3-64 of sealed bytes, in hex. It detects corruption, not malice. Equal content, token range and layout
give equal digests in every store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanKey:
    """Which KV a span holds. Not an identity: replicas of one span have equal keys."""

    sequence: SequenceId
    layer_class: int
    first: int
    """Position in the sequence of the span's first token."""
    group0: int
    """First head group ..."""
    group1: int
    """... and one past the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoveredSpan:
    """One span of a parity group. The parity includes its tokens ``[0, tokens)``, which are sealed."""

    span: SpanId
    key: SpanKey
    tokens: int
    digest: Digest
    """Digest of tokens ``[0, tokens)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanInfo:
    """A store's report on one span. Other components derive all that they know about the span from it."""

    span: SpanId
    key: SpanKey
    sealed_tokens: int
    capacity_tokens: int
    bytes: int
    """Memory granted, including the padding to whole pages."""
    epoch: Epoch
    """Epoch of the owner that created the span."""
    holders: int
    """Number of sequences that hold the span; 0 if it is cache."""
    covers: tuple[CoveredSpan, ...] = ()
    """If not empty, the span has no tokens but the parity of these spans, which may lie in any store; see
    :mod:`farshore.kvstore.store.parity`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSlice:
    """Positions ``[first, last)`` of a sequence that a span holds. The span may hold more."""

    span: SpanId
    key: SpanKey
    layout: KVLayout
    first: int
    last: int


class PrefixFound(NamedTuple):
    """What a store has of a prompt's blocks."""

    slices: list[SpanSlice]
    available_bytes: int
    """Bytes that the store can grant now: see :attr:`Usage.available_bytes`."""


class SpanShape(NamedTuple):
    """The key and layout that a read of a span is checked against."""

    key: SpanKey
    layout: KVLayout
    """Layout of the key's groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportChunk:
    """A piece of an export, as bytes for any transport; see :mod:`farshore.kvstore.store.transfer`."""

    header: bytes
    """The export and the range that the payload is of: some 100 bytes."""
    payload: bytes | memoryview
    """At most 1 MiB, or one layer of one block where that is more."""
    checksum: int
    """XXH3-64 of the header and the payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Memory of a store. ``budget - granted - free`` bytes are in use by others in the same arena: tails, and
    removed spans that calls still read."""

    budget_bytes: int
    granted_bytes: int
    sealed_bytes: int
    """Payload below the sealed marks, without padding."""
    free_bytes: int
    cached_bytes: int
    """Bytes of ``granted_bytes`` in spans without holds, which are freed when memory is needed."""
    committed_bytes: int
    """Upper bound of the memory that the machine has committed to the arena: what was written of the grants,
    to the store or to others, and freed memory that is kept warm."""

    @property
    def available_bytes(self) -> int:
        """Bytes that can be granted now: free memory and cache."""
        return self.free_bytes + self.cached_bytes


class Removals:
    """A count for :meth:`ShardStore.watch`, which native code reads by its address. The store only adds."""

    __slots__ = ("__weakref__", "count")

    def __init__(self) -> None:
        with torch.inference_mode(False):  # Any thread may count, whatever mode this is made in.
            self.count = torch.zeros(1, dtype=torch.int64, device=HOST)
            """i64[1]."""


class ShardStore(Protocol):
    """Spans in one worker's memory. The store is the only authority on that memory: it grants or refuses.

    Thread-safe: every call may run during every other. Changes are serialised by one lock. ``segments`` and
    the copying in ``read`` run without it, since sealed KV does not change. A caller that reads memory
    through ``segments`` must keep a hold meanwhile: after the last ``drop`` the memory may be granted again.

    Every call on a span raises NotFound if the span is unknown or already freed. Calls that take an ``epoch``
    raise Fenced if a newer one has been seen. Nothing survives the process: a crash frees all spans.
    """

    @property
    def memory(self) -> Tensor:
        """u8[budget]: the arena that ``Segments.base`` counts from. Only the store writes to it."""
        ...

    @property
    def runtime(self) -> DeviceRuntime | None:
        """Of the memory's device; None for host memory. What the store has written and sealed is done: work
        in any stream sees it."""
        ...

    def watch(self, removals: "Removals", sequences: Collection[SequenceId]) -> None:
        """From now on counts in ``removals`` how often one of ``sequences`` gives back holds, and nothing
        else. Answers of :meth:`look_up` and :meth:`segments` for a holder among them stay valid until the
        count changes; it changes before the memory is granted again. Ends when the caller forgets
        ``removals``. Other sequences, which may be another engine's, cause no change."""

    @property
    def incarnation(self) -> str:
        """Random id of this store. Span ids contain it, so no two stores share a span id, even under one
        worker id."""
        ...

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        """Grants memory for a new span, held by ``key.sequence``. Evicts cache as far as needed. Raises Full,
        and evicts nothing, if held memory leaves too little.

        ``layout`` must be narrowed to the key's groups already; otherwise InvalidRequest. Not idempotent:
        each call grants another span. A caller that lost the reply finds the span by ``announce``, or gives
        everything back by ``drop_sequence``.
        """
        ...

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
        """Copies n tokens of one layer into the span, from its token ``first`` on. Unsealed tokens may be
        written again.

        k ``[k_heads, n, k_dim]``, v ``[v_heads, n, v_dim]``: the heads of the span's groups, with any
        strides. Their dtype is the format's, or any float dtype if the format is quantised, or uint8 for
        bytes as stored: see :mod:`farshore.kvstore.store.layout.forms`. InvalidRequest below the sealed mark,
        beyond the capacity, or for other shapes. Only the sequence of the span's key may write and seal, and
        only while it holds the span: NotFound for a sequence that does not hold it, InvalidRequest for
        another holder.
        """
        ...

    def seal(
        self,
        span: SpanId,
        tokens: int,
        *,
        sequence: SequenceId,
        epoch: Epoch,
        blocks: Sequence[PrefixBlock] = (),
    ) -> Digest:
        """Makes tokens ``[0, tokens)`` readable and final. Returns the digest of the tokens that this call
        sealed.

        ``blocks``: any blocks of the sequence's hash chain. Those that lie wholly within ``[0, tokens)`` can
        be found by :meth:`find_prefix` from now on.

        InvalidRequest unless every layer has been written completely below ``tokens``, and for a mark below
        the present one. Idempotent: sealing the same length again returns the same digest.
        """
        ...

    def digest(self, span: SpanId, tokens: int) -> Digest:
        """Digest of tokens ``[0, tokens)``. Immediate if one call sealed exactly these, or if it was computed
        before; otherwise the tokens are read. InvalidRequest beyond the sealed mark."""
        ...

    def look_up(self, span: SpanId, *, holder: SequenceId) -> SpanShape:
        """The span's key and layout. NotFound if ``holder`` does not hold it."""
        ...

    def segments(self, span: SpanId, first: int, last: int) -> Segments:
        """Locates tokens ``[first, last)`` of the span in ``memory``, without a copy, in token order.

        One segment per contiguous run of blocks; positions are absolute (``key.first + i``). InvalidRequest
        beyond the sealed mark.
        """
        ...

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
        """Copies of tokens ``[first, last)`` for a bulk pull: k ``[k_heads, n, k_dim]``, v
        ``[v_heads, n, v_dim]``, n = last - first. NotFound unless ``sequence`` holds the span.

        ``dtype``: the format's by default, or float32 if the format is quantised; uint8 for the bytes as
        stored (see :mod:`farshore.kvstore.store.layout.forms`). InvalidRequest beyond the sealed mark. A
        ``drop`` during the call does not free the memory before the copy is done.
        """
        ...

    def export(self, span: SpanId, first: int, last: int) -> Iterator[ExportChunk]:
        """Tokens ``[first, last)`` of all layers as checksummed chunks. One chunk is in memory at a time.

        InvalidRequest beyond the sealed mark, and for an empty range. The span is not freed before the
        iterator is exhausted, closed or deleted.
        """
        ...

    def import_span(
        self,
        chunks: Iterable[ExportChunk],
        *,
        sequence: SequenceId,
        epoch: Epoch,
        covers: tuple[CoveredSpan, ...] = (),
    ) -> SpanId:
        """Creates a sealed span with the tokens of an export. ``sequence`` holds it, whichever sequence held
        the exported span. ``covers``: given if the export is of parity, and only then (InvalidRequest).

        Raises Full if the memory is not granted, and Corrupt, naming the chunk, if one is damaged, missing or
        out of order. After any exception, also from ``chunks``, nothing is kept. No call can read the span
        before it is complete. Not idempotent, like :meth:`create`.
        """
        ...

    def find_prefix(self, names: Sequence[bytes], *, layer_class: int) -> PrefixFound:
        """Locates stored blocks by their names, which are given in the order of a prompt's chain.

        A hint: nothing is held, so the spans may be freed at any time, and nothing is compared, so the blocks
        may be of other tokens. :meth:`hold_prefix` decides. No (position, head group) and no span appears
        twice. There may be gaps, since other stores may hold those positions or heads.
        """
        ...

    def hold_prefix(
        self, blocks: Sequence[PrefixBlock], *, layer_class: int, sequence: SequenceId, epoch: Epoch
    ) -> PrefixFound:
        """Finds the stored KV of ``blocks`` and compares their tokens. ``sequence`` holds the span of each
        slice from now on.

        The slices are as those of :meth:`find_prefix`. Blocks that are gone are left out; a block that is
        stored with other tokens ends the search. The caller joins the answers of all stores and drops what it
        does not use. Idempotent.
        """
        ...

    def hold(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        """Adds a hold of ``sequence`` on each span, as a fork does; on none of them if this raises.
        Idempotent."""
        ...

    def drop(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        """Gives back the sequence's holds on ``spans`` that are of ``epoch`` or older. Idempotent: spans that
        it does not hold, or that are gone, are skipped."""
        ...

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        """Gives back all of the sequence's holds that are of ``epoch`` or older: on spans that it created,
        that it shares, and that it found. Idempotent. ``LocalStore`` also takes ``keep``: spans that the
        sequence goes on holding."""
        ...

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        """From now on the sequence's calls with an older epoch raise Fenced, except those that give back
        holds. Idempotent; a fence is never lowered.

        Sealed KV stays readable. The number of fences is bounded: of the sequences that hold nothing here,
        only the most recently fenced are remembered. An old owner of a forgotten sequence could be granted a
        new, useless span, which costs memory until it is dropped, but never a wrong token.
        """
        ...

    def announce(self) -> list[SpanInfo]:
        """All spans, at one moment."""
        ...

    def usage(self) -> Usage:
        """The store's memory, at one moment."""
        ...

    def check_integrity(self) -> None:
        """AssertionError unless free + held = total and every byte has one owner at most."""
        ...
