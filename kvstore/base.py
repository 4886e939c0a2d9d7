"""The interface of stored KV: what a shard grants, takes in and hands out.

Callers: the shard process and the engine (floor 3), step plans and prefill pulls (floor 2). Behind it stands
:class:`farshore.kvstore.store.store.LocalStore`. Nothing here computes attention or knows networks.

A **span** holds tokens ``[key.first, key.first + capacity)`` of one sequence, for head groups
``[key.group0, key.group1)`` of every layer in one layer class. Inside it tokens are counted from 0, and::

    0 ............ sealed_tokens ............ capacity_tokens
    | readable, never changes | may be written, unreadable |

Who frees what: sequences hold spans, the one that created it first of all. What nobody holds is freed at
once, or, if blocks of it have names, kept as cache until somebody finds it again or needs the room::

    create ──▶ held by 1 ◀──hold, find_prefix──▶ held by n
                   │ drop, drop_sequence: nobody left
                   ├─ no names, or all named elsewhere too ──▶ freed
                   └─ named ──▶ cache ──hold, find_prefix──▶ held by 1
                                  └─ least recently held, when memory is needed ──▶ freed
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NewType, Protocol

import torch
from torch import Tensor

from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout, Segments
from farshore.kvstore.prefix import PrefixBlock

Digest = NewType("Digest", str)
"""Fingerprint of sealed bytes, XXH3-64 in hex: tells corruption, not malice. Equal content, range and layout
give equal digests on every store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanKey:
    """What a span holds. Not an identity: replicas of one span share a key."""

    sequence: SequenceId
    layer_class: int
    first: int
    """Position in the sequence of the span's first token."""
    group0: int
    """First head group ..."""
    group1: int
    """... and one past the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """One span of a parity group: of its tokens ``[0, tokens)``, which never change, parity was taken."""

    span: SpanId
    key: SpanKey
    tokens: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanInfo:
    """What a store says about one span; everything else known about it elsewhere is derived from this."""

    span: SpanId
    key: SpanKey
    sealed_tokens: int
    capacity_tokens: int
    bytes: int
    """Memory granted, padding to whole pages included."""
    epoch: Epoch
    """Of the owner that created it."""
    holders: int
    """Sequences that hold it; 0: it is cache."""
    covers: tuple[Covered, ...] = ()
    """Not tokens but the parity of these, which lie anywhere; see :mod:`farshore.kvstore.store.parity`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSlice:
    """Positions ``first .. last`` of the sequence, found in a span; it may hold more than these."""

    span: SpanId
    key: SpanKey
    layout: KVLayout
    first: int
    last: int


class Stored(NamedTuple):
    """What a reader of a span has to agree with."""

    key: SpanKey
    layout: KVLayout
    """Of the key's groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of an export, as bytes for any transport; see :mod:`farshore.kvstore.store.transfer`."""

    header: bytes
    """What it is of: some 100 bytes."""
    payload: bytes | memoryview
    """About 1 MiB at most, or one layer of a block where that is more."""
    checksum: int
    """XXH3-64 of the header and the payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """``budget - granted - free`` is held by others in the same arena (tails, spans still being read)."""

    budget_bytes: int
    granted_bytes: int
    sealed_bytes: int
    """Payload below the sealed marks, without padding."""
    free_bytes: int
    cached_bytes: int
    """Of ``granted_bytes``: what nobody holds, and goes when memory is needed."""
    committed_bytes: int
    """What the machine pays for, at most: what is granted, to whomever, and freed memory kept warm."""

    @property
    def available_bytes(self) -> int:
        """What can be had: free, or cache."""
        return self.free_bytes + self.cached_bytes


class ShardStore(Protocol):
    """Spans in one worker's memory. The store is the only authority on it: it grants or refuses.

    Thread-safe: every call may run during every other. Changes take turns behind one lock; ``segments`` and
    the copying in ``read`` do not, since what is sealed does not change. Who reads *through* ``segments``
    must keep a hold for as long: after the last ``drop`` the bytes belong to somebody else.

    Every call on a span raises NotFound where the span is unknown or already freed. Calls that take an
    ``epoch`` raise Fenced when a newer one has been seen. Nothing survives the process: a crash frees all.
    """

    @property
    def memory(self) -> Tensor:
        """u8[budget]: the arena that ``Segments.base`` counts from. Read it; only the store writes it."""
        ...

    @property
    def removals(self) -> Tensor:
        """i64[1]: how many times a hold was given back or a span went, so far. What :meth:`look_up` and
        :meth:`segments` told holds until it changes; it changes before memory is granted again."""

    @property
    def incarnation(self) -> str:
        """Random, of this store: no other one's spans have the same ids, whatever its worker's id is."""
        ...

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        """Grants memory for a new span, held by ``key.sequence``. Evicts cache as far as needed; raises Full
        (and evicts nothing) where what is held leaves too little.

        ``layout`` is already narrowed to the key's groups; else InvalidRequest. Not idempotent: each call
        grants anew. A caller that lost the reply finds the span by ``announce``, or gives everything back by
        ``drop_sequence``.
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
        """Copies n tokens of one layer in, at token ``first`` of the span; repeating or overwriting is fine.

        k ``[k_heads, n, k_dim]``, v ``[v_heads, n, v_dim]``: heads of the span's groups, any strides, in the
        format's dtype, or any float dtype where that is quantised, or as stored: see
        :mod:`farshore.kvstore.store.forms`. InvalidRequest below the sealed mark, beyond the capacity, or for
        other shapes. Only the sequence of the span's key writes and seals, and only while it holds the span:
        NotFound for one that doesn't hold it, InvalidRequest for another that does.
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
        """Makes ``[0, tokens)`` readable and unchangeable, and returns the digest of what this call sealed.

        Of ``blocks``, a part of the sequence's chain or all of it, those wholly within ``[0, tokens)`` can be
        found from now on.

        Every layer must have been written completely below ``tokens``; else InvalidRequest, as for a mark
        that would shrink. Idempotent: sealing the same length again returns the same digest.
        """
        ...

    def digest(self, span: SpanId, tokens: int) -> Digest:
        """Of ``[0, tokens)``: at once if these were sealed in one call, else they are read. InvalidRequest
        beyond the sealed mark."""
        ...

    def look_up(self, span: SpanId, *, holder: SequenceId) -> Stored:
        """What the span is. NotFound where ``holder`` does not hold it."""
        ...

    def segments(self, span: SpanId, first: int, last: int) -> Segments:
        """Where tokens ``[first, last)`` of the span lie in ``memory``, without a copy, in token order.

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
        """Copies of k ``[k_heads, n, k_dim]`` and v ``[v_heads, n, v_dim]``, n = last - first: a bulk pull
        by ``sequence``, which holds the span (else NotFound).

        ``dtype``: the format's, or, where that is quantised, float32 if not given; uint8 for the bytes as
        stored (see :mod:`farshore.kvstore.store.forms`). InvalidRequest beyond the sealed mark. Safe against
        a ``drop`` meanwhile.
        """
        ...

    def export(self, span: SpanId, first: int, last: int) -> Iterator[Chunk]:
        """Tokens ``[first, last)`` of all layers, checksummed, one chunk in memory at a time.

        InvalidRequest beyond the sealed mark, and for no tokens. The span is not freed before the iterator
        is used up, closed or gone.
        """
        ...

    def import_span(
        self,
        chunks: Iterable[Chunk],
        *,
        sequence: SequenceId,
        epoch: Epoch,
        covers: tuple[Covered, ...] = (),
    ) -> SpanId:
        """A new span with an export's range, all of it sealed, held by ``sequence``, whosever it was.
        ``covers``: of parity, and of nothing else (InvalidRequest), what it covers.

        Raises Full where it is not granted, and Corrupt, which names the chunk, where one was damaged, left
        out or put in another order. Whatever is raised, by ``chunks`` too: nothing is kept, and nobody could
        read it meanwhile. Not idempotent, as :meth:`create`.
        """
        ...

    def find_prefix(
        self, blocks: Sequence[PrefixBlock], *, layer_class: int, sequence: SequenceId, epoch: Epoch
    ) -> list[SpanSlice]:
        """What of ``blocks`` lies here, each slice held by ``sequence`` from now on.

        Every position and head group once at most, and every span; but with gaps, since other stores may hold
        those positions or heads: the caller puts the answers together, and drops what it does not use.
        Idempotent.
        """
        ...

    def hold(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        """``sequence`` holds all of ``spans`` (a fork does), or none of them if this raises. Idempotent."""
        ...

    def drop(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        """Gives back what ``sequence`` holds of ``spans`` in that epoch or an older one. Idempotent: spans it
        does not hold, or that are gone, are passed over."""
        ...

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        """Gives back everything that ``sequence`` holds in that epoch or an older one: its own spans, those
        it shares, those it found. Idempotent. In one process ``keep`` names spans that it goes on holding."""
        ...

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        """From now on calls of the sequence in an older epoch raise Fenced, save those that give back.
        Idempotent, never lowered.

        What is there stays readable. Fences do not pile up: of sequences that hold nothing here only the most
        recently fenced are remembered. Of a forgotten one an old owner could get a new, useless span, which
        costs memory until it is dropped, never a wrong token.
        """
        ...

    def announce(self) -> list[SpanInfo]:
        """All spans, as of one moment."""
        ...

    def usage(self) -> Usage: ...

    def check_integrity(self) -> None:
        """AssertionError if the books do not add up: free + held = total, no byte with two owners."""
        ...
