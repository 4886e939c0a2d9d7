"""The newest tokens of one sequence, in the engine's own arena.

The engine appends here in every decode step and attends to it next to the remote spans; when blocks are full
it reads them, writes them to a shard, seals them there and releases them here. Same blocks as a span's, so
kernels read both alike. It must not know shards, epochs, or what is committed.

Positions are absolute, and blocks are aligned to them::

    start ............. end ............... reserved
    | complete          | scratch: any layer's next tokens |
"""

from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.kernels.base import KVLayout, Segments
from farshore.kvstore import blocks
from farshore.kvstore.arena import Arena, Extent, stride_bytes


class Tail:
    """Tokens ``[start, end)`` of every layer and group of one layer class, and scratch above.

    For one thread, the engine's. One exception: ``read`` below ``end`` may run in another (the hand-off),
    as long as the engine does not release, truncate or free those positions meanwhile.
    """

    def __init__(self, *, arena: Arena, layout: KVLayout, start: int) -> None:
        if start < 0:
            raise InvalidRequest(f"a tail cannot start at position {start}: positions count from 0")
        blocks.check_layout(layout)
        self._arena = arena
        self._layout = layout
        self._stride = stride_bytes(layout.block_bytes)
        self._start = start
        self._end = start
        # Per layer, the end of what was written without a hole since `start`.
        self._written = [start] * layout.layers
        # position // block_tokens -> base of the block; consecutive from start's block on.
        self._blocks: dict[int, int] = {}

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self._start

    @property
    def end(self) -> int:
        """One past the last token that every layer has."""
        return self._end

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def bytes(self) -> int:
        """Memory held, reserved scratch included."""
        return len(self._blocks) * self._stride

    def reserve(self, last: int) -> None:
        """Allocates the blocks of ``[start, last)``, so that ``segments(last)`` is valid before the data is
        written. Idempotent. Full: nothing was allocated."""
        first_block = self._start // self._layout.block_tokens
        missing = self._blocks_below(last) - (first_block + len(self._blocks))
        if last <= self._start or missing <= 0:
            return
        for extent in self._arena.allocate(missing, self._layout.block_bytes):
            for base in extent.block_bases:
                self._blocks[first_block + len(self._blocks)] = base

    def append(self, layer: int, position: int, k: Tensor, v: Tensor) -> None:
        """Copies n tokens of one layer in, at ``position``: k ``[k_heads, n, k_dim]``, v likewise.

        Allocates as needed (Full: nothing was written). Scratch may be overwritten; InvalidRequest below
        ``end``, or where it would leave a hole behind the layer's newest token.
        """
        last = position + blocks.check_tokens(self._layout, layer, k, v)
        if not self._end <= position <= self._written[layer]:
            raise InvalidRequest(
                f"layer {layer} at position {position}: append from {self._end} (complete below)"
                f" to {self._written[layer]} (the layer's next token)"
            )
        self.reserve(last)
        blocks.copy_in(self._arena.memory, self._layout, self._blocks, layer=layer, first=position, k=k, v=v)
        self._written[layer] = max(self._written[layer], last)

    def advance(self, end: int) -> None:
        """Makes ``[start, end)`` complete. InvalidRequest if a layer lags behind, or the end would shrink."""
        if not self._end <= end <= min(self._written):
            raise InvalidRequest(
                f"cannot advance from {self._end} to {end}: layers are written to {min(self._written)}"
            )
        self._end = end

    def truncate(self, end: int) -> None:
        """Forgets everything from ``end`` on, scratch and reservations included, and frees its blocks."""
        if not self._start <= end <= self._end:
            raise InvalidRequest(f"cannot truncate to {end}: the tail is [{self._start}, {self._end})")
        self._end = end
        self._written = [min(written, end) for written in self._written]
        keep = self._blocks_below(end) if end > self._start else 0
        self._free_blocks([block for block in self._blocks if block >= keep])

    def fork(self) -> "Tail":
        """Another tail with copies of ``[start, end)``, and no scratch. Full: nothing was allocated."""
        copy = Tail(arena=self._arena, layout=self._layout, start=self._start)
        copy.reserve(self._end)
        memory, size = self._arena.memory, self._layout.block_bytes
        for index, base in copy._blocks.items():
            source = self._blocks[index]
            memory[base : base + size] = memory[source : source + size]
        copy._end = self._end
        copy._written = [self._end] * self._layout.layers
        return copy

    def segments(self, last: int | None = None) -> Segments:
        """Where ``[start, last)`` lies in the arena's memory; ``last`` is ``end`` if not given, and may reach
        as far as is reserved. One segment per run of adjacent blocks; of an empty range none."""
        last = self._end if last is None else last
        if last < self._start or (last > self._start and self._blocks_below(last) - 1 not in self._blocks):
            raise InvalidRequest(f"position {last} is not in the tail from {self._start}: reserve it first")
        return blocks.describe(
            self._layout, self._blocks, first=self._start, last=last, position=self._start, group0=0
        )

    def read(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Copies of positions ``[first, last)``, all complete: k ``[k_heads, n, k_dim]``, v likewise.

        InvalidRequest outside of ``[start, end)``."""
        if not self._start <= first <= last <= self._end:
            raise InvalidRequest(f"positions {first} to {last}: the tail is [{self._start}, {self._end})")
        blocks.check_layer(self._layout, layer)
        return blocks.copy_out(
            self._arena.memory, self._layout, self._blocks, layer=layer, first=first, last=last
        )

    def release_below(self, position: int) -> None:
        """Moves ``start`` up to ``position`` and frees the blocks wholly below it. InvalidRequest outside of
        ``[start, end]``."""
        if not self._start <= position <= self._end:
            raise InvalidRequest(f"cannot release below {position}: the tail is [{self._start}, {self._end})")
        self._start = position
        first_block = position // self._layout.block_tokens
        self._free_blocks([block for block in self._blocks if block < first_block])

    def free(self) -> None:
        """Gives all memory back; the tail is empty at ``start`` then. Idempotent."""
        self.truncate(self._start)

    def _blocks_below(self, position: int) -> int:
        """Index of the first block wholly at or above ``position``."""
        return -(-position // self._layout.block_tokens)

    def _free_blocks(self, indices: list[int]) -> None:
        self._arena.free([Extent(self._blocks.pop(index), 1, self._stride) for index in indices])
