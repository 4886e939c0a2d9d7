"""Stored tokens as plain bytes, wherever their blocks lie: what digests are of and what travels.

A range of tokens is cut into **parts**: as many tokens as a block holds, of as many layers as fit into
``PART_BYTES``. A part's **image** is what a block of just these tokens and layers would hold, in the layout's
own order, :func:`part_layout`. Of whole blocks that is a stretch of memory as it is, so nothing is copied.
Called for export, import, parity and digests. It must not know spans or checksums.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.base import KVLayout
from farshore.kvstore.store.blocks import Bases, native_for, stretches

PART_BYTES = 1 << 20
"""Stays in a core's own cache between the passes over it: copy, checksum, XOR."""


class Part(NamedTuple):
    """Tokens ``[first, last)`` of a range, counted from its beginning, in layers ``[layer0, layer1)``."""

    first: int
    last: int
    layer0: int
    layer1: int

    def __str__(self) -> str:
        return f"tokens {self.first} to {self.last} in layers {self.layer0} to {self.layer1}"


def cut(layout: KVLayout, tokens: int) -> Iterator[Part]:
    """The parts of a range of that many tokens, in their order: block by block, layers rising."""
    layers = max(1, PART_BYTES // layout.layer_bytes)
    for first in range(0, tokens, layout.block_tokens):
        for layer in range(0, layout.layers, layers):
            last = min(first + layout.block_tokens, tokens)
            yield Part(first, last, layer, min(layer + layers, layout.layers))


def part_layout(layout: KVLayout, part: Part) -> KVLayout:
    """Of the part's image, which takes ``block_bytes`` of it."""
    return layout._replace(layers=part.layer1 - part.layer0, block_tokens=part.last - part.first)


def image(memory: Tensor, layout: KVLayout, bases: Bases, part: Part, *, offset: int = 0) -> Tensor:
    """``u8[bytes]`` of a range that begins at token ``offset``; a view of ``memory`` where it can be one."""
    whole = _whole(memory, layout, bases, part, offset)
    if whole is not None:
        return whole
    shape = part_layout(layout, part)
    out = torch.empty(shape.block_bytes, dtype=torch.uint8, device=memory.device)
    at = 0
    for block, slots in _blocks(memory, layout, bases, part, offset):
        here = slice(at, at + slots.stop - slots.start)
        for to, stored in zip(fields(out, shape), block, strict=True):
            to[:, :, here] = stored[:, :, slots]
        at = here.stop
    return out


def restore(memory: Tensor, layout: KVLayout, bases: Bases, part: Part, image: Tensor) -> None:
    """Writes an image to the tokens it is of, of a range that begins at token 0."""
    whole = _whole(memory, layout, bases, part, 0)
    if whole is not None:
        native = native_for(memory)
        if native is None or image.device != memory.device:
            whole.copy_(image)
        else:  # In this thread: PyTorch would wake its others for it, and wait for them.
            native.stream(whole.data_ptr(), image.data_ptr(), image.numel())
        return
    for block, slots in _blocks(memory, layout, bases, part, 0):
        for stored, given in zip(block, fields(image, part_layout(layout, part)), strict=True):
            stored[:, :, slots] = given


def fields(image: Tensor, layout: KVLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K's payload and scales, V's payload and scales of an image or block: views
    ``u8[layers, heads, tokens, bytes of a row]``."""
    layers = image.view(layout.layers, layout.layer_bytes)
    k, v = layers.split((layout.k_heads * layout.k_run_bytes, layout.v_heads * layout.v_run_bytes), dim=1)
    return (
        *_side(k, layout.k_heads, layout.block_tokens, layout.k_row_bytes, 2 * layout.k_scales),
        *_side(v, layout.v_heads, layout.block_tokens, layout.v_row_bytes, 2 * layout.v_scales),
    )


def _side(runs: Tensor, heads: int, tokens: int, payload: int, scales: int) -> tuple[Tensor, Tensor]:
    by_head = runs.unflatten(1, (heads, tokens * (payload + scales)))
    return (
        by_head[..., : tokens * payload].unflatten(2, (tokens, payload)),
        by_head[..., tokens * payload :].unflatten(2, (tokens, scales)),
    )


def _whole(memory: Tensor, layout: KVLayout, bases: Bases, part: Part, offset: int) -> Tensor | None:
    block, slot = divmod(offset + part.first, layout.block_tokens)
    if slot or part.last - part.first < layout.block_tokens:
        return None
    base = bases[block]
    return memory[base + part.layer0 * layout.layer_bytes : base + part.layer1 * layout.layer_bytes]


def _blocks(
    memory: Tensor, layout: KVLayout, bases: Bases, part: Part, offset: int
) -> Iterator[tuple[tuple[Tensor, ...], slice]]:
    """The fields of each block that the part lies in, and its slots there."""
    layers = layout._replace(layers=part.layer1 - part.layer0)
    flat = iter(stretches(layout, bases, offset + part.first, offset + part.last))
    for base, slot, count in zip(flat, flat, flat, strict=True):
        start = base + part.layer0 * layout.layer_bytes
        yield fields(memory[start : start + layers.block_bytes], layers), slice(slot, slot + count)
