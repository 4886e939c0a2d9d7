"""Stored tokens as plain bytes, independent of where their blocks lie: for digests, exports and parity.

A range of tokens is cut into **chunk ranges**: at most one block's tokens, in as many layers as fit into
``CHUNK_BYTES``. The **image** of a chunk range is the content of a block that has just these tokens and
layers, in the layout's own order (:func:`image_layout`). For whole blocks the image is a range of the memory
itself, so nothing is copied.

Called by ``memory``, ``store``, ``transfer`` and ``parity``. It must not know spans or checksums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.base import KVLayout
from farshore.kernels.host import address
from farshore.kvstore.store.layout.blocks import Bases, native_for, slot_ranges

CHUNK_BYTES = 1 << 20
"""Small enough to stay in a core's own cache between the passes over it: copy, checksum, XOR."""


class ChunkRange(NamedTuple):
    """Tokens ``[first, last)``, counted from the beginning of the exported range, in layers
    ``[layer0, layer1)``."""

    first: int
    last: int
    layer0: int
    layer1: int

    def __str__(self) -> str:
        return f"tokens {self.first} to {self.last} in layers {self.layer0} to {self.layer1}"


def chunk_ranges(layout: KVLayout, tokens: int) -> Iterator[ChunkRange]:
    """Cuts a range of ``tokens`` tokens: block by block, in each block by rising layers."""
    layers = max(1, CHUNK_BYTES // layout.layer_bytes)
    for first in range(0, tokens, layout.block_tokens):
        for layer in range(0, layout.layers, layers):
            last = min(first + layout.block_tokens, tokens)
            yield ChunkRange(first, last, layer, min(layer + layers, layout.layers))


def image_layout(layout: KVLayout, chunk: ChunkRange) -> KVLayout:
    """The layout of the image, whose size is its ``block_bytes``."""
    return layout._replace(layers=chunk.layer1 - chunk.layer0, block_tokens=chunk.last - chunk.first)


def read_image(
    memory: Tensor, layout: KVLayout, bases: Bases, chunk: ChunkRange, *, offset: int = 0
) -> Tensor:
    """The image ``u8[bytes]`` of a chunk of the range that begins at token ``offset``. A view of ``memory``
    if the chunk is a whole block, otherwise a copy."""
    block_view = whole_block(memory, layout, bases, chunk, offset)
    if block_view is not None:
        return block_view
    shape = image_layout(layout, chunk)
    out = torch.empty(shape.block_bytes, dtype=torch.uint8, device=memory.device)
    done = 0
    for block, slots in _blocks(memory, layout, bases, chunk, offset):
        target = slice(done, done + slots.stop - slots.start)
        for field, stored in zip(image_fields(out, shape), block, strict=True):
            field[:, :, target] = stored[:, :, slots]
        done = target.stop
    return out


def write_image(memory: Tensor, layout: KVLayout, bases: Bases, chunk: ChunkRange, image: Tensor) -> None:
    """Writes the image of a chunk of the range that begins at token 0 to its tokens in ``memory``."""
    block_view = whole_block(memory, layout, bases, chunk, 0)
    if block_view is not None:
        native = native_for(memory)
        if native is None or image.device != memory.device:
            block_view.copy_(image)
        else:  # Stays in this thread: PyTorch would wake its other threads and wait for them.
            native.stream(address(block_view), address(image), image.numel())
        return
    for block, slots in _blocks(memory, layout, bases, chunk, 0):
        for stored, field in zip(block, image_fields(image, image_layout(layout, chunk)), strict=True):
            stored[:, :, slots] = field


def image_fields(image: Tensor, layout: KVLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(K's payload, K's scales, V's payload, V's scales) of an image or a block: views
    ``u8[layers, heads, tokens, bytes of a row]``. ``layout``: the image's own."""
    layers = image.view(layout.layers, layout.layer_bytes)
    k, v = layers.split((layout.k_heads * layout.k_run_bytes, layout.v_heads * layout.v_run_bytes), dim=1)
    return (
        *_payload_and_scales(k, layout.k_heads, layout.block_tokens, layout.k_row_bytes, 2 * layout.k_scales),
        *_payload_and_scales(v, layout.v_heads, layout.block_tokens, layout.v_row_bytes, 2 * layout.v_scales),
    )


def _payload_and_scales(
    runs: Tensor, heads: int, tokens: int, payload_bytes: int, scale_bytes: int
) -> tuple[Tensor, Tensor]:
    """``runs``: ``u8[layers, bytes of K or V]``. The sizes are those of one row."""
    by_head = runs.unflatten(1, (heads, tokens * (payload_bytes + scale_bytes)))
    return (
        by_head[..., : tokens * payload_bytes].unflatten(2, (tokens, payload_bytes)),
        by_head[..., tokens * payload_bytes :].unflatten(2, (tokens, scale_bytes)),
    )


def whole_block(
    memory: Tensor, layout: KVLayout, bases: Bases, chunk: ChunkRange, offset: int
) -> Tensor | None:
    """The chunk's bytes in ``memory`` if its tokens are exactly one block, otherwise None."""
    block, slot = divmod(offset + chunk.first, layout.block_tokens)
    if slot or chunk.last - chunk.first < layout.block_tokens:
        return None
    base = bases[block]
    return memory[base + chunk.layer0 * layout.layer_bytes : base + chunk.layer1 * layout.layer_bytes]


def _blocks(
    memory: Tensor, layout: KVLayout, bases: Bases, chunk: ChunkRange, offset: int
) -> Iterator[tuple[tuple[Tensor, ...], slice]]:
    """For each block that the chunk lies in: (the fields of the chunk's layers, the chunk's slots)."""
    layers = layout._replace(layers=chunk.layer1 - chunk.layer0)
    flat = iter(slot_ranges(layout, bases, offset + chunk.first, offset + chunk.last))
    for base, slot, count in zip(flat, flat, flat, strict=True):
        start = base + chunk.layer0 * layout.layer_bytes
        yield image_fields(memory[start : start + layers.block_bytes], layers), slice(slot, slot + count)
