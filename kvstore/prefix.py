"""Finding stored KV again by the tokens it was computed from.

Engines name whole blocks of 256 tokens when they seal them, and ask every store for the blocks of a new
prompt. A block's name is a SHA-256 chain over everything before it, so it claims an identity: same tokens,
same model, same tenant (the fingerprint is the caller's). The tokens are compared nevertheless. This module
must not know memory, epochs or holders.
"""

import hashlib
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from farshore.errors import InvalidRequest
from farshore.ids import SpanId
from farshore.kernels.base import BLOCK_TOKENS


class PrefixBlock(NamedTuple):
    """``BLOCK_TOKENS`` tokens at positions ``first ..``, a multiple of it, and the name of all up to here."""

    hash: bytes
    """SHA-256, 32 bytes."""
    tokens: tuple[int, ...]
    first: int

    @property
    def last(self) -> int:
        return self.first + len(self.tokens)


def chain(
    tokens: Sequence[int], *, fingerprint: bytes, begun: Sequence[PrefixBlock] = ()
) -> list[PrefixBlock]:
    """The whole blocks of a sequence that begins with ``tokens``; the rest of them is left out. ``begun``:
    its first ones, where they are known already.

    ``fingerprint`` stands for all else that the KV depends on or that must not be shared across: model,
    revision, format, policy, tenant salt. InvalidRequest for token ids that are not in [0, 2^32).
    """
    seal = hashlib.sha256(fingerprint).digest()
    blocks = list(begun)
    parent = blocks[-1].hash if blocks else bytes(32)
    for first in range(len(blocks) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = tuple(tokens[first : first + BLOCK_TOKENS])
        parent = hashlib.sha256(parent + seal + _packed(block)).digest()
        blocks.append(PrefixBlock(parent, block, first))
    return blocks


class Named(NamedTuple):
    """A stretch of blocks found in one span: positions ``first .. last``."""

    span: SpanId
    first: int
    last: int


class _Entry(NamedTuple):
    span: SpanId
    group0: int
    group1: int
    first: int
    tokens: bytes
    """Packed, at a ninth of a tuple's size."""


class PrefixIndex:
    """Block name -> the spans that hold it; several may (concurrent prefills, other head groups).

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, bytes], list[_Entry]] = {}  # by layer class and hash
        self._names: dict[SpanId, dict[int, tuple[int, bytes]]] = {}  # by the block's first position

    def name(
        self, span: SpanId, blocks: Iterable[PrefixBlock], *, layer_class: int, group0: int, group1: int
    ) -> None:
        """Enters blocks of a span. Idempotent. A name that other tokens already have stays theirs.
        InvalidRequest for another name of a block that has one: names would take memory without a bound."""
        for block in blocks:
            known = self._names.get(span, {}).get(block.first, (layer_class, block.hash))
            if known != (layer_class, block.hash):
                raise InvalidRequest(
                    f"the block of {span} at position {block.first} has another name already"
                )
            entry = _Entry(span, group0, group1, block.first, _packed(block.tokens))
            entries = self._entries.setdefault((layer_class, block.hash), [])
            if entry in entries or any(not _same(entry, other) for other in entries):
                continue
            entries.append(entry)
            self._names.setdefault(span, {})[block.first] = (layer_class, block.hash)

    def find(self, blocks: Iterable[PrefixBlock], *, layer_class: int) -> list[Named]:
        """Where the blocks lie, one stretch a span, no position and head group twice.

        Gaps are passed over (other shards may hold what is missing here), but where a name has other tokens
        the search ends: the names after it build on that collision.
        """
        found: dict[SpanId, Named] = {}
        for block in blocks:
            entries = self._entries.get((layer_class, block.hash), [])
            packed = _packed(block.tokens)
            if any((entry.first, entry.tokens) != (block.first, packed) for entry in entries):
                break
            taken: list[_Entry] = []
            # What goes on where the last block was, then what holds most: the fewest stretches.
            for entry in sorted(entries, key=lambda e: (e.span not in found, e.group0 - e.group1)):
                stretch = found.get(entry.span, Named(entry.span, block.first, block.first))
                apart = all(entry.group1 <= e.group0 or e.group1 <= entry.group0 for e in taken)
                if apart and stretch.last == block.first:
                    found[entry.span] = stretch._replace(last=block.last)
                    taken.append(entry)
        return list(found.values())

    def redundant(self, span: SpanId) -> bool:
        """Whether nothing would be lost without the span: all it names, another one names for its groups."""
        return all(self._elsewhere(span, name) for name in self._names.get(span, {}).values())

    def forget(self, span: SpanId) -> None:
        for name in self._names.pop(span, {}).values():
            entries = [entry for entry in self._entries[name] if entry.span != span]
            if entries:
                self._entries[name] = entries
            else:
                del self._entries[name]

    def check_integrity(self, spans: Collection[SpanId]) -> None:
        """AssertionError unless both views agree and name none but ``spans``."""
        named = sorted((entry.span, name) for name, entries in self._entries.items() for entry in entries)
        assert named == sorted((span, name) for span, names in self._names.items() for name in names.values())
        assert len(set(named)) == len(named), "a block is named twice in one span"
        assert self._names.keys() <= set(spans), "a name of a span that is not there"
        for entries in self._entries.values():
            assert entries and all(_same(entry, entries[0]) for entry in entries), "a name of two contents"

    def _elsewhere(self, span: SpanId, name: tuple[int, bytes]) -> bool:
        entries = self._entries[name]
        mine = next(entry for entry in entries if entry.span == span)
        return any(e.span != span and (e.group0, e.group1) == (mine.group0, mine.group1) for e in entries)


def _same(a: _Entry, b: _Entry) -> bool:
    return (a.first, a.tokens) == (b.first, b.tokens)


def _packed(tokens: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise InvalidRequest(f"token ids are integers in [0, 2^32): {error}") from None
