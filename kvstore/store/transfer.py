"""Moves sealed tokens between stores as checksummed chunks.

Migration, replicas and parity all move sealed ranges. An export is a sequence of **export chunks**, each with
one chunk range of the exported tokens (see ``images``). Chunks are plain bytes, so any transport can carry
them, one at a time in memory. The receiver checks each chunk before it uses it: a damaged, truncated,
missing, repeated or reordered chunk is refused, and the error names it. A :class:`ChunkImage` is the content
of a chunk inside a process, where no check is needed.

Called by ``store`` and ``parity``. It must not know networks or which store the memory belongs to.
"""

import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from farshore.errors import Corrupt, InvalidRequest
from farshore.ids import SequenceId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import Digest, ExportChunk, SpanKey
from farshore.kvstore.store.layout.forms import as_bytes
from farshore.kvstore.store.layout.images import ChunkRange, chunk_ranges, image_layout

# Magic, layout (format, V in K, 7 sizes), key, parity, tokens, chunk range; the sequence follows in UTF-8.
_HEADER = struct.Struct("<4s 8s? 7I IIHH ?I 4I")
_MAGIC = b"FSX1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportHeader:
    """Which tokens an export has. Equal in all chunks of one export."""

    key: SpanKey
    """Key of the exported range: ``key.first`` is the position of its first token."""
    layout: KVLayout
    tokens: int
    """Number of tokens in the whole range."""
    parity: bool
    """The range is the parity of tokens, not tokens."""

    def check_covers(self, covers: Collection[object]) -> None:
        """InvalidRequest unless ``covers``, the spans that an importer says the range is the parity of, are
        given for parity, and only for parity."""
        if bool(covers) != self.parity:
            raise InvalidRequest(
                f"parity={self.parity}, but {len(covers)} spans covered: give covers for parity, and only"
                " for parity"
            )

    def pack(self, chunk: ChunkRange) -> bytes:
        """The header of one chunk: this and the chunk's range."""
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
                *chunk,
            )
            + key.sequence.encode()
        )

    @classmethod
    def unpack(cls, data: bytes) -> "tuple[ExportHeader, ChunkRange]":
        """Reverses :meth:`pack`. ValueError for other bytes."""
        if len(data) < _HEADER.size:
            raise ValueError(f"a header of {len(data)} bytes, fewer than {_HEADER.size}")
        magic, format, v_in_k, *numbers = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"a header that begins with {magic!r}, not {_MAGIC!r}")
        sizes, (layer_class, first, group0, group1, parity, tokens, *chunk) = numbers[:7], numbers[7:]
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
        return header, ChunkRange(*chunk)


class ChunkImage(NamedTuple):
    """The content of one chunk of an export."""

    header: ExportHeader
    """Equal in all images of an export."""
    chunk: ChunkRange
    image: Tensor
    """u8[bytes]: valid until the next image is taken from the iterator."""


def to_chunks(images: Iterable[ChunkImage]) -> Iterator[ExportChunk]:
    """Makes a checksummed chunk of each image. The payload is a copy."""
    for header, chunk, image in images:
        yield to_chunk(ChunkImage(header, chunk, image.cpu().clone()))


def to_chunk(image: ChunkImage) -> ExportChunk:
    """The checksummed chunk of an image in the CPU's memory. Its payload is the image's own memory."""
    packed, payload = image.header.pack(image.chunk), as_bytes(image.image)
    return ExportChunk(header=packed, payload=payload, checksum=_checksum(packed, payload))


def verified_images(chunks: Iterable[ExportChunk]) -> Iterator[ChunkImage]:
    """The images of one whole export, in order. Raises Corrupt, naming the chunk, at the first chunk that is
    damaged or is not the next one, and after the last chunk if some are missing."""
    opening: ExportHeader | None = None
    ranges: Iterator[ChunkRange] = iter(())
    number = -1
    for number, chunk in enumerate(chunks):
        name = f"chunk {number}" + (f" of {opening.key}" if opening else "")
        if _checksum(chunk.header, chunk.payload) != chunk.checksum:
            raise Corrupt(f"{name} was damaged on its way: its checksum does not match; send it again")
        try:
            header, chunk_range = ExportHeader.unpack(chunk.header)
        except ValueError as error:
            raise Corrupt(f"{name}: {error}") from error
        if opening is None:
            opening, ranges = header, chunk_ranges(header.layout, header.tokens)
        expected = next(ranges, None)
        if header != opening:
            raise Corrupt(f"{name} is of another export: {header}")
        if chunk_range != expected:
            raise Corrupt(f"{name} holds {chunk_range}; {expected or 'nothing more'} had to come")
        size = image_layout(header.layout, chunk_range).block_bytes
        if len(chunk.payload) != size:
            raise Corrupt(f"{name} has {len(chunk.payload)} bytes for {chunk_range}, which take {size}")
        # A tensor needs writable memory.
        payload = memoryview(chunk.payload)
        writable = bytearray(payload) if payload.readonly else payload
        yield ChunkImage(opening, chunk_range, torch.frombuffer(writable, dtype=torch.uint8))
    missing = next(ranges, None)
    if opening is None or missing is not None:
        raise Corrupt(f"the export ended after chunk {number}: {missing or 'everything'} is missing")


def digest(images: Iterable[ChunkImage]) -> Digest:
    """Digest of the images' bytes. It does not depend on where the blocks lie or on how many layers a chunk
    has."""
    hashed = xxhash.xxh3_64()
    for image in images:
        hashed.update(as_bytes(image.image))
    return Digest(hashed.hexdigest())


def with_digest_check(images: Iterable[ChunkImage], expected: Digest, name: str) -> Iterator[ChunkImage]:
    """Passes the images on. Raises Corrupt after the last one if ``expected`` is not their digest."""
    hashed = xxhash.xxh3_64()
    for image in images:
        hashed.update(as_bytes(image.image))
        yield image
    if hashed.hexdigest() != expected:
        raise Corrupt(f"{name} has the digest {hashed.hexdigest()}; when it was sealed it was {expected}")


def _checksum(header: bytes, payload: bytes | memoryview) -> int:
    hashed = xxhash.xxh3_64(header)
    hashed.update(payload)
    return hashed.intdigest()
