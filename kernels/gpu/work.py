"""Cuts a work list into tiles of about equal work, on the CPU. Called by ``ops.plan``.

A *pair* is one K head and one V head of a head group, with the query heads that share both; a group has K
heads x V heads of them. Pairs are counted from the first group of the call (``group0``). Must not know the
device.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from farshore.kernels.base import AttentionSpec, Segments, WorkList
from farshore.kernels.host import HOST

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


class TileList(NamedTuple):
    """T tiles, and for each (row, pair, tile of heads) the list of split states to merge."""

    tiles: Tensor
    """i32[T, 8]: row, rows, segment, pair, first head in the pair, tokens start .. stop of the segment, slot
    of the first state; narrow tiles first"""
    narrow: int
    """Number of tiles with at most NARROW_M queries."""
    slots: Tensor
    """i32: the slots of each list's split states, in the order of the work list"""
    starts: Tensor
    """i32[R * pairs * head_tiles + 1]: where each list begins in ``slots``"""
    split_states: int
    """Number of slots. A slot holds the state of one query over one split."""

    def padded(self, heads: Heads, *, narrow_m: int, wide_m: int) -> "TileList":
        """The same list with numbers of tiles, slots and states that few lists have. A surplus tile is zero:
        it has no rows, reads nothing and writes nothing."""
        count = len(self.tiles)
        narrow, wide = capacity(self.narrow), capacity(count - self.narrow)
        tiles = self.tiles.new_zeros(narrow + wide, self.tiles.shape[1])
        tiles[: self.narrow] = self.tiles[: self.narrow]
        tiles[narrow : narrow + count - self.narrow] = self.tiles[self.narrow :]
        rows = narrow * heads.tile_rows(narrow_m) + wide * heads.tile_rows(wide_m)
        slots = pad(self.slots, (0, rows - len(self.slots)))
        return TileList(tiles, narrow, slots, self.starts, rows * heads.tile_heads)


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
    row, count, segment, g0, g1 = (field.cpu().long() for field in work)
    n_rows, n_pairs = positions.numel(), (group1 - group0) * heads.pairs_per_group
    _check(row, count, segment, g0, g1, segments, n_rows, group0, group1)
    start, stop = _visible(row, count, segment, segments, positions, spec.window_tokens)
    seen = (stop > start).nonzero()[:, 0]
    row, count, segment, g0, g1, start, stop = (x[seen] for x in (row, count, segment, g0, g1, start, stop))

    # The order of an item's tiles is tokens outermost, rows innermost, so that tiles that read the same keys
    # run at the same time and share the L2 cache.
    item_narrow = count * heads.tile_heads <= narrow_m
    tile_rows = torch.where(item_narrow, heads.tile_rows(narrow_m), heads.tile_rows(wide_m))
    row_tiles = -(-count // tile_rows)
    pairs = (g1 - g0) * heads.pairs_per_group
    tokens = int(((stop - start) * row_tiles * pairs).sum()) * heads.head_tiles
    chunk = -(-max(tokens // (4 * processors), 1) // block_n) * block_n
    splits = -(-(stop - start) // chunk)

    tiles_per_item = splits * pairs * heads.head_tiles * row_tiles
    item = torch.repeat_interleave(torch.arange(len(seen), device=HOST), tiles_per_item)
    rest = torch.arange(len(item), device=HOST) - (tiles_per_item.cumsum(0) - tiles_per_item)[item]
    rest, row_tile = rest // row_tiles[item], rest % row_tiles[item]
    rest, head_tile = rest // heads.head_tiles, rest % heads.head_tiles
    split, pair = rest // pairs[item], rest % pairs[item] + (g0[item] - group0) * heads.pairs_per_group

    tile_row = row[item] + row_tile * tile_rows[item]
    rows_here = torch.minimum(tile_rows[item], count[item] - row_tile * tile_rows[item])
    tile_start = start[item] + split * chunk
    tile_stop = torch.minimum(stop[item], tile_start + chunk)
    slots = rows_here * heads.tile_heads
    slot = slots.cumsum(0) - slots
    head0 = head_tile * heads.tile_heads
    tiles = torch.stack([tile_row, rows_here, segment[item], pair, head0, tile_start, tile_stop, slot], dim=1)

    tile, nth = _spread(rows_here)
    list_index = ((tile_row[tile] + nth) * n_pairs + pair[tile]) * heads.head_tiles + head_tile[tile]
    order = torch.argsort(list_index, stable=True)
    listed_slots = (slot[tile] + nth * heads.tile_heads)[order]
    lengths = torch.bincount(list_index, minlength=n_rows * n_pairs * heads.head_tiles)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    narrow = item_narrow[item]
    tiles = torch.cat([tiles[narrow], tiles[~narrow]])
    return TileList(tiles.int(), int(narrow.sum()), listed_slots.int(), starts.int(), int(slots.sum()))


def _check(row, count, segment, g0, g1, segments: Segments, n_rows: int, group0: int, group1: int) -> None:
    stored0, stored1 = segments.group0.cpu().long()[segment], segments.group1.cpu().long()[segment]
    wrong = ((g0 < stored0) | (g0 >= g1) | (g1 > stored1) | (g0 < group0) | (g1 > group1)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise ValueError(f"groups {g0[i]}..{g1[i]} asked of a segment holding {stored0[i]}..{stored1[i]}")
    if ((row < 0) | (count < 1) | (row + count > n_rows)).any():
        raise ValueError(f"work for rows that are not among the step's {n_rows}")


def _visible(
    row: Tensor, count: Tensor, segment: Tensor, segments: Segments, positions: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """(start, stop) of each item: the tokens of its segment that at least one of its rows can see. The kernel
    masks those that a row cannot see."""
    item, nth = _spread(count)
    position = positions.cpu().long()[row[item] + nth]
    last = torch.zeros_like(row).scatter_reduce(0, item, position, "amax", include_self=False)
    earliest = torch.zeros_like(row).scatter_reduce(0, item, position, "amin", include_self=False)
    first = segments.position.cpu().long()[segment]
    stop = torch.minimum(segments.count.cpu().long()[segment], last - first + 1)
    start = torch.zeros_like(stop) if window is None else (earliest - window + 1 - first).clamp(min=0)
    return start, stop


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, n) with n in 0 .. counts[i], in order, as two tensors."""
    i = torch.repeat_interleave(torch.arange(counts.numel(), device=HOST), counts)
    return i, torch.arange(i.numel(), device=HOST) - (counts.cumsum(0) - counts)[i]
