"""Finds stored KV by the tokens that it was computed from.

An engine gives every whole block of 256 tokens a name when it seals it, and asks each store for the blocks of
a new prompt. A block's name is a SHA-256 chain over all tokens before it and the caller's fingerprint, so a
name claims an identity: same tokens, same model, same tenant. The tokens are compared on a hit nevertheless.

Called by ``store`` (the index), by engines (the chain) and by workers, which announce the changes of names.
It must not know memory, epochs or holds.
"""

import hashlib
import struct
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from farshore.errors import InvalidRequest
from farshore.ids import SpanId
from farshore.kernels.base import BLOCK_TOKENS

TOKEN_BYTES = 4
"""Size of a packed token id."""


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


class NameChanges(NamedTuple):
    """The block names that a store gained and lost after its change number ``since``, up to ``until``."""

    since: int
    """0: ``added`` are all names of the store."""
    until: int
    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class NameLog:
    """The names of a store's blocks and their latest changes, numbered from 1.

    Thread-safe, with a lock of its own: a reader never waits for a write to the store. ``most_changes``: the
    number of changes that are remembered. A reader that missed more gets all names.
    """

    def __init__(self, *, most_changes: int = 65_536) -> None:
        self._lock = threading.Lock()
        self._names: set[bytes] = set()
        self._latest: deque[bytes] = deque(maxlen=most_changes)
        """The changed names, the latest last. Whether a name was added or removed is in ``_names``."""
        self._count = 0
        """The number of the latest change."""

    def add(self, name: bytes) -> None:
        """Records that the store has the first block of this name."""
        with self._lock:
            self._names.add(name)
            self._note(name)

    def remove(self, name: bytes) -> None:
        """Records that the store has no block of this name any more."""
        with self._lock:
            self._names.discard(name)
            self._note(name)

    def changes(self, since: int) -> NameChanges:
        """The changes after number ``since``: 0 at first, then the ``until`` of the previous call."""
        with self._lock:
            missed = self._count - since
            if not since or not 0 <= missed <= len(self._latest):
                return NameChanges(0, self._count, tuple(self._names), ())
            changed = dict.fromkeys(islice(reversed(self._latest), missed))
            added = tuple(name for name in changed if name in self._names)
            removed = tuple(name for name in changed if name not in self._names)
            return NameChanges(since, self._count, added, removed)

    def names(self) -> frozenset[bytes]:
        """All names now."""
        with self._lock:
            return frozenset(self._names)

    def _note(self, name: bytes) -> None:
        self._latest.append(name)
        self._count += 1


class _Entry(NamedTuple):
    """A named block of one span."""

    span: SpanId
    layer_class: int
    group0: int
    group1: int
    first: int
    tokens: bytes
    """Packed as u32: a ninth of a tuple's size."""

    @property
    def last(self) -> int:
        return self.first + len(self.tokens) // TOKEN_BYTES


class PrefixIndex:
    """Maps a block's name to the spans that hold the block. There may be several: concurrent prefills of one
    prompt, or spans of other head groups or layer classes.

    Not thread-safe, except for ``log``.
    """

    def __init__(self) -> None:
        self.log = NameLog()
        self._entries: dict[bytes, list[_Entry]] = {}
        self._names: dict[SpanId, dict[int, bytes]] = {}  # by the block's first position

    def name(
        self, span: SpanId, blocks: Iterable[PrefixBlock], *, layer_class: int, group0: int, group1: int
    ) -> None:
        """Adds names of blocks in a span. Idempotent. A block whose name is in the index with other tokens is
        skipped. InvalidRequest for a second name of a block: names would take unbounded memory."""
        for block in blocks:
            if self._names.get(span, {}).get(block.first, block.hash) != block.hash:
                raise InvalidRequest(
                    f"the block of {span} at position {block.first} has another name already"
                )
            entry = _Entry(span, layer_class, group0, group1, block.first, _packed(block.tokens))
            entries = self._entries.get(block.hash, [])
            if entry in entries or any(not _same_block(entry, other) for other in entries):
                continue
            if not entries:
                self.log.add(block.hash)
            self._entries[block.hash] = [*entries, entry]
            self._names.setdefault(span, {})[block.first] = block.hash

    def locate(self, names: Iterable[bytes], *, layer_class: int) -> list[PrefixMatch]:
        """Locates the blocks of these names, in the order of a chain: one match per span, no (position, head
        group) twice. A name that is not found leaves a gap, which other shards may fill.

        A name alone proves nothing: :meth:`find` compares the tokens.
        """
        return _matches(self._of_class(name, layer_class) for name in names)

    def find(self, blocks: Iterable[PrefixBlock], *, layer_class: int) -> list[PrefixMatch]:
        """Locates the blocks as :meth:`locate` does, and compares their tokens.

        If a name is found with other tokens, the search ends: the names after it are computed from that
        collision.
        """
        return _matches(self._same(blocks, layer_class))

    def redundant(self, span: SpanId) -> bool:
        """Whether other spans of the same groups have all of the span's names, so that removing it loses no
        prefix. True for a span without names."""
        return all(self._named_elsewhere(span, name) for name in self._names.get(span, {}).values())

    def names_of(self, span: SpanId) -> list[PrefixBlock]:
        """The named blocks of the span, by position."""
        blocks = []
        for first, name in sorted(self._names.get(span, {}).items()):
            tokens = next(entry.tokens for entry in self._entries[name] if entry.span == span)
            count = len(tokens) // TOKEN_BYTES
            blocks.append(PrefixBlock(name, struct.unpack(f"<{count}I", tokens), first))
        return blocks

    def forget(self, span: SpanId) -> None:
        """Removes the span's names."""
        for name in self._names.pop(span, {}).values():
            entries = [entry for entry in self._entries[name] if entry.span != span]
            if entries:
                self._entries[name] = entries
            else:
                del self._entries[name]
                self.log.remove(name)

    def check_integrity(self, spans: Collection[SpanId]) -> None:
        """AssertionError unless all tables agree and name only blocks of ``spans``."""
        named = sorted((entry.span, name) for name, entries in self._entries.items() for entry in entries)
        assert named == sorted((span, name) for span, names in self._names.items() for name in names.values())
        assert len(set(named)) == len(named), "a block is named twice in one span"
        assert self._names.keys() <= set(spans), "a name of a span that is not there"
        assert self.log.names() == self._entries.keys(), "the log has other names than the index"
        for entries in self._entries.values():
            assert entries and all(_same_block(entry, entries[0]) for entry in entries), (
                "one name, two contents"
            )

    def _of_class(self, name: bytes, layer_class: int) -> list[_Entry]:
        return [entry for entry in self._entries.get(name, ()) if entry.layer_class == layer_class]

    def _same(self, blocks: Iterable[PrefixBlock], layer_class: int) -> Iterator[list[_Entry]]:
        """Yields the entries of each block, up to the first block whose name has other tokens."""
        for block in blocks:
            packed = _packed(block.tokens)
            entries = self._entries.get(block.hash, ())
            if any((entry.first, entry.tokens) != (block.first, packed) for entry in entries):
                return
            yield self._of_class(block.hash, layer_class)

    def _named_elsewhere(self, span: SpanId, name: bytes) -> bool:
        entries = self._entries[name]
        own_entry = next(entry for entry in entries if entry.span == span)
        return any(entry.span != span and entry[1:4] == own_entry[1:4] for entry in entries)


def _matches(blocks: Iterable[list[_Entry]]) -> list[PrefixMatch]:
    """Joins the entries of consecutive blocks into one match per span; no (position, head group) twice."""
    found: dict[SpanId, PrefixMatch] = {}
    for entries in blocks:
        taken: list[_Entry] = []
        # First the spans that hold the block before, then those with most groups: the fewest matches.
        for entry in sorted(entries, key=lambda e: (e.span not in found, e.group0 - e.group1)):
            match = found.get(entry.span, PrefixMatch(entry.span, entry.first, entry.first))
            disjoint = all(entry.group1 <= other.group0 or other.group1 <= entry.group0 for other in taken)
            if disjoint and match.last == entry.first:
                found[entry.span] = match._replace(last=entry.last)
                taken.append(entry)
    return list(found.values())


def _same_block(a: _Entry, b: _Entry) -> bool:
    return (a.first, a.tokens) == (b.first, b.tokens)


def _packed(tokens: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise InvalidRequest(f"token ids are integers in [0, 2^32): {error}") from None
