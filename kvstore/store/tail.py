"""The newest tokens of one sequence, in the engine's own arena.

The engine appends to a tail in every decode step and attends to it beside the remote spans. When blocks are
full, the hand-off reads them, writes and seals them at a shard, and releases them here. Blocks have the same
form as a span's, so kernels read both alike. Called by the engine and its hand-off. It must not know shards
or epochs, nor which tokens are committed.

Positions are absolute, and blocks are aligned to position 0::

    start ............. end ............... reserved
    | complete          | scratch: any layer's next tokens |

A decode step appends one token to each of many tails by a :class:`TailBatch`, in one native call per layer.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.kernels.base import KVLayout, Segments
from farshore.kernels.host import address
from farshore.kernels.runtime.cuda import finish_calls
from farshore.kvstore.store.arena.arena import Arena, Extent, stride_bytes
from farshore.kvstore.store.layout import blocks, forms

# Indices into a tail's marks. The native append checks and moves the marks too, see native/copy.h.
_FREED, _END, _WRITTEN = 0, 1, 2


class Tail:
    """Tokens ``[start, end)`` of every layer and group of one layer class, and scratch from ``end`` on.

    Not thread-safe: for the engine's thread only. Exception: ``read`` and ``read_layers`` below ``end`` may
    run in another thread (the hand-off's) while the engine does not release, truncate or free those
    positions.
    """

    def __init__(self, *, arena: Arena, layout: KVLayout, start: int) -> None:
        if start < 0:
            raise InvalidRequest(f"a tail cannot start at position {start}: positions count from 0")
        forms.check_layout(layout)
        self._arena = arena
        self._layout = layout
        self._stride = stride_bytes(layout.block_bytes)
        self._start = start
        # How often blocks at or above the end were freed; the end; for each layer, one past the last token
        # that was written without a gap.
        self._marks = array("q", [0, start, *[start] * layout.layers])
        # position // block_tokens -> base of the block. Consecutive, from the block of `start` on.
        self._blocks: dict[int, int] = {}

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self._start

    @property
    def end(self) -> int:
        """One past the position of the last complete token, which every layer has."""
        return self._marks[_END]

    @property
    def layout(self) -> KVLayout:
        """Layout of the tail's blocks."""
        return self._layout

    @property
    def bases(self) -> tuple[int, ...]:
        """Byte offset in the arena of each block, including reserved ones, in token order."""
        return tuple(self._blocks.values())

    @property
    def bytes(self) -> int:
        """Memory granted to the tail, including reserved scratch."""
        return len(self._blocks) * self._stride

    @staticmethod
    def bytes_for(layout: KVLayout, start: int, end: int) -> int:
        """Arena memory that a tail takes once ``[start, end)`` is reserved: all blocks with a position of the
        range, each in whole pages. 0 for an empty range.

        Blocks are aligned to position 0, so a tail that starts inside a block may take one block more than
        its length needs. Releasing up to a position inside a block keeps that block.
        """
        if end <= start:
            return 0
        blocks = -(-end // layout.block_tokens) - start // layout.block_tokens
        return blocks * stride_bytes(layout.block_bytes)

    def reserve(self, last: int) -> None:
        """Allocates the blocks of ``[start, last)``, so that ``segments(last)`` is valid before the tokens
        are written. Idempotent. Raises Full, and allocates nothing, if they do not fit."""
        missing = self._missing_blocks(last)
        if missing:
            extents = self._arena.allocate(missing, self._layout.block_bytes)
            self._take_blocks([base for extent in extents for base in extent.block_bases])

    def append(self, layer: int, position: int, k: Tensor, v: Tensor) -> None:
        """Copies n tokens of one layer to positions ``[position, position + n)``: k ``[k_heads, n, k_dim]``,
        v ``[v_heads, n, v_dim]``; see :mod:`farshore.kvstore.store.layout.forms` for their dtypes.

        Allocates blocks as needed; after Full nothing is written. Scratch may be written again.
        InvalidRequest below ``end``, and beyond the layer's next token, which would leave a gap.
        """
        last = position + forms.check_tokens(self._layout, layer, k, v)
        self._check_append(layer, position)
        self.reserve(last)
        blocks.copy_in(self._arena.memory, self._layout, self._blocks, layer=layer, first=position, k=k, v=v)
        self._marks[_WRITTEN + layer] = max(self._marks[_WRITTEN + layer], last)

    def _check_append(self, layer: int, position: int) -> None:
        """InvalidRequest unless ``position`` is scratch and the layer has every token below it."""
        if not self.end <= position <= self._marks[_WRITTEN + layer]:
            raise InvalidRequest(
                f"layer {layer} at position {position}: append from {self.end} (complete below)"
                f" to {self._marks[_WRITTEN + layer]} (the layer's next token)"
            )

    def advance(self, end: int) -> None:
        """Makes ``[start, end)`` complete. InvalidRequest if a layer lacks tokens of it, and for an end below
        the present one."""
        written = min(self._marks[_WRITTEN:])
        if not self.end <= end <= written:
            raise InvalidRequest(f"cannot advance from {self.end} to {end}: layers are written to {written}")
        self._marks[_END] = end

    def truncate(self, end: int) -> None:
        """Discards all tokens from ``end`` on, with scratch and reservations, and frees their blocks.
        InvalidRequest outside of ``[start, end]``."""
        if not self._start <= end <= self.end:
            raise InvalidRequest(f"cannot truncate to {end}: the tail is [{self._start}, {self.end})")
        written = [min(written, end) for written in self._marks[_WRITTEN:]]
        self._marks[_END:] = array("q", [end, *written])
        keep = self._blocks_below(end) if end > self._start else 0
        freed = [block for block in self._blocks if block >= keep]
        self._marks[_FREED] += bool(freed)
        self._free_blocks(freed)

    def fork(self) -> "Tail":
        """Copies ``[start, end)``, without scratch, to another tail. The copy is complete, for any thread.
        Raises Full, and allocates nothing, if the copy does not fit."""
        copy = Tail(arena=self._arena, layout=self._layout, start=self._start)
        copy.reserve(self.end)
        memory, size = self._arena.memory, self._layout.block_bytes
        for index, base in copy._blocks.items():
            source = self._blocks[index]
            memory[base : base + size] = memory[source : source + size]
        finish_calls(memory.device)
        copy._marks[_END:] = array("q", [self.end] * (1 + self._layout.layers))
        return copy

    def segments(self, last: int | None = None) -> Segments:
        """Locates positions ``[start, last)`` in the arena's memory: one segment per run of adjacent
        blocks, none for an empty range. ``last``: ``end`` by default, at most the reserved end; else
        InvalidRequest."""
        last = self.end if last is None else last
        if last < self._start or (last > self._start and self._blocks_below(last) - 1 not in self._blocks):
            raise InvalidRequest(f"position {last} is not in the tail from {self._start}: reserve it first")
        return blocks.to_segments(
            self._layout, self._blocks, first=self._start, last=last, position=self._start, group0=0
        )

    def read(
        self, layer: int, first: int, last: int, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Copies of positions ``[first, last)`` of one layer: k ``[k_heads, n, k_dim]``, v
        ``[v_heads, n, v_dim]``; in ``dtype`` as in :func:`farshore.kvstore.store.layout.blocks.copy_out`.

        InvalidRequest outside of ``[start, end)``."""
        forms.check_layer(self._layout, layer)
        k, v = self._read(range(layer, layer + 1), first, last, dtype, threads=1)
        return k[0], v[0]

    def read_layers(
        self, first: int, last: int, *, dtype: torch.dtype | None = None, threads: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Like :meth:`read`, for all layers in one call: k ``[layers, k_heads, n, k_dim]``, v
        ``[layers, v_heads, n, v_dim]``. ``threads`` share the copy."""
        return self._read(range(self._layout.layers), first, last, dtype, threads)

    def release_below(self, position: int) -> None:
        """Moves ``start`` to ``position`` and frees the blocks that lie completely below it. InvalidRequest
        outside of ``[start, end]``."""
        if not self._start <= position <= self.end:
            raise InvalidRequest(f"cannot release below {position}: the tail is [{self._start}, {self.end})")
        self._start = position
        first_block = position // self._layout.block_tokens
        self._free_blocks([block for block in self._blocks if block < first_block])

    def free(self) -> None:
        """Frees all memory. The tail is then empty, at ``start``. Idempotent."""
        self.truncate(self._start)

    def _missing_blocks(self, last: int) -> int:
        """How many blocks ``[start, last)`` needs beyond those that the tail has."""
        if last <= self._start:
            return 0
        reserved = self._start // self._layout.block_tokens + len(self._blocks)
        return max(0, self._blocks_below(last) - reserved)

    def _take_blocks(self, bases: list[int]) -> None:
        """Appends blocks that the caller allocated to the tail."""
        first_block = self._start // self._layout.block_tokens
        for base in bases:
            self._blocks[first_block + len(self._blocks)] = base

    def _read(
        self, layers: range, first: int, last: int, dtype: torch.dtype | None, threads: int
    ) -> tuple[Tensor, Tensor]:
        if not self._start <= first <= last <= self.end:
            raise InvalidRequest(f"positions {first} to {last}: the tail is [{self._start}, {self.end})")
        return blocks.copy_out(
            self._arena.memory,
            self._layout,
            self._blocks,
            layers=layers,
            first=first,
            last=last,
            dtype=dtype,
            threads=threads,
        )

    def _blocks_below(self, position: int) -> int:
        """Index of the first block that lies completely at or above ``position``."""
        return -(-position // self._layout.block_tokens)

    def _free_blocks(self, indices: list[int]) -> None:
        self._arena.free([Extent(self._blocks.pop(index), 1, self._stride) for index in indices])


class _TailAppend(NamedTuple):
    """One tail's share of a batch: its rows, and the consecutive positions ``[first, last)`` that they go
    to."""

    tail: Tail
    row: int
    """Index in the batch of the first row."""
    first: int
    last: int
    freed: int
    """How often the tail had freed blocks when the batch was made (its ``_FREED`` mark)."""


class TailBatch:
    """The tokens that a decode step appends: row i goes to ``positions[i]`` of ``tails[i]``.

    The constructor reserves blocks for all rows, or raises Full and reserves none. All tails have one arena
    and one layout. The rows of one tail are adjacent and have consecutive positions, the first at or above
    its end; otherwise InvalidRequest. After a tail was truncated and lost blocks, its batches refuse to
    append. For the engine's thread.
    """

    def __init__(self, tails: Sequence[Tail], positions: Sequence[int]) -> None:
        appends = _grouped_by_tail(tails, positions)
        self._rows = len(tails)
        self._layout = tails[0]._layout
        _reserve(appends)
        self._appends = [append._replace(freed=append.tail._marks[_FREED]) for append in appends]
        self._native = blocks.native_for(tails[0]._arena.memory) and self._native_batch()

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Copies one layer of every row: k ``[R, k_heads, k_dim]``, v ``[R, v_heads, v_dim]``, as elements in
        a dtype that :mod:`farshore.kvstore.store.layout.forms` takes, or as stored.

        InvalidRequest, and nothing is written, for other shapes and dtypes, if a tail was truncated, or if
        the layer would get a gap. May be repeated.
        """
        self.bind(k, v)(layer)

    def bind(self, k: Tensor, v: Tensor) -> Callable[[int], None]:
        """Returns a function that appends k and v, with their content at the time of its call, to the layer
        that it is given, like :meth:`append`. Their shapes are checked once, here. The function keeps k and v
        alive."""
        forms.check_tokens(self._layout, 0, k.transpose(0, 1), v.transpose(0, 1))
        if k.shape[0] != self._rows:
            raise InvalidRequest(f"k and v of {k.shape[0]} rows: the batch has {self._rows}")
        if self._native is None:
            return lambda layer: self._append_each(layer, k, v)
        if k.stride(-1) != 1 or v.stride(-1) != 1:
            return lambda layer: self.append(layer, blocks.dense_rows(k), blocks.dense_rows(v))
        sources = (
            blocks.native_type(self._layout, k),
            blocks.native_rows(k.transpose(0, 1)[None]),
            blocks.native_rows(v.transpose(0, 1)[None]),
        )
        return partial(self._append_native, sources, (k, v))

    def slots(self) -> list[tuple[int, int]]:
        """(byte offset of the block, slot in the block) of each row, for a caller that writes the rows itself
        and calls :meth:`mark`."""
        return [
            (append.tail._blocks[position // self._layout.block_tokens], position % self._layout.block_tokens)
            for append in self._appends
            for position in range(append.first, append.last)
        ]

    def mark(self, layers: range) -> None:
        """Notes that work is submitted that writes adjacent ``layers`` of every row. Raises as
        :meth:`append`, and notes nothing then."""
        forms.check_layer(self._layout, layers[0])
        forms.check_layer(self._layout, layers[-1])
        marked = slice(_WRITTEN + layers[0], _WRITTEN + layers[-1] + 1)
        for append in self._appends:
            written = append.tail._marks[marked]
            self._check(append, layers[written.index(min(written))])
        for append in self._appends:
            written = append.tail._marks[marked]
            if max(written) > append.last:  # Rare: scratch is written again, by fewer rows.
                written = array("q", [max(last, append.last) for last in written])
            else:
                written = array("q", [append.last]) * len(layers)
            append.tail._marks[marked] = written

    def _append_native(self, sources: tuple[Any, ...], kept: tuple[Tensor, Tensor], layer: int) -> None:
        """``sources``: type, k and v of the native append: addresses and strides of the tensors in ``kept``,
        which this argument keeps alive."""
        forms.check_layer(self._layout, layer)
        refused = blocks.native.append(self._native, layer, *sources)
        if refused is not None:
            self._check(self._appends[refused], layer)

    def _append_each(self, layer: int, k: Tensor, v: Tensor) -> None:
        forms.check_layer(self._layout, layer)
        for append in self._appends:
            self._check(append, layer)
        for append in self._appends:
            rows = slice(append.row, append.row + append.last - append.first)
            append.tail.append(layer, append.first, k[rows].transpose(0, 1), v[rows].transpose(0, 1))

    def _check(self, append: _TailAppend, layer: int) -> None:
        """InvalidRequest unless the tail takes its rows in this layer."""
        if append.freed != append.tail._marks[_FREED]:
            raise InvalidRequest(
                f"the tail was truncated to {append.tail.end} since the batch: make a new one"
            )
        append.tail._check_append(layer, append.first)

    def _native_batch(self) -> object:
        """The native module's counterpart of this batch."""
        slots: list[int] = []
        marks: list[int] = []
        for tail, _, first, last, _ in self._appends:
            slots += blocks.slot_ranges(self._layout, tail._blocks, first, last)
            marks += (tail._marks.buffer_info()[0], first, last)
        memory = self._appends[0].tail._arena.memory
        return blocks.native.batch(
            tails=marks,
            layout=blocks.native_layout(self._layout),
            memory=address(memory),
            blocks=slots,
        )


def _grouped_by_tail(tails: Sequence[Tail], positions: Sequence[int]) -> list[_TailAppend]:
    """One entry per tail, in the order of its rows. InvalidRequest for rows that make no batch."""
    if not tails or len(tails) != len(positions):
        raise InvalidRequest(f"{len(tails)} tails, {len(positions)} positions: give one of each per row")
    found: list[_TailAppend] = []
    seen: set[int] = set()
    for row, (tail, position) in enumerate(zip(tails, positions, strict=True)):
        if found and found[-1].tail is tail and found[-1].last == position:
            found[-1] = found[-1]._replace(last=position + 1)
            continue
        if id(tail) in seen or position < tail.end:
            raise InvalidRequest(
                f"row {row} at position {position} of a tail that ends at {tail.end}: give its rows one after"
                " the other, at following positions from the end on"
            )
        if tail.layout != tails[0]._layout or tail._arena is not tails[0]._arena:
            raise InvalidRequest("tails of different layouts or arenas: make a batch for each")
        seen.add(id(tail))
        found.append(_TailAppend(tail, row, position, position + 1, 0))
    return found


def _reserve(appends: list[_TailAppend]) -> None:
    """Allocates the missing blocks of all tails in one call, so that Full leaves none of them changed."""
    missing = [append.tail._missing_blocks(append.last) for append in appends]
    if not any(missing):
        return
    first_tail = appends[0].tail
    extents = first_tail._arena.allocate(sum(missing), first_tail.layout.block_bytes)
    bases = [base for extent in extents for base in extent.block_bases]
    for append, count in zip(appends, missing, strict=True):
        append.tail._take_blocks(bases[:count])
        del bases[:count]
