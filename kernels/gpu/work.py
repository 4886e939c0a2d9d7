"""The host's side of decoding: a step's work list, flattened into one table of equal tiles.

A *unit* is the query heads that share one K head and one V head; K heads x V heads of them make a head group.
Units are counted from the first group that q shows (``group0``). Called by ``ops.plan``; works on the CPU and
knows nothing of the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, Rows, Segments


class Heads(NamedTuple):
    """How query heads are cut into units and tiles."""

    units_per_group: int
    heads: int
    """Query heads of a unit."""
    tile_heads: int
    """Query heads of a tile: a whole unit unless it has more than a wide tile's queries."""

    @classmethod
    def of(cls, spec: AttentionSpec, *, wide_m: int) -> "Heads":
        # K and V heads of a group have no common divisor, so every pair of them shares equally many queries.
        units = (spec.k_heads // spec.groups) * (spec.v_heads // spec.groups)
        heads = spec.q_heads_per_group // units
        return cls(units, heads, min(heads, wide_m))

    @property
    def head_tiles(self) -> int:
        return -(-self.heads // self.tile_heads)


class Work(NamedTuple):
    """T tiles, and for each (row, unit, tile of heads) the list of part states to merge."""

    tiles: Tensor
    """i32[T, 8]: row, rows, segment, unit, first head in the unit, tokens start .. stop of the segment, slot
    of the first state; narrow tiles first"""
    narrow: int
    """Tiles with at most NARROW_M queries."""
    parts: Tensor
    """i32: slots of each list's part states in the order of the work list"""
    starts: Tensor
    """i32[R * units * head_tiles + 1]: where each list begins in ``parts``"""
    slots: int
    """Part states (one query each) that the step produces."""


def flatten(
    rows: Rows,
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
) -> Work:
    """Cut the work list into tiles of at most ``wide_m`` queries on about equally many tokens, some four for
    each of the device's processors. ValueError for work outside a segment's groups or the step's rows."""
    row, count, segment, g0, g1 = (field.cpu().long() for field in rows)
    n_rows, n_units = positions.numel(), (group1 - group0) * heads.units_per_group
    _check(row, count, segment, g0, g1, segments, n_rows, group0, group1)
    start, stop = _visible(row, count, segment, segments, positions, spec.window_tokens)
    seen = (stop > start).nonzero()[:, 0]
    row, count, segment, g0, g1, start, stop = (x[seen] for x in (row, count, segment, g0, g1, start, stop))

    # An item's tiles: tokens outermost, rows innermost, so that those which read the same keys run side by
    # side and meet in the L2 cache.
    item_narrow = count * heads.tile_heads <= narrow_m
    tile_rows = torch.where(item_narrow, max(narrow_m // heads.tile_heads, 1), wide_m // heads.tile_heads)
    row_tiles = -(-count // tile_rows)
    units = (g1 - g0) * heads.units_per_group
    tokens = int(((stop - start) * row_tiles * units).sum()) * heads.head_tiles
    chunk = -(-max(tokens // (4 * processors), 1) // block_n) * block_n
    splits = -(-(stop - start) // chunk)

    tiles_per_item = splits * units * heads.head_tiles * row_tiles
    item = torch.repeat_interleave(torch.arange(len(seen)), tiles_per_item)
    rest = torch.arange(len(item)) - (tiles_per_item.cumsum(0) - tiles_per_item)[item]
    rest, row_tile = rest // row_tiles[item], rest % row_tiles[item]
    rest, head_tile = rest // heads.head_tiles, rest % heads.head_tiles
    split, unit = rest // units[item], rest % units[item] + (g0[item] - group0) * heads.units_per_group

    tile_row = row[item] + row_tile * tile_rows[item]
    rows_here = torch.minimum(tile_rows[item], count[item] - row_tile * tile_rows[item])
    tile_start = start[item] + split * chunk
    tile_stop = torch.minimum(stop[item], tile_start + chunk)
    slots = rows_here * heads.tile_heads
    slot = slots.cumsum(0) - slots
    head0 = head_tile * heads.tile_heads
    tiles = torch.stack([tile_row, rows_here, segment[item], unit, head0, tile_start, tile_stop, slot], dim=1)

    tile, nth = _spread(rows_here)
    which = ((tile_row[tile] + nth) * n_units + unit[tile]) * heads.head_tiles + head_tile[tile]
    order = torch.argsort(which, stable=True)
    parts = (slot[tile] + nth * heads.tile_heads)[order]
    lengths = torch.bincount(which, minlength=n_rows * n_units * heads.head_tiles)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    narrow = item_narrow[item]
    tiles = torch.cat([tiles[narrow], tiles[~narrow]])
    return Work(tiles.int(), int(narrow.sum()), parts.int(), starts.int(), int(slots.sum()))


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
    """Tokens start .. stop of each item's segment that any of its rows can see; the kernel masks the rest."""
    item, nth = _spread(count)
    position = positions.cpu().long()[row[item] + nth]
    last = torch.zeros_like(row).scatter_reduce(0, item, position, "amax", include_self=False)
    earliest = torch.zeros_like(row).scatter_reduce(0, item, position, "amin", include_self=False)
    first = segments.position.cpu().long()[segment]
    stop = torch.minimum(segments.count.cpu().long()[segment], last - first + 1)
    start = torch.zeros_like(stop) if window is None else (earliest - window + 1 - first).clamp(min=0)
    return start, stop


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(i, n) for each n in 0 .. counts[i], in order."""
    i = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    return i, torch.arange(i.numel()) - (counts.cumsum(0) - counts)[i]
