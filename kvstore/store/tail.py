"""The newest tokens of one sequence, in the engine's own arena.

The engine appends here in every decode step and attends to it next to the remote spans; when blocks are full
it reads them, writes them to a shard, seals them there and releases them here. Same blocks as a span's, so
kernels read both alike. It must not know shards, epochs, or what is committed.

Positions are absolute, and blocks are aligned to them::

    start ............. end ............... reserved
    | complete          | scratch: any layer's next tokens |

A decode step appends one row each to many tails: :class:`TailBatch`, one native call a layer.
"""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.kernels.base import KVLayout, Segments
from farshore.kvstore.store import blocks, forms
from farshore.kvstore.store.arena import Arena, Extent, stride_bytes

# Indices into a tail's marks, which native appends check and move too (`Growth` in native/copy.h).
_FREED, _END, _WRITTEN = 0, 1, 2


class Tail:
    """Tokens ``[start, end)`` of every layer and group of one layer class, and scratch above.

    For one thread, the engine's. One exception: ``read`` below ``end`` may run in another (the hand-off),
    as long as the engine does not release, truncate or free those positions meanwhile.
    """

    def __init__(self, *, arena: Arena, layout: KVLayout, start: int) -> None:
        if start < 0:
            raise InvalidRequest(f"a tail cannot start at position {start}: positions count from 0")
        forms.check_layout(layout)
        self._arena = arena
        self._layout = layout
        self._stride = stride_bytes(layout.block_bytes)
        self._start = start
        # How often blocks at or above the end were freed; the end; per layer, the end of what was written
        # without a hole since `start`.
        self._marks = array("q", [0, start, *[start] * layout.layers])
        # position // block_tokens -> base of the block; consecutive from start's block on.
        self._blocks: dict[int, int] = {}

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self._start

    @property
    def end(self) -> int:
        """One past the last token that every layer has."""
        return self._marks[_END]

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def bases(self) -> tuple[int, ...]:
        """Where its blocks lie in the arena's memory, reserved ones included, in token order."""
        return tuple(self._blocks.values())

    @property
    def bytes(self) -> int:
        """Memory held, reserved scratch included."""
        return len(self._blocks) * self._stride

    @staticmethod
    def bytes_for(layout: KVLayout, start: int, end: int) -> int:
        """Arena memory that a tail takes once ``[start, end)`` is reserved: every block that a position lies
        in, in whole pages. 0 for an empty range.

        Blocks are aligned to position 0, so a tail that starts in mid-block takes one block more than its
        length alone asks for. Releasing up to a position in mid-block keeps that position's block.
        """
        if end <= start:
            return 0
        blocks = -(-end // layout.block_tokens) - start // layout.block_tokens
        return blocks * stride_bytes(layout.block_bytes)

    def reserve(self, last: int) -> None:
        """Allocates the blocks of ``[start, last)``, so that ``segments(last)`` is valid before the data is
        written. Idempotent. Full: nothing was allocated."""
        missing = self._missing_blocks(last)
        if missing:
            extents = self._arena.allocate(missing, self._layout.block_bytes)
            self._take_blocks([base for extent in extents for base in extent.block_bases])

    def append(self, layer: int, position: int, k: Tensor, v: Tensor) -> None:
        """Copies n tokens of one layer in, at ``position``: k ``[k_heads, n, k_dim]``, v likewise; see
        :mod:`farshore.kvstore.store.forms` for their dtypes.

        Allocates as needed (Full: nothing was written). Scratch may be overwritten; InvalidRequest below
        ``end``, or where it would leave a hole behind the layer's newest token.
        """
        last = position + forms.check_tokens(self._layout, layer, k, v)
        self._check_append(layer, position)
        self.reserve(last)
        blocks.copy_in(self._arena.memory, self._layout, self._blocks, layer=layer, first=position, k=k, v=v)
        self._marks[_WRITTEN + layer] = max(self._marks[_WRITTEN + layer], last)

    def _check_append(self, layer: int, position: int) -> None:
        """InvalidRequest unless a token at ``position`` is scratch, and no hole is below it."""
        if not self.end <= position <= self._marks[_WRITTEN + layer]:
            raise InvalidRequest(
                f"layer {layer} at position {position}: append from {self.end} (complete below)"
                f" to {self._marks[_WRITTEN + layer]} (the layer's next token)"
            )

    def advance(self, end: int) -> None:
        """Makes ``[start, end)`` complete. InvalidRequest if a layer lags behind, or the end would shrink."""
        written = min(self._marks[_WRITTEN:])
        if not self.end <= end <= written:
            raise InvalidRequest(f"cannot advance from {self.end} to {end}: layers are written to {written}")
        self._marks[_END] = end

    def truncate(self, end: int) -> None:
        """Forgets everything from ``end`` on, scratch and reservations included, and frees its blocks."""
        if not self._start <= end <= self.end:
            raise InvalidRequest(f"cannot truncate to {end}: the tail is [{self._start}, {self.end})")
        written = [min(written, end) for written in self._marks[_WRITTEN:]]
        self._marks[_END:] = array("q", [end, *written])
        keep = self._blocks_below(end) if end > self._start else 0
        freed = [block for block in self._blocks if block >= keep]
        self._marks[_FREED] += bool(freed)
        self._free_blocks(freed)

    def fork(self) -> "Tail":
        """Another tail with copies of ``[start, end)``, and no scratch. Full: nothing was allocated."""
        copy = Tail(arena=self._arena, layout=self._layout, start=self._start)
        copy.reserve(self.end)
        memory, size = self._arena.memory, self._layout.block_bytes
        for index, base in copy._blocks.items():
            source = self._blocks[index]
            memory[base : base + size] = memory[source : source + size]
        copy._marks[_END:] = array("q", [self.end] * (1 + self._layout.layers))
        return copy

    def segments(self, last: int | None = None) -> Segments:
        """Where ``[start, last)`` lies in the arena's memory; ``last`` is ``end`` if not given, and may reach
        as far as is reserved. One segment per run of adjacent blocks; of an empty range none."""
        last = self.end if last is None else last
        if last < self._start or (last > self._start and self._blocks_below(last) - 1 not in self._blocks):
            raise InvalidRequest(f"position {last} is not in the tail from {self._start}: reserve it first")
        return blocks.describe(
            self._layout, self._blocks, first=self._start, last=last, position=self._start, group0=0
        )

    def read(
        self, layer: int, first: int, last: int, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Copies of positions ``[first, last)``, all complete: k ``[k_heads, n, k_dim]``, v likewise; in
        ``dtype`` as in :func:`farshore.kvstore.store.blocks.copy_out`.

        InvalidRequest outside of ``[start, end)``."""
        forms.check_layer(self._layout, layer)
        k, v = self._read(range(layer, layer + 1), first, last, dtype, threads=1)
        return k[0], v[0]

    def read_layers(
        self, first: int, last: int, *, dtype: torch.dtype | None = None, threads: int = 1
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`read`, of all layers in one call: k ``[layers, k_heads, n, k_dim]``, v likewise."""
        return self._read(range(self._layout.layers), first, last, dtype, threads)

    def release_below(self, position: int) -> None:
        """Moves ``start`` up to ``position`` and frees the blocks wholly below it. InvalidRequest outside of
        ``[start, end]``."""
        if not self._start <= position <= self.end:
            raise InvalidRequest(f"cannot release below {position}: the tail is [{self._start}, {self.end})")
        self._start = position
        first_block = position // self._layout.block_tokens
        self._free_blocks([block for block in self._blocks if block < first_block])

    def free(self) -> None:
        """Gives all memory back; the tail is empty at ``start`` then. Idempotent."""
        self.truncate(self._start)

    def _missing_blocks(self, last: int) -> int:
        """How many blocks ``[start, last)`` needs beyond those held."""
        if last <= self._start:
            return 0
        held = self._start // self._layout.block_tokens + len(self._blocks)
        return max(0, self._blocks_below(last) - held)

    def _take_blocks(self, bases: list[int]) -> None:
        """Blocks that the caller allocated become the tail's next ones."""
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
        """Index of the first block wholly at or above ``position``."""
        return -(-position // self._layout.block_tokens)

    def _free_blocks(self, indices: list[int]) -> None:
        self._arena.free([Extent(self._blocks.pop(index), 1, self._stride) for index in indices])


class _Stretch(NamedTuple):
    """Rows of one tail, at following positions."""

    tail: Tail
    row: int
    first: int
    last: int
    freed: int
    """The tail's mark when the batch was made."""


class TailBatch:
    """What a decode step appends: one row to each of ``tails`` at its one of ``positions``.

    Blocks are reserved for all of them or, with Full, for none. The tails share an arena and a layout. One
    tail's rows come one after the other, at following positions from its end on; else InvalidRequest. If a
    truncated tail loses blocks, its batches refuse to append. For the engine's thread.
    """

    def __init__(self, tails: Sequence[Tail], positions: Sequence[int]) -> None:
        stretches = _stretches(tails, positions)
        self._rows = len(tails)
        self._layout = tails[0]._layout
        _reserve(stretches)
        self._stretches = [it._replace(freed=it.tail._marks[_FREED]) for it in stretches]
        self._native = blocks.native_for(tails[0]._arena.memory) and self._places()

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """One layer of every row: k ``[R, k_heads, k_dim]``, v ``[R, v_heads, v_dim]``; as elements in any
        dtype that :mod:`farshore.kvstore.store.forms` takes, or as stored.

        InvalidRequest, and nothing is written, for other shapes and dtypes, where a tail was truncated, or
        where the layer would get a hole. Repeating it is fine.
        """
        self.bind(k, v)(layer)

    def bind(self, k: Tensor, v: Tensor) -> Callable[[int], None]:
        """:meth:`append` of the same k and v, whatever they hold by then, to the layer that is given: their
        shapes are checked now, once. What is returned keeps both."""
        forms.check_tokens(self._layout, 0, k.transpose(0, 1), v.transpose(0, 1))
        if k.shape[0] != self._rows:
            raise InvalidRequest(f"k and v of {k.shape[0]} rows: the batch has {self._rows}")
        if self._native is None:
            return lambda layer: self._append_each(layer, k, v)
        if k.stride(-1) != 1 or v.stride(-1) != 1:
            return lambda layer: self.append(layer, blocks.dense_rows(k), blocks.dense_rows(v))
        where = (
            blocks.native_type(self._layout, k),
            blocks.native_rows(k.transpose(0, 1)[None]),
            blocks.native_rows(v.transpose(0, 1)[None]),
        )
        return partial(self._append_native, where, (k, v))

    def _append_native(self, where: tuple[Any, ...], kept: tuple[Tensor, Tensor], layer: int) -> None:
        """``where``: type, k and v of the native append, which are addresses in the tensors ``kept``."""
        forms.check_layer(self._layout, layer)
        refused = blocks.native.append(self._native, layer, *where)
        if refused is not None:
            self._refuse(self._stretches[refused], layer)

    def _append_each(self, layer: int, k: Tensor, v: Tensor) -> None:
        forms.check_layer(self._layout, layer)
        for it in self._stretches:
            if it.freed != it.tail._marks[_FREED]:
                self._refuse(it, layer)
            it.tail._check_append(layer, it.first)
        for it in self._stretches:
            rows = slice(it.row, it.row + it.last - it.first)
            it.tail.append(layer, it.first, k[rows].transpose(0, 1), v[rows].transpose(0, 1))

    def _refuse(self, it: _Stretch, layer: int) -> None:
        if it.freed != it.tail._marks[_FREED]:
            raise InvalidRequest(f"the tail was truncated to {it.tail.end} since the batch: make a new one")
        it.tail._check_append(layer, it.first)

    def _places(self) -> object:
        places: list[int] = []
        marks: list[int] = []
        for it in self._stretches:
            places += blocks.stretches(self._layout, it.tail._blocks, it.first, it.last)
            marks += (it.tail._marks.buffer_info()[0], it.first, it.last)
        memory = self._stretches[0].tail._arena.memory
        return blocks.native.batch(
            tails=marks,
            layout=blocks.native_layout(self._layout),
            memory=memory.data_ptr(),
            blocks=places,
        )


def _stretches(tails: Sequence[Tail], positions: Sequence[int]) -> list[_Stretch]:
    if not tails or len(tails) != len(positions):
        raise InvalidRequest(f"{len(tails)} tails, {len(positions)} positions: give one of each per row")
    found: list[_Stretch] = []
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
        found.append(_Stretch(tail, row, position, position + 1, 0))
    return found


def _reserve(stretches: list[_Stretch]) -> None:
    missing = [it.tail._missing_blocks(it.last) for it in stretches]
    if not any(missing):
        return
    first = stretches[0].tail
    extents = first._arena.allocate(sum(missing), first.layout.block_bytes)
    bases = [base for extent in extents for base in extent.block_bases]
    for it, count in zip(stretches, missing, strict=True):
        it.tail._take_blocks(bases[:count])
        del bases[:count]
