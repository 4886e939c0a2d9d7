"""Plans of ``partial``: tiles, made on the host and put on the device.

Called through ``ops``. In successive steps a plan is advanced: all that changes are positions and the borders
of the tiles that tails grow in, which lie in memory, so that a graph's launches stay true. It must not know
the kernels' arithmetic.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, KVLayout, Segments, WorkList
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu import tuning
from farshore.kernels.gpu.tables import LOAD_BYTES, Packed
from farshore.kernels.gpu.tuning import NARROW_M, TileShape
from farshore.kernels.gpu.work import Heads, Ints, TileList, capacity, flatten
from farshore.kernels.host import PlanRoom, Send

STORED_DTYPES = {
    KVFormat.FLOAT32: torch.float32,
    KVFormat.BFLOAT16: torch.bfloat16,
    KVFormat.FLOAT16: torch.float16,
    KVFormat.INT8: torch.int8,
    KVFormat.INT4: torch.uint8,
}
"""Formats of stored KV and the dtypes in which the kernels load them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The tiles on the device, with their scratch."""

    spec: AttentionSpec
    layout: KVLayout
    heads: Heads
    group0: int
    q_heads: int
    """Query heads of the groups of the call."""
    positions: Tensor
    kv: Tensor
    """The memory, in elements of the format."""
    scales: Tensor
    """The same memory as bf16, if the format is quantised."""
    align_bytes: int
    """Every base, stride and run is a multiple of this."""
    segments: tuple[Tensor, ...]
    """The fields of the segments, except the count, which the tiles hold."""
    tiles: Tensor
    launches: tuple[tuple[int, int, TileShape], ...]
    """(first tile, number of tiles, shape) of each launch of the partial kernel"""
    slots: Tensor
    starts: Tensor
    split_o: Tensor
    split_lse: Tensor
    on_host: "_OnHost"


class _OnHost(NamedTuple):
    """What a plan in a room is advanced by."""

    packed: Packed
    listed: TileList
    """Its tiles are those in ``packed``."""
    positions: Ints
    """In ``packed``."""
    scratch: int
    """Numbers of split states."""
    shape: Hashable

    def advance(self, segments: Segments, positions: Tensor, spec: AttentionSpec, room: PlanRoom) -> bool:
        """Puts the plan of the same work at other positions and counts in the room, where this one lies.
        Returns False, and changes nothing there, if the tiles must be cut anew."""
        if not self.listed.advance(segments, positions, spec):
            return False
        self.positions[:] = positions.cpu().numpy()
        room.take(self.packed.buffer, scratch=self.scratch, shape=self.shape)
        return True


def plan(
    work: WorkList,
    segments: Segments,
    memory: Tensor,
    layout: KVLayout,
    spec: AttentionSpec,
    *,
    positions: Tensor,
    group0: int = 0,
    group1: int | None = None,
    threads: int = 1,
    last: Plan | None = None,
    send: Send | None = None,
    room: PlanRoom | None = None,
) -> Plan:
    """In a room the numbers of segments and tiles are rounded up to powers of two. A surplus tile ends at
    once. There ``last`` becomes the new plan, unless the tiles must be cut anew. Raises ValueError also for
    float64 KV, for rows beyond ``positions``, and for addresses that are not multiples of the element size
    (of 2 bytes, if there are scales)."""
    if last is not None and room is not None and last.on_host.advance(segments, positions, spec, room):
        return last
    if layout.format not in STORED_DTYPES:
        raise ValueError(
            f"{layout.format.value} KV has no GPU kernel: use one of {[f.value for f in STORED_DTYPES]}"
        )
    stored = STORED_DTYPES[layout.format]
    group1 = spec.groups if group1 is None else group1
    item_bytes = max(stored.itemsize, 2 if layout.format.quantised else 1)
    align = _alignment(segments, layout)
    if align % item_bytes:
        raise ValueError(
            f"segments in {layout.format.value} must lie at multiples of {item_bytes} bytes, not {align}"
        )
    memory = memory[: memory.numel() // item_bytes * item_bytes]

    device = tuning.device_of(memory.device.index if memory.is_cuda else None)
    wide = tuning.partial_tiles(device.arch, spec.k_dim, layout.format)
    heads = Heads.of(spec, wide_m=wide.block_m)
    listed = flatten(
        work,
        segments,
        spec,
        heads,
        positions,
        group0=group0,
        group1=group1,
        narrow_m=NARROW_M,
        wide_m=wide.block_m,
        block_n=wide.block_n,
        processors=device.processors,
    )
    n_segments = segments.size
    if room is not None:
        listed = listed.padded(heads, narrow_m=NARROW_M, wide_m=wide.block_m)
        n_segments = capacity(max(segments.size, 1))
    packed = _packed(segments, n_segments, positions, listed)
    narrow, n_tiles = listed.narrow, len(listed.tiles)
    launches = ((0, narrow, wide._replace(block_m=NARROW_M)), (narrow, n_tiles - narrow, wide))
    scratch = listed.split_states * (spec.v_dim + 1)
    shape = positions.numel(), n_segments, narrow, n_tiles, align
    if room is not None:
        tables, split = room.take(packed.buffer, scratch=scratch, shape=shape)
    else:
        tables = packed.buffer.to(memory.device) if send is None else send(packed.buffer)
        split = torch.empty(scratch, device=memory.device)
    *of_segments, on_device, tiles, slots, starts = packed.unpack(tables)
    *_, on_host, host_tiles, _, _ = packed.tables
    return Plan(
        spec=spec,
        layout=layout,
        heads=heads,
        group0=group0,
        q_heads=(group1 - group0) * spec.q_heads_per_group,
        positions=on_device,
        kv=memory.view(stored),
        scales=memory.view(torch.bfloat16) if layout.format.quantised else memory,
        align_bytes=align,
        segments=tuple(of_segments),
        tiles=tiles,
        launches=tuple(launch for launch in launches if launch[1]),
        slots=slots,
        starts=starts,
        split_o=split[: listed.split_states * spec.v_dim].view(-1, spec.v_dim),
        split_lse=split[listed.split_states * spec.v_dim :],
        on_host=_OnHost(packed, listed._replace(tiles=host_tiles), on_host, scratch, shape),
    )


def _alignment(segments: Segments, layout: KVLayout) -> int:
    """The most bytes, up to a load's, that every base, stride and run of the segments is a multiple of."""
    addresses = [*segments.base.tolist(), *segments.stride.tolist()]
    return gcd(LOAD_BYTES, layout.k_run_bytes, layout.v_run_bytes, *addresses)


def _packed(segments: Segments, n_segments: int, positions: Tensor, listed: TileList) -> Packed:
    """The tables of a plan: the fields of the segments without the count, surplus ones of ``n_segments``
    zero; positions, tiles, slots and starts."""
    fields = []
    for field in segments[:3] + segments[4:]:
        values = field.cpu().numpy()
        fields.append(np.zeros(n_segments, values.dtype))
        fields[-1][: values.size] = values
    rows = positions.cpu().numpy().astype(np.int64)
    return Packed.of([*fields, rows, listed.tiles, listed.slots, listed.starts])
