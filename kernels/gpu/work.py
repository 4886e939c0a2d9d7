"""Cuts a work list into tiles of about equal work, on the CPU. Called by ``ops.plan``.

A *pair* is one K head and one V head of a head group, with the query heads that share both; a group has K
heads x V heads of them. Pairs are counted from the first group of the call (``group0``). Must not know the
device. Its arrays are numpy's, whose calls take a fifth of PyTorch's time on arrays as small as these.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farshore.kernels.base import AttentionSpec, Segments, WorkList

_LEAST_CAPACITY = 32


class Heads(NamedTuple):
    """How query heads are cut into pairs and tiles."""

    pairs_per_group: int
    heads: int
    """Query heads of a pair."""
    tile_heads: int
    """Query heads of a tile: all of a pair, or the queries of a wide tile if the pair has more."""

    @classmethod
    def of(cls, spec: AttentionSpec, *, wide_m: int) -> "Heads":
        # A group's numbers of K and V heads have no common divisor, so every pair has equally many queries.
        pairs = (spec.k_heads // spec.groups) * (spec.v_heads // spec.groups)
        heads = spec.q_heads_per_group // pairs
        return cls(pairs, heads, min(heads, wide_m))

    @property
    def head_tiles(self) -> int:
        return -(-self.heads // self.tile_heads)

    def tile_rows(self, block_m: int) -> int:
        """Most rows of a tile of ``block_m`` queries."""
        return max(block_m // self.tile_heads, 1)


Ints = NDArray[np.integer[Any]]

# Columns of the tiles.
_START, _STOP = 5, 6


class Items(NamedTuple):
    """The items of a work list, i64[W] each."""

    row: Ints
    rows: Ints
    segment: Ints
    group0: Ints
    group1: Ints

    def visible(self, segments: Segments, positions: Tensor, window: int | None) -> tuple[Ints, Ints]:
        """(start, stop) of each item: the tokens of its segment that at least one of its rows can see. The
        kernel masks those that a row cannot see."""
        if not self.row.size:
            return self.row, self.row
        # One position more, because an item's end may not be an index otherwise. It belongs to no item.
        position = np.append(_array(positions), 0)
        borders = np.stack([self.row, self.row + self.rows], axis=1).reshape(-1)
        first = _array(segments.position)[self.segment]
        latest = np.maximum.reduceat(position, borders)[::2]
        stop = np.minimum(_array(segments.count)[self.segment], latest - first + 1)
        if window is None:
            return np.zeros_like(stop), stop
        earliest = np.minimum.reduceat(position, borders)[::2]
        return np.maximum(earliest - window + 1 - first, 0), stop


class Edges(NamedTuple):
    """Where the ranges of items begin and end among the tiles: what moves when tails grow."""

    items: Items
    """The whole work list."""
    seen: NDArray[np.bool_]
    """[W]: whether an item has tiles."""
    begins: Ints
    """Indices of the tiles that an item's range begins with ..."""
    begun: Ints
    """... and those items."""
    ends: Ints
    """Indices of the tiles that an item's range ends with ..."""
    ended: Ints
    """... and those items."""
    chunk: int
    """Most tokens of a tile."""


class TileList(NamedTuple):
    """T tiles, and for each (row, pair, tile of heads) the list of split states to merge."""

    tiles: Ints
    """i32[T, 8]: row, rows, segment, pair, first head in the pair, tokens start .. stop of the segment, slot
    of the first state; narrow tiles first"""
    narrow: int
    """Number of tiles with at most NARROW_M queries."""
    slots: Ints
    """i32: the slots of each list's split states, in the order of the work list"""
    starts: Ints
    """i32[R * pairs * head_tiles + 1]: where each list begins in ``slots``"""
    split_states: int
    """Number of slots. A slot holds the state of one query over one split."""
    edges: Edges

    def padded(self, heads: Heads, *, narrow_m: int, wide_m: int) -> "TileList":
        """The same list with numbers of tiles, slots and states that few lists have. A surplus tile is zero:
        it has no rows, reads nothing and writes nothing."""
        count = len(self.tiles)
        narrow, wide = capacity(self.narrow), capacity(count - self.narrow)
        tiles = np.zeros((narrow + wide, self.tiles.shape[1]), self.tiles.dtype)
        tiles[: self.narrow] = self.tiles[: self.narrow]
        tiles[narrow : narrow + count - self.narrow] = self.tiles[self.narrow :]
        rows = narrow * heads.tile_rows(narrow_m) + wide * heads.tile_rows(wide_m)
        slots = np.zeros(rows, self.slots.dtype)
        slots[: len(self.slots)] = self.slots
        begins, ends = (
            np.where(tile < self.narrow, tile, tile + narrow - self.narrow)
            for tile in (self.edges.begins, self.edges.ends)
        )
        edges = self.edges._replace(begins=begins, ends=ends)
        return TileList(tiles, narrow, slots, self.starts, rows * heads.tile_heads, edges)

    def advance(self, segments: Segments, positions: Tensor, spec: AttentionSpec) -> bool:
        """Moves the borders of the tiles to where ``positions`` and the segments' counts are now; everything
        else depends on neither. Returns False, and leaves tiles of no meaning, if the list must be made anew:
        an item begins or ceases to be seen, or a tile would become empty or longer than the others."""
        tiles, edges = self.tiles, self.edges
        start, stop = edges.items.visible(segments, positions, spec.window_tokens)
        if not np.array_equal(stop > start, edges.seen):
            return False
        tiles[edges.begins, _START] = start[edges.begun]
        tiles[edges.ends, _STOP] = stop[edges.ended]
        lengths = [tiles[moved, _STOP] - tiles[moved, _START] for moved in (edges.begins, edges.ends)]
        return all(((length > 0) & (length <= edges.chunk)).all() for length in lengths)


def capacity(count: int) -> int:
    """0, or the least of 32, 64, 128 and so on that ``count`` fits into."""
    return max(_LEAST_CAPACITY, 1 << (count - 1).bit_length()) if count else 0


def flatten(
    work: WorkList,
    segments: Segments,
    spec: AttentionSpec,
    heads: Heads,
    positions: Tensor,
    *,
    group0: int,
    group1: int,
    narrow_m: int,
    wide_m: int,
    block_n: int,
    processors: int,
) -> TileList:
    """Cuts the work list into tiles of at most ``wide_m`` queries on about equally many tokens, about four
    tiles per processor of the device. Raises ValueError for work outside a segment's groups or the rows."""
    items = Items(*(_array(field).astype(np.int64) for field in work))
    n_rows, n_pairs = positions.numel(), (group1 - group0) * heads.pairs_per_group
    _check(items, segments, n_rows, group0, group1)
    all_starts, all_stops = items.visible(segments, positions, spec.window_tokens)
    seen = all_stops > all_starts
    listed = seen.nonzero()[0]
    row, count, segment, g0, g1 = (field[listed] for field in items)
    start, stop = all_starts[listed], all_stops[listed]

    # The order of an item's tiles is tokens outermost, rows innermost, so that tiles that read the same keys
    # run at the same time and share the L2 cache.
    item_narrow = count * heads.tile_heads <= narrow_m
    tile_rows = np.where(item_narrow, heads.tile_rows(narrow_m), heads.tile_rows(wide_m))
    row_tiles = -(-count // tile_rows)
    pairs = (g1 - g0) * heads.pairs_per_group
    tokens = int(((stop - start) * row_tiles * pairs).sum()) * heads.head_tiles
    chunk = -(-max(tokens // (4 * processors), 1) // block_n) * block_n
    splits = -(-(stop - start) // chunk)

    item, rest = _spread(splits * pairs * heads.head_tiles * row_tiles)
    rest, row_tile = np.divmod(rest, row_tiles[item])
    rest, head_tile = np.divmod(rest, heads.head_tiles)
    split, pair = np.divmod(rest, pairs[item])
    pair += (g0[item] - group0) * heads.pairs_per_group

    tile_row = row[item] + row_tile * tile_rows[item]
    rows_here = np.minimum(tile_rows[item], count[item] - row_tile * tile_rows[item])
    tile_start = start[item] + split * chunk
    tile_stop = np.minimum(stop[item], tile_start + chunk)
    slots = rows_here * heads.tile_heads
    slot = slots.cumsum() - slots
    head0 = head_tile * heads.tile_heads
    columns = [tile_row, rows_here, segment[item], pair, head0, tile_start, tile_stop, slot]

    tile, nth = _spread(rows_here)
    list_index = ((tile_row[tile] + nth) * n_pairs + pair[tile]) * heads.head_tiles + head_tile[tile]
    order = np.argsort(list_index, kind="stable")
    listed_slots = (slot[tile] + nth * heads.tile_heads)[order]
    lengths = np.bincount(list_index, minlength=n_rows * n_pairs * heads.head_tiles)
    starts = np.concatenate([[0], lengths.cumsum()])

    narrow = item_narrow[item]
    by_width = np.concatenate([narrow.nonzero()[0], (~narrow).nonzero()[0]])
    begins = (split[by_width] == 0).nonzero()[0]
    ends = (split[by_width] == (splits - 1)[item[by_width]]).nonzero()[0]
    begun, ended = (listed[item[by_width[tiles]]] for tiles in (begins, ends))
    return TileList(
        tiles=np.stack(columns, axis=1)[by_width].astype(np.int32),
        narrow=int(narrow.sum()),
        slots=listed_slots.astype(np.int32),
        starts=starts.astype(np.int32),
        split_states=int(slots.sum()),
        edges=Edges(items, seen, begins, begun, ends, ended, chunk),
    )


def _check(items: Items, segments: Segments, n_rows: int, group0: int, group1: int) -> None:
    row, count, segment, g0, g1 = items
    stored0, stored1 = _array(segments.group0)[segment], _array(segments.group1)[segment]
    wrong = ((g0 < stored0) | (g0 >= g1) | (g1 > stored1) | (g0 < group0) | (g1 > group1)).nonzero()[0]
    if wrong.size:
        i = wrong[0]
        raise ValueError(f"groups {g0[i]}..{g1[i]} asked of a segment holding {stored0[i]}..{stored1[i]}")
    if ((row < 0) | (count < 1) | (row + count > n_rows)).any():
        raise ValueError(f"work for rows that are not among the step's {n_rows}")


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """All (i, n) with n in 0 .. counts[i], in order, as two arrays."""
    i = np.repeat(np.arange(counts.size), counts)
    return i, np.arange(i.size) - (counts.cumsum() - counts)[i]


def _array(field: Tensor) -> Ints:
    """The values of a tensor, which share its memory if it lies on the host."""
    return field.cpu().numpy()
