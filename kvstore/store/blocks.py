"""Tokens in blocks: copying runs of tokens into and out of them, and describing them to kernels.

Spans and tails keep their tokens alike: a list of block bases (byte offsets in one memory), token i at slot
``i % block_tokens`` of block ``i // block_tokens``. This is the arithmetic both share. It must not know whose
the blocks are.

The copies are native, one call for any number of blocks; without the native module PyTorch makes them, block
by block, as it does in the memory of an accelerator.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from farshore.kernels.base import KVLayout, Segments, StoredKV
from farshore.kvstore.store.arena import stride_bytes
from farshore.kvstore.store.forms import from_stored, stored_bytes, to_stored

try:
    from farshore.kvstore import _native as native
except ImportError:
    native = None

Bases = Sequence[int] | Mapping[int, int]
"""Byte offset in the memory of each block, by its index."""

_FORMATS = {"int8": 1, "int4": 2}
_STORED = 0
_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}


def copy_in(
    memory: Tensor,
    layout: KVLayout,
    bases: Bases,
    *,
    layer: int,
    first: int,
    k: Tensor,
    v: Tensor,
    threads: int = 1,
) -> None:
    """Writes the n tokens of k, v to tokens ``first .. first + n`` of one layer; for their forms see
    :mod:`farshore.kvstore.store.forms`."""
    last = first + k.shape[1]
    if native_for(memory) is None:
        stored = to_stored(layout, k, v)
        for at, piece in _pieces(memory, layout, bases, layer, first, last):
            for rows, payload, scales in zip(stored, piece[::2], piece[1::2], strict=True):
                here = rows[:, at : at + payload.shape[1]].split(
                    (payload.shape[2], 2 * scales.shape[2]), dim=-1
                )
                payload.copy_(here[0])
                scales.view(torch.uint8).copy_(here[1])
        return
    k, v = dense_rows(k), dense_rows(v)
    native.scatter(
        first_layer=layer,
        last_layer=layer + 1,
        threads=threads,
        type=native_type(layout, k),
        k=native_rows(k[None]),
        v=native_rows(v[None]),
        layout=native_layout(layout),
        memory=memory.data_ptr(),
        blocks=stretches(layout, bases, first, last),
    )


def copy_out(
    memory: Tensor,
    layout: KVLayout,
    bases: Bases,
    *,
    layers: range,
    first: int,
    last: int,
    dtype: torch.dtype | None = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Copies of tokens ``[first, last)``: k ``[layers, k_heads, n, k_dim]``, v likewise.

    ``dtype``: the format's, or, where that is quantised, float32 if not given; uint8 for the bytes as stored.
    """
    if dtype is None:
        dtype = torch.float32 if layout.format.quantised else layout.format.dtype
    at_hand = native_for(memory) is not None
    if at_hand and layout.format.quantised and dtype == torch.float32:
        return _dequantised(memory, layout, bases, layers, first, last, threads)
    k, v = (
        torch.empty(len(layers), heads, last - first, row_bytes, dtype=torch.uint8, device=memory.device)
        for heads, row_bytes in zip((layout.k_heads, layout.v_heads), stored_bytes(layout), strict=True)
    )
    if not at_hand:
        for i, layer in enumerate(layers):
            for at, piece in _pieces(memory, layout, bases, layer, first, last):
                for rows, payload, scales in zip((k[i], v[i]), piece[::2], piece[1::2], strict=True):
                    here = rows[:, at : at + payload.shape[1]]
                    here[..., : payload.shape[2]] = payload
                    here[..., payload.shape[2] :] = scales.view(torch.uint8)
    else:
        _gather(memory, layout, bases, layers, first, last, threads, _STORED, k, v)
    return (k, v) if dtype == torch.uint8 else from_stored(layout, k, v, dtype=dtype)


def runs(memory: Tensor, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int) -> list[int]:
    """Where the bytes of tokens ``[first, last)`` lie: (address, bytes), one after the other, K's first, head
    by head, tokens in order: as :func:`copy_out` gives them for uint8. Only for formats without scales."""
    assert not layout.format.quantised, "scales do not lie behind their rows"
    start = memory.data_ptr() + layer * layout.layer_bytes
    places = stretches(layout, bases, first, last)
    flat: list[int] = []
    v_start = start + layout.k_heads * layout.k_run_bytes
    for side, heads, run, row in (
        (start, layout.k_heads, layout.k_run_bytes, layout.k_row_bytes),
        (v_start, layout.v_heads, layout.v_run_bytes, layout.v_row_bytes),
    ):
        for head in range(heads if row else 0):
            for at in range(0, len(places), 3):
                base, slot, count = places[at : at + 3]
                flat += (side + base + head * run + slot * row, count * row)
    return flat


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


def native_for(memory: Tensor) -> ModuleType | None:
    """The native module, where it is built and the memory is the CPU's."""
    return native if memory.device.type == "cpu" else None


_NativeSide = tuple[int, int, int, int, int, int]


def native_layout(layout: KVLayout) -> tuple[int, int, int, _NativeSide, _NativeSide]:
    """The layout as the native copies take it: (format, block_tokens, layer_bytes, k, v), where k and v are
    (heads, dim, row_bytes, scales, run_bytes, offset)."""
    v_heads = 0 if layout.v_in_k else layout.v_heads
    v_offset = layout.k_heads * layout.k_run_bytes
    return (
        _FORMATS.get(layout.format.value, 0),
        layout.block_tokens,
        layout.layer_bytes,
        (layout.k_heads, layout.k_dim, layout.k_row_bytes, layout.k_scales, layout.k_run_bytes, 0),
        (v_heads, layout.v_dim, layout.v_row_bytes, layout.v_scales, layout.v_run_bytes, v_offset),
    )


def native_type(layout: KVLayout, rows: Tensor) -> int:
    """What the native copies make of rows of that dtype; an unquantised format's are bytes to them."""
    return _TYPES.get(rows.dtype, _STORED) if layout.format.quantised else _STORED


def native_rows(rows: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of ``[layers, heads, n, dim]``, the last dense."""
    size = rows.element_size()
    layer, head, token, _ = rows.stride()
    return rows.data_ptr(), layer * size, head * size, token * size


def dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _dequantised(
    memory: Tensor, layout: KVLayout, bases: Bases, layers: range, first: int, last: int, threads: int
) -> tuple[Tensor, Tensor]:
    k = torch.empty(len(layers), layout.k_heads, last - first, layout.k_dim)
    v = (
        k[..., : layout.v_dim]
        if layout.v_in_k
        else torch.empty(len(layers), layout.v_heads, last - first, layout.v_dim)
    )
    _gather(memory, layout, bases, layers, first, last, threads, _TYPES[torch.float32], k, v)
    return k, v


def _gather(
    memory: Tensor,
    layout: KVLayout,
    bases: Bases,
    layers: range,
    first: int,
    last: int,
    threads: int,
    type: int,
    k: Tensor,
    v: Tensor,
) -> None:
    native.gather(
        first_layer=layers.start,
        last_layer=layers.stop,
        threads=threads,
        type=type,
        k=native_rows(k),
        v=native_rows(v),
        layout=native_layout(layout),
        memory=memory.data_ptr(),
        blocks=stretches(layout, bases, first, last),
    )


def stretches(layout: KVLayout, bases: Bases, first: int, last: int) -> list[int]:
    """(base, slot, tokens) of each block's part of ``[first, last)``, one after the other."""
    flat: list[int] = []
    at = first
    while at < last:
        block, slot = divmod(at, layout.block_tokens)
        count = min(layout.block_tokens - slot, last - at)
        flat += (bases[block], slot, count)
        at += count
    return flat


def _pieces(
    memory: Tensor, layout: KVLayout, bases: Bases, layer: int, first: int, last: int
) -> Iterator[tuple[int, StoredKV]]:
    """How many tokens lie before it, and one block's part of ``[first, last)``: views of what is stored."""
    at = 0
    flat = iter(stretches(layout, bases, first, last))
    for base, slot, count in zip(flat, flat, flat, strict=True):
        block = layout.stored(memory[base : base + layout.block_bytes], layer)
        k, k_scales, v, v_scales = (field[:, slot : slot + count] for field in block)
        if layout.v_in_k:
            v, v_scales = v[..., :0], v_scales[..., :0]
        yield at, StoredKV(k, k_scales, v, v_scales)
        at += count
