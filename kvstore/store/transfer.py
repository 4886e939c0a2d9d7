"""Sealed tokens on their way from one store to another: chunks that carry their own checksum.

A migration, a replica and parity all move sealed ranges. An export is a stream of **chunks**, a part of the
range each (see ``images``), plain bytes that any transport carries, one at a time in memory.
The other end checks each before it uses it: what was damaged, cut short, left out, repeated or put in another
order is refused by name. :class:`Piece` is a chunk's content on either side, where nobody has to check it.
Called by the store. It must not know networks, nor whose memory it is.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from farshore.errors import Corrupt
from farshore.ids import SequenceId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import Chunk, Digest, SpanKey
from farshore.kvstore.store.forms import as_bytes
from farshore.kvstore.store.images import Part, cut, part_layout

# Name and version, layout (format, V in K, 7 sizes), key, parity, tokens, part; then the sequence in UTF-8.
_HEADER = struct.Struct("<4s 8s? 7I IIHH ?I 4I")
_MAGIC = b"FSX1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What an export is of."""

    key: SpanKey
    """Of the range: ``key.first`` is its first token's position."""
    layout: KVLayout
    tokens: int
    """In the whole range."""
    parity: bool
    """Not tokens: their parity."""

    def pack(self, part: Part) -> bytes:
        """With what one chunk holds of it."""
        key, layout = self.key, self.layout
        return (
            _HEADER.pack(
                _MAGIC,
                layout.format.value.encode(),
                layout.v_in_k,
                layout.layers,
                layout.groups,
                layout.k_heads_per_group,
                layout.v_heads_per_group,
                layout.k_dim,
                layout.v_dim,
                layout.block_tokens,
                key.layer_class,
                key.first,
                key.group0,
                key.group1,
                self.parity,
                self.tokens,
                *part,
            )
            + key.sequence.encode()
        )

    @classmethod
    def unpack(cls, data: bytes) -> "tuple[Header, Part]":
        """ValueError for anything but what :meth:`pack` makes."""
        if len(data) < _HEADER.size:
            raise ValueError(f"a header of {len(data)} bytes, fewer than {_HEADER.size}")
        magic, format, v_in_k, *numbers = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"a header that begins with {magic!r}, not {_MAGIC!r}")
        sizes, (layer_class, first, group0, group1, parity, tokens, *part) = numbers[:7], numbers[7:]
        if not all(sizes):
            raise ValueError(f"a layout of sizes {sizes}: none may be 0")
        *shape, block_tokens = sizes
        header = cls(
            key=SpanKey(
                sequence=SequenceId(data[_HEADER.size :].decode()),
                layer_class=layer_class,
                first=first,
                group0=group0,
                group1=group1,
            ),
            layout=KVLayout(*shape, KVFormat(format.rstrip(b"\0").decode()), block_tokens, v_in_k),
            tokens=tokens,
            parity=parity,
        )
        return header, Part(*part)


class Piece(NamedTuple):
    header: Header
    """The same one in all pieces of an export."""
    part: Part
    image: Tensor
    """u8[bytes]: valid until the next piece is asked for."""


def chunks(pieces: Iterable[Piece]) -> Iterator[Chunk]:
    """Each piece as a chunk with bytes of its own."""
    for piece in pieces:
        header, payload = piece.header.pack(piece.part), memoryview(piece.image.cpu().numpy().copy())
        yield Chunk(header=header, payload=payload, checksum=_checksum(header, payload))


def verified(chunks: Iterable[Chunk]) -> Iterator[Piece]:
    """The pieces of one whole export, in order. Raises Corrupt, which names the chunk, at the first that is
    not what was sent or not the next one, and after the last if some are missing."""
    opening: Header | None = None
    parts: Iterator[Part] = iter(())
    number = -1
    for number, chunk in enumerate(chunks):
        name = f"chunk {number}" + (f" of {opening.key}" if opening else "")
        if _checksum(chunk.header, chunk.payload) != chunk.checksum:
            raise Corrupt(f"{name} was damaged on its way: its checksum does not match; send it again")
        try:
            header, part = Header.unpack(chunk.header)
        except ValueError as error:
            raise Corrupt(f"{name}: {error}") from error
        if opening is None:
            opening, parts = header, cut(header.layout, header.tokens)
        expected = next(parts, None)
        if header != opening:
            raise Corrupt(f"{name} is of another export: {header}")
        if part != expected:
            raise Corrupt(f"{name} holds {part}; {expected or 'nothing more'} had to come")
        size = part_layout(header.layout, part).block_bytes
        if len(chunk.payload) != size:
            raise Corrupt(f"{name} has {len(chunk.payload)} bytes for {part}, which take {size}")
        # A tensor wants memory that may be written.
        payload = memoryview(chunk.payload)
        writable = bytearray(payload) if payload.readonly else payload
        yield Piece(opening, part, torch.frombuffer(writable, dtype=torch.uint8))
    missing = next(parts, None)
    if opening is None or missing is not None:
        raise Corrupt(f"the export ended after chunk {number}: {missing or 'everything'} is missing")


def digest(pieces: Iterable[Piece]) -> Digest:
    """Of the content: equal wherever it lies, and however its layers were cut into pieces."""
    hashed = xxhash.xxh3_64()
    for piece in pieces:
        hashed.update(as_bytes(piece.image))
    return Digest(hashed.hexdigest())


def matching(pieces: Iterable[Piece], expected: Digest, name: str) -> Iterator[Piece]:
    """The same pieces; Corrupt after the last if ``expected`` is not their digest."""
    hashed = xxhash.xxh3_64()
    for piece in pieces:
        hashed.update(as_bytes(piece.image))
        yield piece
    if hashed.hexdigest() != expected:
        raise Corrupt(f"{name} has the digest {hashed.hexdigest()}; when it was sealed it was {expected}")


def _checksum(header: bytes, payload: bytes | memoryview) -> int:
    hashed = xxhash.xxh3_64(header)
    hashed.update(payload)
    return hashed.intdigest()
