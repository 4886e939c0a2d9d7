"""Copies tokens into and out of blocks, and describes blocks to kernels.

Spans and tails store tokens in the same way: a list of block bases (byte offsets in one memory), with token i
at slot ``i % block_tokens`` of block ``i // block_tokens``. This module has the arithmetic that both share.
Called by ``store``, ``tail`` and ``images``. It must not know which span or tail a block belongs to.

The native module copies any number of blocks in one call. Without it, and in the memory of an accelerator,
PyTorch copies block by block.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from farshore.kernels.base import KVLayout, Segments, StoredKV
from farshore.kernels.formats import CODES, DTYPE_CODES
from farshore.kernels.host import HOST, address
from farshore.kernels.runtime.cuda import finish_calls
from farshore.kvstore.store.arena.arena import stride_bytes
from farshore.kvstore.store.layout.forms import from_stored, stored_bytes, to_stored

try:
    from farshore.kvstore import _native as native
except ImportError:
    native = None

Bases = Sequence[int] | Mapping[int, int]
"""Byte offset in the memory of each block, by the block's index."""

_STORED = len(CODES)
"""In place of a dtype's code: rows are bytes, as they are stored."""


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
    """Writes the n tokens of k and v to tokens ``[first, first + n)`` of one layer. For their forms see
    :mod:`farshore.kvstore.store.layout.forms`; the caller has checked them. The copy is complete, for any
    thread."""
    last = first + k.shape[1]
    if native_for(memory) is None:
        stored = to_stored(layout, k, v)
        for done, block in _stored_views(memory, layout, bases, layer, first, last):
            for rows, payload, scales in zip(stored, block[::2], block[1::2], strict=True):
                source = rows[:, done : done + payload.shape[1]].split(
                    (payload.shape[2], 2 * scales.shape[2]), dim=-1
                )
                payload.copy_(source[0])
                scales.view(torch.uint8).copy_(source[1])
        finish_calls(memory.device)
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
        memory=address(memory),
        blocks=slot_ranges(layout, bases, first, last),
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
    """Copies of tokens ``[first, last)``: k ``[layers, k_heads, n, k_dim]``, v
    ``[layers, v_heads, n, v_dim]``.

    ``dtype``: the format's by default, or float32 if the format is quantised; uint8 for the bytes as stored.
    The copies are complete, for any thread.
    """
    if dtype is None:
        dtype = torch.float32 if layout.format.quantised else layout.format.dtype
    has_native = native_for(memory) is not None
    if has_native and layout.format.quantised and dtype == torch.float32:
        return _dequantised(memory, layout, bases, layers, first, last, threads)
    k, v = (
        torch.empty(len(layers), heads, last - first, row_bytes, dtype=torch.uint8, device=memory.device)
        for heads, row_bytes in zip((layout.k_heads, layout.v_heads), stored_bytes(layout), strict=True)
    )
    if not has_native:
        for i, layer in enumerate(layers):
            for done, block in _stored_views(memory, layout, bases, layer, first, last):
                for rows, payload, scales in zip((k[i], v[i]), block[::2], block[1::2], strict=True):
                    target = rows[:, done : done + payload.shape[1]]
                    target[..., : payload.shape[2]] = payload
                    target[..., payload.shape[2] :] = scales.view(torch.uint8)
    else:
        _gather(memory, layout, bases, layers, first, last, threads, _STORED, k, v)
    if dtype != torch.uint8:
        k, v = from_stored(layout, k, v, dtype=dtype)
    finish_calls(memory.device)
    return k, v


def runs(memory: Tensor, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int) -> list[int]:
    """Locates the bytes of tokens ``[first, last)``: a flat list of (address, bytes).

    K comes before V, each head by head, a head's tokens in order: the bytes that :func:`copy_out` gives for
    uint8. Only for formats without scales.
    """
    assert not layout.format.quantised, "scales are not adjacent to their rows"
    start = address(memory) + layer * layout.layer_bytes
    slots = slot_ranges(layout, bases, first, last)
    flat: list[int] = []
    v_start = start + layout.k_heads * layout.k_run_bytes
    for side, heads, run, row in (
        (start, layout.k_heads, layout.k_run_bytes, layout.k_row_bytes),
        (v_start, layout.v_heads, layout.v_run_bytes, layout.v_row_bytes),
    ):
        for head in range(heads if row else 0):
            for i in range(0, len(slots), 3):
                base, slot, count = slots[i : i + 3]
                flat += (side + base + head * run + slot * row, count * row)
    return flat


def to_segments(
    layout: KVLayout, bases: Bases, *, first: int, last: int, position: int, group0: int
) -> Segments:
    """Describes tokens ``[first, last)`` to kernels: one segment per run of adjacent blocks. ``position``:
    the position in the sequence of token ``first``. ``group0``: the first head group in the blocks."""
    stride, group1 = stride_bytes(layout.block_bytes), group0 + layout.groups
    runs: list[tuple[int, int, int, int, int, int, int]] = []
    token = first
    while token < last:
        block, slot = divmod(token, layout.block_tokens)
        base, end = bases[block], (block + 1) * layout.block_tokens
        while end < last and bases[block + 1] == bases[block] + stride:
            block, end = block + 1, end + layout.block_tokens
        count = min(end, last) - token
        runs.append((base, stride, slot, count, position + token - first, group0, group1))
        token += count
    return Segments.of(runs)


def native_for(memory: Tensor) -> ModuleType | None:
    """The native module if it was built and ``memory`` is the CPU's, otherwise None."""
    return native if memory.device.type == "cpu" else None


_NativeSide = tuple[int, int, int, int, int, int]


def native_layout(layout: KVLayout) -> tuple[int, int, int, _NativeSide, _NativeSide]:
    """The layout as the native copies take it: (format, block_tokens, layer_bytes, k, v), where k and v are
    (heads, dim, row_bytes, scales, run_bytes, offset)."""
    v_heads = 0 if layout.v_in_k else layout.v_heads
    v_offset = layout.k_heads * layout.k_run_bytes
    return (
        CODES[layout.format],
        layout.block_tokens,
        layout.layer_bytes,
        (layout.k_heads, layout.k_dim, layout.k_row_bytes, layout.k_scales, layout.k_run_bytes, 0),
        (v_heads, layout.v_dim, layout.v_row_bytes, layout.v_scales, layout.v_run_bytes, v_offset),
    )


def native_type(layout: KVLayout, rows: Tensor) -> int:
    """The native module's number for the element type of ``rows``. Rows of an unquantised format are copied
    as bytes."""
    return DTYPE_CODES.get(rows.dtype, _STORED) if layout.format.quantised else _STORED


def native_rows(rows: Tensor) -> tuple[int, int, int, int]:
    """Address of ``rows`` ``[layers, heads, n, dim]`` and their strides in bytes, by layer, head and token.
    The elements of a row must be adjacent."""
    size = rows.element_size()
    layer, head, token, _ = rows.stride()
    return address(rows), layer * size, head * size, token * size


def dense_rows(rows: Tensor) -> Tensor:
    """``rows``, copied unless the elements of each row are adjacent."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _dequantised(
    memory: Tensor, layout: KVLayout, bases: Bases, layers: range, first: int, last: int, threads: int
) -> tuple[Tensor, Tensor]:
    k = torch.empty(len(layers), layout.k_heads, last - first, layout.k_dim, device=HOST)
    v = (
        k[..., : layout.v_dim]
        if layout.v_in_k
        else torch.empty(len(layers), layout.v_heads, last - first, layout.v_dim, device=HOST)
    )
    _gather(memory, layout, bases, layers, first, last, threads, DTYPE_CODES[torch.float32], k, v)
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
        memory=address(memory),
        blocks=slot_ranges(layout, bases, first, last),
    )


def slot_ranges(layout: KVLayout, bases: Bases, first: int, last: int) -> list[int]:
    """The slots of tokens ``[first, last)`` as a flat list of (base of the block, first slot, tokens)."""
    flat: list[int] = []
    token = first
    while token < last:
        block, slot = divmod(token, layout.block_tokens)
        count = min(layout.block_tokens - slot, last - token)
        flat += (bases[block], slot, count)
        token += count
    return flat


def _stored_views(
    memory: Tensor, layout: KVLayout, bases: Bases, layer: int, first: int, last: int
) -> Iterator[tuple[int, StoredKV]]:
    """For each block: (tokens before it, views of its tokens in ``[first, last)``)."""
    done = 0
    flat = iter(slot_ranges(layout, bases, first, last))
    for base, slot, count in zip(flat, flat, flat, strict=True):
        block = layout.stored(memory[base : base + layout.block_bytes], layer)
        k, k_scales, v, v_scales = (field[:, slot : slot + count] for field in block)
        if layout.v_in_k:
            v, v_scales = v[..., :0], v_scales[..., :0]
        yield done, StoredKV(k, k_scales, v, v_scales)
        done += count
