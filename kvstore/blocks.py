"""Tokens in blocks: copying runs of tokens into and out of them, and describing them to kernels.

Spans and tails keep their tokens alike: a list of block bases (byte offsets in one memory), token i at slot
``i % block_tokens`` of block ``i // block_tokens``. This is the arithmetic both share. It must not know whose
the blocks are.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.kernels.base import KVLayout, Segments
from farshore.kvstore.arena import stride_bytes

Bases = Sequence[int] | Mapping[int, int]
"""Byte offset in the memory of each block, by its index."""


def check_layout(layout: KVLayout) -> None:
    """InvalidRequest for formats that kernels read but nothing here writes yet."""
    if layout.format.quantised or layout.v_in_k:
        raise InvalidRequest(
            f"KV as {layout.format.value}{' with V inside K' if layout.v_in_k else ''} cannot be stored yet:"
            " use float32, bfloat16 or float16, K and V apart"
        )


def check_tokens(layout: KVLayout, layer: int, k: Tensor, v: Tensor) -> int:
    """The number of tokens in k ``[k_heads, n, k_dim]`` and v ``[v_heads, n, v_dim]``.

    InvalidRequest if the shapes or dtypes are not the layout's, or the layer is none of its layers.
    """
    check_layer(layout, layer)
    n = k.shape[1] if k.dim() == 3 else 0
    want_k = (layout.k_heads, n, layout.k_dim)
    want_v = (layout.v_heads, n, layout.v_dim)
    if tuple(k.shape) != want_k or tuple(v.shape) != want_v:
        raise InvalidRequest(f"k {tuple(k.shape)}, v {tuple(v.shape)}: give {want_k}, {want_v} (n tokens)")
    if k.dtype != layout.format.dtype or v.dtype != layout.format.dtype:
        raise InvalidRequest(f"k is {k.dtype}, v is {v.dtype}: give {layout.format.dtype}")
    return n


def check_layer(layout: KVLayout, layer: int) -> None:
    if not 0 <= layer < layout.layers:
        raise InvalidRequest(f"layer {layer} is not one of the {layout.layers} stored")


def copy_in(
    memory: Tensor, layout: KVLayout, bases: Bases, *, layer: int, first: int, k: Tensor, v: Tensor
) -> None:
    """Writes the n tokens of k, v to tokens ``first .. first + n`` of one layer."""
    at = 0
    for stored_k, stored_v in views(memory, layout, bases, layer=layer, first=first, last=first + k.shape[1]):
        end = at + stored_k.shape[1]
        stored_k.copy_(k[:, at:end])
        stored_v.copy_(v[:, at:end])
        at = end


def copy_out(
    memory: Tensor, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Copies of tokens ``[first, last)`` of one layer: k ``[k_heads, n, k_dim]``, v likewise."""
    k = torch.empty(layout.k_heads, last - first, layout.k_dim, dtype=layout.format.dtype)
    v = torch.empty(layout.v_heads, last - first, layout.v_dim, dtype=layout.format.dtype)
    at = 0
    for stored_k, stored_v in views(memory, layout, bases, layer=layer, first=first, last=last):
        end = at + stored_k.shape[1]
        k[:, at:end] = stored_k
        v[:, at:end] = stored_v
        at = end
    return k, v


def describe(
    layout: KVLayout, bases: Bases, *, first: int, last: int, position: int, group0: int
) -> Segments:
    """Tokens ``[first, last)``, one segment per run of adjacent blocks; ``position`` is that of ``first``."""
    stride, group1 = stride_bytes(layout.block_bytes), group0 + layout.groups
    runs: list[tuple[int, int, int, int, int, int, int]] = []
    at = first
    while at < last:
        block, slot = divmod(at, layout.block_tokens)
        base, end = bases[block], (block + 1) * layout.block_tokens
        while end < last and bases[block + 1] == bases[block] + stride:
            block, end = block + 1, end + layout.block_tokens
        count = min(end, last) - at
        runs.append((base, stride, slot, count, position + at - first, group0, group1))
        at += count
    return Segments.of(runs)


def views(
    memory: Tensor, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The stored k and v of ``[first, last)``, without a copy, block by block in token order."""
    at = first
    while at < last:
        block, slot = divmod(at, layout.block_tokens)
        end = slot + min(layout.block_tokens - slot, last - at)
        base = bases[block]
        k, v = layout.views(memory[base : base + layout.block_bytes], layer)
        yield k[:, slot:end], v[:, slot:end]
        at += end - slot


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements' bytes in row-major order; copied only if the tensor is not contiguous."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
