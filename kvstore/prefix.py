"""Finds stored KV by the tokens that it was computed from.

An engine gives every whole block of 256 tokens a name when it seals it, and asks each store for the blocks of
a new prompt. A block's name is a SHA-256 chain over all tokens before it and the caller's fingerprint, so a
name claims an identity: same tokens, same model, same tenant. The tokens are compared on a hit nevertheless.

Called by ``store`` (the index) and by engines (the chain). It must not know memory, epochs or holds.
"""

import hashlib
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from farshore.errors import InvalidRequest
from farshore.ids import SpanId
from farshore.kernels.base import BLOCK_TOKENS


class PrefixBlock(NamedTuple):
    """``BLOCK_TOKENS`` tokens from position ``first`` on, a multiple of ``BLOCK_TOKENS``, and their name."""

    hash: bytes
    """The name, which depends on all tokens up to the block's end: SHA-256, 32 bytes."""
    tokens: tuple[int, ...]
    first: int

    @property
    def last(self) -> int:
        """One past the last position."""
        return self.first + len(self.tokens)


def chain(
    tokens: Sequence[int], *, fingerprint: bytes, begun: Sequence[PrefixBlock] = ()
) -> list[PrefixBlock]:
    """The whole blocks of a sequence that begins with ``tokens``. Tokens after the last whole block are
    ignored. ``begun``: the first blocks, if the caller has them already.

    ``fingerprint`` stands for everything else that the KV depends on or must not be shared across: the
    model's content, format, policy, tenant salt. InvalidRequest for token ids outside of [0, 2^32).
    """
    fingerprint_hash = hashlib.sha256(fingerprint).digest()
    blocks = list(begun)
    parent = blocks[-1].hash if blocks else bytes(32)
    for first in range(len(blocks) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = tuple(tokens[first : first + BLOCK_TOKENS])
        parent = hashlib.sha256(parent + fingerprint_hash + _packed(block)).digest()
        blocks.append(PrefixBlock(parent, block, first))
    return blocks


class PrefixMatch(NamedTuple):
    """Adjacent blocks found in one span: positions ``[first, last)``."""

    span: SpanId
    first: int
    last: int


class _Entry(NamedTuple):
    """A named block of one span."""

    span: SpanId
    group0: int
    group1: int
    first: int
    tokens: bytes
    """Packed as u32: a ninth of a tuple's size."""


class PrefixIndex:
    """Maps a block's name to the spans that hold the block. There may be several: concurrent prefills of one
    prompt, or spans of other head groups.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, bytes], list[_Entry]] = {}  # by layer class and hash
        self._names: dict[SpanId, dict[int, tuple[int, bytes]]] = {}  # by the block's first position

    def name(
        self, span: SpanId, blocks: Iterable[PrefixBlock], *, layer_class: int, group0: int, group1: int
    ) -> None:
        """Adds names of blocks in a span. Idempotent. A block whose name is in the index with other tokens is
        skipped. InvalidRequest for a second name of a block: names would take unbounded memory."""
        for block in blocks:
            known = self._names.get(span, {}).get(block.first, (layer_class, block.hash))
            if known != (layer_class, block.hash):
                raise InvalidRequest(
                    f"the block of {span} at position {block.first} has another name already"
                )
            entry = _Entry(span, group0, group1, block.first, _packed(block.tokens))
            entries = self._entries.setdefault((layer_class, block.hash), [])
            if entry in entries or any(not _same_block(entry, other) for other in entries):
                continue
            entries.append(entry)
            self._names.setdefault(span, {})[block.first] = (layer_class, block.hash)

    def find(self, blocks: Iterable[PrefixBlock], *, layer_class: int) -> list[PrefixMatch]:
        """Locates the blocks: one match per span, no (position, head group) twice.

        A block that is not found leaves a gap, which other shards may fill. If a name is found with other
        tokens, the search ends: the names after it are computed from that collision.
        """
        found: dict[SpanId, PrefixMatch] = {}
        for block in blocks:
            entries = self._entries.get((layer_class, block.hash), [])
            packed = _packed(block.tokens)
            if any((entry.first, entry.tokens) != (block.first, packed) for entry in entries):
                break
            taken: list[_Entry] = []
            # First the spans that hold the block before, then those with most groups: the fewest matches.
            for entry in sorted(entries, key=lambda e: (e.span not in found, e.group0 - e.group1)):
                match = found.get(entry.span, PrefixMatch(entry.span, block.first, block.first))
                disjoint = all(
                    entry.group1 <= other.group0 or other.group1 <= entry.group0 for other in taken
                )
                if disjoint and match.last == block.first:
                    found[entry.span] = match._replace(last=block.last)
                    taken.append(entry)
        return list(found.values())

    def redundant(self, span: SpanId) -> bool:
        """Whether other spans of the same groups have all of the span's names, so that removing it loses no
        prefix. True for a span without names."""
        return all(self._named_elsewhere(span, name) for name in self._names.get(span, {}).values())

    def names_of(self, span: SpanId) -> list[PrefixBlock]:
        """The named blocks of the span, by position."""
        blocks = []
        for first, name in sorted(self._names.get(span, {}).items()):
            tokens = next(entry.tokens for entry in self._entries[name] if entry.span == span)
            blocks.append(PrefixBlock(name[1], struct.unpack(f"<{len(tokens) // 4}I", tokens), first))
        return blocks

    def forget(self, span: SpanId) -> None:
        """Removes the span's names."""
        for name in self._names.pop(span, {}).values():
            entries = [entry for entry in self._entries[name] if entry.span != span]
            if entries:
                self._entries[name] = entries
            else:
                del self._entries[name]

    def check_integrity(self, spans: Collection[SpanId]) -> None:
        """AssertionError unless both tables agree and name only blocks of ``spans``."""
        named = sorted((entry.span, name) for name, entries in self._entries.items() for entry in entries)
        assert named == sorted((span, name) for span, names in self._names.items() for name in names.values())
        assert len(set(named)) == len(named), "a block is named twice in one span"
        assert self._names.keys() <= set(spans), "a name of a span that is not there"
        for entries in self._entries.values():
            assert entries and all(_same_block(entry, entries[0]) for entry in entries), (
                "one name, two contents"
            )

    def _named_elsewhere(self, span: SpanId, name: tuple[int, bytes]) -> bool:
        entries = self._entries[name]
        own_entry = next(entry for entry in entries if entry.span == span)
        groups = (own_entry.group0, own_entry.group1)
        return any(entry.span != span and (entry.group0, entry.group1) == groups for entry in entries)


def _same_block(a: _Entry, b: _Entry) -> bool:
    return (a.first, a.tokens) == (b.first, b.tokens)


def _packed(tokens: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise InvalidRequest(f"token ids are integers in [0, 2^32): {error}") from None
