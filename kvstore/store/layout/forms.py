"""The two forms of tokens outside of blocks: elements, and the bytes that a block stores.

**As elements**, k is ``[k_heads, n, k_dim]`` and v is ``[v_heads, n, v_dim]``, with any strides, in the
format's dtype, or in any float dtype if the format is quantised. **As stored**, k is
``u8[k_heads, n, bytes]`` and v is ``u8[v_heads, n, bytes]``: each row's payload, then its scales. This form
loses nothing and is the smaller one on a wire. If V is the beginning of K (``v_in_k``), v as elements is
ignored, and v as stored has 0 bytes a row.

Called by everything that copies tokens: blocks, tails, stores, and the clients and servers of remote stores.
It must not know blocks.
"""

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat, dequantise, quantise

MOST_LAYERS = 4096
MOST_HEADS = 4096
MOST_DIM = 1 << 14
MOST_BLOCK_TOKENS = 1 << 16
"""These bounds exceed every present model. With them a block takes less than 2^61 bytes, so no product of a
layout's sizes overflows the 64-bit integers of native code."""


def stored_bytes(layout: KVLayout) -> tuple[int, int]:
    """(K, V): bytes of one token of one head as stored, including its scales."""
    return (
        layout.k_row_bytes + 2 * layout.k_scales,
        layout.v_row_bytes + 2 * layout.v_scales,
    )


def check_layout(layout: KVLayout) -> None:
    """InvalidRequest for sizes outside of the bounds above, for blocks whose scales would lie at odd
    addresses, and for ``v_in_k`` layouts whose V does not fit into K."""
    sizes_and_bounds = (
        ("layers", layout.layers, MOST_LAYERS),
        ("groups", layout.groups, MOST_HEADS),
        ("K heads", layout.k_heads, MOST_HEADS),
        ("V heads", layout.v_heads, MOST_HEADS),
        ("dims of K", layout.k_dim, MOST_DIM),
        ("dims of V", layout.v_dim, MOST_DIM),
        ("tokens in a block", layout.block_tokens, MOST_BLOCK_TOKENS),
    )
    for name, size, most in sizes_and_bounds:
        if not 1 <= size <= most:
            raise InvalidRequest(f"a layout of {size} {name}: give 1 to {most}")
    sizes = (layout.k_row_bytes, layout.v_row_bytes)
    if layout.format.quantised and any(size * layout.block_tokens % 2 for size in sizes):
        raise InvalidRequest(
            f"blocks of {layout.block_tokens} tokens in {layout.format.value}, rows of {sizes} bytes: an odd"
            " number of bytes before the scales; give blocks of an even number of tokens"
        )
    if layout.v_in_k and (layout.v_dim > layout.k_dim or layout.v_heads != layout.k_heads):
        raise InvalidRequest(
            f"V of {layout.v_heads} heads x {layout.v_dim} inside K of {layout.k_heads} x {layout.k_dim}:"
            " give equal heads and no more dims"
        )


def check_layer(layout: KVLayout, layer: int) -> None:
    """InvalidRequest unless the layout has that layer."""
    if not 0 <= layer < layout.layers:
        raise InvalidRequest(f"layer {layer} is not one of the {layout.layers} stored")


def check_tokens(layout: KVLayout, layer: int, k: Tensor, v: Tensor) -> int:
    """Returns n, the number of tokens in k and v, which are elements or as stored.

    InvalidRequest if the layout has other shapes or dtypes, or lacks the layer.
    """
    check_layer(layout, layer)
    n = k.shape[1] if k.dim() == 3 else 0
    k_row, v_row = stored_bytes(layout) if k.dtype == torch.uint8 else (layout.k_dim, layout.v_dim)
    want_k, want_v = (layout.k_heads, n, k_row), (layout.v_heads, n, v_row)
    if tuple(k.shape) != want_k or tuple(v.shape) != want_v:
        raise InvalidRequest(f"k {tuple(k.shape)}, v {tuple(v.shape)}: give {want_k}, {want_v} (n tokens)")
    check_dtypes(layout, k, v)
    return n


def check_dtypes(layout: KVLayout, k: Tensor, v: Tensor) -> None:
    """InvalidRequest unless k and v have one dtype and the layout's format takes it."""
    format = layout.format
    accepted = k.dtype == torch.uint8 or (
        k.is_floating_point() if format.quantised else k.dtype == format.dtype
    )
    if k.dtype != v.dtype or not accepted:
        want = "one float dtype" if format.quantised else format.dtype
        raise InvalidRequest(f"k is {k.dtype}, v is {v.dtype}: give {want}, or both as stored")


def to_stored(layout: KVLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Converts k and v to bytes as stored. Quantises if the format does. Returns views where no conversion is
    needed."""
    if k.dtype == torch.uint8:
        return k, v
    if layout.v_in_k:
        return _rows_to_stored(k, layout.format), v.new_empty((*v.shape[:-1], 0), dtype=torch.uint8)
    return _rows_to_stored(k, layout.format), _rows_to_stored(v, layout.format)


def from_stored(layout: KVLayout, k: Tensor, v: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Converts k and v from bytes as stored to elements in ``dtype``. Exact in float32, see
    :func:`farshore.kernels.formats.dequantise`. If V lies in K, the returned v is a view of k."""
    k = _rows_from_stored(k, layout.format, layout.k_dim, dtype)
    if layout.v_in_k:
        return k, k[..., : layout.v_dim]
    return k, _rows_from_stored(v, layout.format, layout.v_dim, dtype)


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements' bytes in row-major order. Copies only a tensor that is not contiguous or is on a
    device."""
    return memoryview(tensor.cpu().contiguous().view(torch.uint8).numpy()).cast("B")


def _rows_to_stored(rows: Tensor, format: KVFormat) -> Tensor:
    if not format.quantised:
        return (rows if rows.stride(-1) == 1 else rows.contiguous()).view(torch.uint8)
    payload, scales = quantise(rows, format)
    return torch.cat((payload, scales.view(torch.uint8)), dim=-1)


def _rows_from_stored(rows: Tensor, format: KVFormat, dim: int, dtype: torch.dtype) -> Tensor:
    payload, scales = rows.split((format.row_bytes(dim), 2 * format.scales(dim)), dim=-1)
    # `view` needs aligned scales, so they are copied. `contiguous` would not copy a single row, or none.
    if format.quantised:
        scales = scales.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    return dequantise(payload.contiguous(), scales, format, dim, dtype=dtype)
