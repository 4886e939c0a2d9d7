"""The record that a store keeps of one span, and the checks of requests against it.

Called by ``store``, which guards every change with its lock; the shard service calls :func:`check_shape`
before it grants. It must not know holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.ids import Epoch, SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import CoveredSpan, Digest, SpanKey
from farshore.kvstore.store.arena.arena import Arena, Extent
from farshore.kvstore.store.arena.ranges import Ranges
from farshore.kvstore.store.layout import forms
from farshore.kvstore.store.layout.images import ChunkRange, chunk_ranges
from farshore.kvstore.store.layout.memory import KVMemory
from farshore.kvstore.store.transfer import ChunkImage, ExportHeader


@dataclass(slots=True, kw_only=True, eq=False)
class SpanRecord:
    """One span in this process's arena."""

    key: SpanKey
    layout: KVLayout
    capacity_tokens: int
    epoch: Epoch
    """The epoch in which the span was created."""
    extents: list[Extent]
    committed_blocks: int = 0
    """How many blocks from the first are committed memory. No token is written beyond them."""
    sealed_tokens: int = 0
    sealed_before: int = 0
    """The mark before the last seal, whose digest is of ``[sealed_before, sealed_tokens)``."""
    digest: tuple[int, Digest] | None = None
    """(n, digest of tokens ``[0, n)``), the last one computed. It stays true: sealed KV never changes."""
    covers: tuple[CoveredSpan, ...] = ()
    """If not empty, the span has no tokens but the parity of these."""
    pins: int = 0
    """Calls that read the span's memory at present. The memory is not freed meanwhile."""
    removed: bool = False
    """The span has left the store; only pins keep its memory."""
    bases: list[int] = field(init=False)
    """Byte offset in the arena of each block, in token order."""
    written: list[Ranges] = field(init=False)
    """Per layer, the written tokens at or above the sealed mark. Below the mark all tokens are written."""
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bases = [base for extent in self.extents for base in extent.block_bases]
        self.written = [Ranges() for _ in range(self.layout.layers)]
        self.bytes = sum(extent.bytes for extent in self.extents)

    def is_committed(self, tokens: int) -> bool:
        """Whether the blocks of all tokens below ``tokens`` are committed."""
        return tokens <= self.committed_blocks * self.layout.block_tokens

    def commit(self, arena: Arena, tokens: int) -> None:
        """Commits the blocks of the tokens below ``tokens``. Full if the machine has no memory left."""
        last, stride = -(-tokens // self.layout.block_tokens), self.extents[0].stride
        arena.commit([Extent(base, 1, stride) for base in self.bases[self.committed_blocks : last]])
        self.committed_blocks = max(self.committed_blocks, last)

    def write(self, memory: KVMemory, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        """Stores tokens from ``first`` on in one layer. The caller has checked them."""
        memory.write(self.layout, self.bases, layer=layer, first=first, k=k, v=v)
        self.written[layer].add(first, first + k.shape[1])

    def write_image(self, memory: KVMemory, chunk: ChunkRange, image: Tensor) -> None:
        """Stores an imported chunk."""
        memory.write_image(self.layout, self.bases, chunk, image)
        for written in self.written[chunk.layer0 : chunk.layer1]:
            written.add(chunk.first, chunk.last)

    def read(
        self, memory: KVMemory, layer: int, first: int, last: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Copies of tokens of one layer. The caller has checked them and pinned the span."""
        return memory.read(self.layout, self.bases, layer=layer, first=first, last=last, dtype=dtype)

    def runs(self, memory: KVMemory, layer: int, first: int, last: int) -> Iterator[list[int]]:
        """Yields the runs of tokens as stored; they stay valid until the next item is asked for. The caller
        has checked the tokens and pinned the span."""
        runs, keep = memory.runs(self.layout, self.bases, layer=layer, first=first, last=last)
        yield runs
        del keep

    def images(self, memory: KVMemory, first: int, last: int) -> Iterator[ChunkImage]:
        """Images of sealed tokens. The caller has pinned the span."""
        key = replace(self.key, first=self.key.first + first)
        header = ExportHeader(key=key, layout=self.layout, tokens=last - first, parity=bool(self.covers))
        chunks = chunk_ranges(self.layout, last - first)
        for chunk, image in memory.images(self.layout, self.bases, chunks, offset=first):
            yield ChunkImage(header, chunk, image)

    def seal(self, span: SpanId, tokens: int) -> None:
        """Moves the sealed mark to ``tokens``. InvalidRequest, which names ``span``, for a mark below the
        present one or above the capacity, and if a layer has gaps below it."""
        if not self.sealed_tokens <= tokens <= self.capacity_tokens:
            raise InvalidRequest(
                f"{span} cannot be sealed at {tokens} tokens: the mark is at {self.sealed_tokens} and only"
                f" rises, to {self.capacity_tokens} at most"
            )
        if tokens == self.sealed_tokens:
            return
        for layer, written in enumerate(self.written):
            if not written.cover(self.sealed_tokens, tokens):
                raise InvalidRequest(f"{span} cannot be sealed at {tokens}: layer {layer} has gaps")
        for written in self.written:
            written.remove(0, tokens)
        self.sealed_before, self.sealed_tokens = self.sealed_tokens, tokens


def check_shape(key: SpanKey, capacity_tokens: int, layout: KVLayout) -> None:
    """InvalidRequest unless a span of that key, capacity and layout can be granted."""
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


def check_unsealed(span: SpanId, record: SpanRecord, first: int, last: int) -> None:
    """InvalidRequest unless tokens ``[first, last)`` lie between the sealed mark and the capacity."""
    if not record.sealed_tokens <= first <= last <= record.capacity_tokens:
        raise InvalidRequest(
            f"tokens {first} to {last} of {span}: write from {record.sealed_tokens} (sealed below)"
            f" to {record.capacity_tokens} (capacity)"
        )


def check_readable(span: SpanId, record: SpanRecord, first: int, last: int) -> None:
    """Like :func:`check_sealed`, and InvalidRequest if the span is parity, which can only be exported."""
    if record.covers:
        raise InvalidRequest(f"{span} is the parity of {len(record.covers)} spans: export it to rebuild one")
    check_sealed(span, record, first, last)


def check_sealed(span: SpanId, record: SpanRecord, first: int, last: int) -> None:
    """InvalidRequest unless tokens ``[first, last)`` are sealed. The range may be empty."""
    if not 0 <= first <= last <= record.sealed_tokens:
        raise InvalidRequest(f"tokens {first} to {last} of {span}: sealed are 0 to {record.sealed_tokens}")
