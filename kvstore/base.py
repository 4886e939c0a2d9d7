"""The interface of stored KV: what a shard grants, takes in and hands out.

Callers: the shard process and the engine (floor 3), step plans and prefill pulls (floor 2). Behind it stands
:class:`farshore.kvstore.store.LocalStore`. Nothing here computes attention or knows networks.

A **span** holds tokens ``[key.first, key.first + capacity)`` of one sequence, for head groups
``[key.group0, key.group1)`` of every layer in one layer class. Inside it tokens are counted from 0, and::

    0 ............ sealed_tokens ............ capacity_tokens
    | readable, never changes | may be written, unreadable |
"""

from dataclasses import dataclass
from typing import NewType, Protocol

import torch
from torch import Tensor

from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout, Segments

Digest = NewType("Digest", str)
"""Fingerprint of sealed bytes, hex. Equal content, range and layout give equal digests on every store."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """``budget - granted - free`` is held by others in the same arena (tails, spans still being read)."""

    budget_bytes: int
    granted_bytes: int
    sealed_bytes: int
    """Payload below the sealed marks, without padding."""
    free_bytes: int


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

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        """Grants memory for a new span, held once (by the sequence itself), or raises Full.

        ``layout`` is already narrowed to the key's groups; else InvalidRequest. Not idempotent: each call
        grants anew. A caller that lost the reply finds the span by ``announce``, or gives everything back by
        ``drop_sequence``.
        """
        ...

    def write(self, span: SpanId, layer: int, first: int, k: Tensor, v: Tensor, *, epoch: Epoch) -> None:
        """Copies n tokens of one layer in, at token ``first`` of the span; repeating or overwriting is fine.

        k ``[k_heads, n, k_dim]``, v ``[v_heads, n, v_dim]``: heads of the span's groups, any strides, in the
        format's dtype, or any float dtype where that is quantised, or as stored: see
        :mod:`farshore.kvstore.forms`. InvalidRequest below the sealed mark, beyond the capacity, or for other
        shapes.
        """
        ...

    def seal(self, span: SpanId, tokens: int, *, epoch: Epoch) -> Digest:
        """Makes ``[0, tokens)`` readable and unchangeable, and returns the digest of what this call sealed.

        Every layer must have been written completely below ``tokens``; else InvalidRequest, as for a mark
        that would shrink. Idempotent: sealing the same length again returns the same digest.
        """
        ...

    def segments(self, span: SpanId, first: int, last: int) -> Segments:
        """Where tokens ``[first, last)`` of the span lie in ``memory``, without a copy, in token order.

        One segment per contiguous run of blocks; positions are absolute (``key.first + i``). InvalidRequest
        beyond the sealed mark.
        """
        ...

    def read(
        self, span: SpanId, layer: int, first: int, last: int, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Copies of k ``[k_heads, n, k_dim]`` and v ``[v_heads, n, v_dim]``, n = last - first: a bulk pull.

        ``dtype``: the format's, or, where that is quantised, float32 if not given; uint8 for the bytes as
        stored (see :mod:`farshore.kvstore.forms`). InvalidRequest beyond the sealed mark. Safe against a
        ``drop`` meanwhile.
        """
        ...

    def hold(self, span: SpanId) -> None:
        """One more holder (a fork, a shared prefix). Not idempotent."""
        ...

    def drop(self, span: SpanId) -> None:
        """One holder less; at none left the memory is free. Not idempotent, save that the last is followed
        by NotFound."""
        ...

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        """Gives back the sequence's own hold on each of its spans of that epoch or older. Idempotent.

        Spans that others hold stay for them. Holds are anonymous, so an owner gives its own hold on a span
        back once, either here or by ``drop``; never both while others hold it.
        """
        ...

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        """From now on create, write and seal of an older epoch raise Fenced. Idempotent, never lowered.

        What is there stays readable. Fences do not pile up: each span keeps its own for as long as it lives,
        and of sequences without spans only the most recently fenced are remembered. Of a forgotten one an
        old owner could get a new, useless span, which costs memory until it is dropped, never a wrong token.
        """
        ...

    def announce(self) -> list[SpanInfo]:
        """All spans, as of one moment."""
        ...

    def usage(self) -> Usage: ...

    def check_integrity(self) -> None:
        """AssertionError if the books do not add up: free + held = total, no byte with two owners."""
        ...
