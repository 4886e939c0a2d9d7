"""Tile shapes and launch constants: a small table by K dims and device, instead of autotuning at run time.

Called by ``ops`` of attention and of the dense kernels. No value was timed on a GPU. Attention's are large
tiles that compile without spills within the device's shared memory (tests/kernels/gpu/test_compile.py prints
and bounds both), with enough stages to keep loads in flight. There are two exceptions on gfx942, where some
scalar registers spill into vector registers and none into memory: int8 at MLA's K dim of 576, and ``extend``
with soft cap and window.

The dense kernels are bound by latency at few rows. So a thread has few elements, 8 or 16, and loads 16 bytes
of bfloat16 at a time where it can; at many rows any of their shapes keeps enough bytes in flight.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kernels.gpu.work import Heads

NARROW_M = 16
"""Queries of a decode tile if few rows share a segment: the least M of the matrix instructions."""

REDUCE_STAGES = 3
"""Split states in flight while they are merged."""


MOST_NORM_ELEMENTS = 32_768
"""32 for each of 1,024 threads, which is a program's most."""
_SILU_BLOCK = 512
"""28 programs for a row of 14,336: a fifth of an H200's SMs."""
_FEW_ROWS = 64
"""Up to so many rows a program rotates one row's head, so that 48 heads of one row occupy 48 SMs."""


class TileShape(NamedTuple):
    block_m: int
    """Queries (rows x heads) of a tile; for decoding, those of a wide tile."""
    block_n: int
    """Keys per iteration."""
    warps: int
    stages: int


class Device(NamedTuple):
    arch: int | str | None
    """An NVIDIA compute capability (80, 90), "gfx942", or None in triton's interpreter."""
    processors: int
    """SMs or compute units."""


@cache
def device_of(index: int | None) -> Device:
    """The CUDA or HIP device with that index; None: triton's interpreter on the CPU."""
    if index is None:
        # With few processors and small tiles, tests reach every path with short sequences.
        return Device(None, 4)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def partial_tiles(arch: int | str | None, k_dim: int, format: KVFormat) -> TileShape:
    """The wide tile for decoding, by the format of the stored KV."""
    if arch is None:
        return TileShape(32, 16, 4, 1)
    if format is KVFormat.FLOAT32:
        return _full_precision_tiles(arch, k_dim)
    if isinstance(arch, str):
        return _cdna_partial_tiles(k_dim, quantised=format.quantised)
    # int4 takes more registers than int8: beyond 64 dims it spills with as many queries in a tile.
    int4 = format is KVFormat.INT4
    if k_dim > 256:
        # For sm_80, triton 3.6 spills with 32 keys of int8.
        return TileShape(16 if int4 else 32, 16 if format.quantised and arch < 90 else 32, 8, 2)
    if k_dim > 128:
        return TileShape(16 if int4 else 32, 32, 4, 3)
    # Two or more programs per SM, each with about 32 KiB of K and V in flight, cover latency x bandwidth.
    if k_dim <= 64:
        return TileShape(64, 64, 4, 4)
    return TileShape(32 if int4 else 64, 64 if arch >= 90 else 32, 4, 3)


def _cdna_partial_tiles(k_dim: int, *, quantised: bool) -> TileShape:
    """AMD's CDNA keeps masks in scalar registers: more than 32 keys, or 16 if scales are read, take too many.
    With MLA's latent, 64 KiB of LDS hold one stage only."""
    if k_dim > 256:
        return TileShape(16, 16, 4, 1)
    return TileShape(
        64 if k_dim <= 64 else 32, 16 if quantised else 32, 4, 1 if quantised and k_dim > 128 else 2
    )


def extend_tiles(arch: int | str | None, k_dim: int, *, full_precision: bool) -> TileShape:
    """The tile for prefill. ``full_precision``: products are float32."""
    if arch is None:
        return TileShape(32, 16, 4, 1)
    if full_precision:
        return _full_precision_tiles(arch, k_dim)
    if isinstance(arch, str):
        if k_dim > 256:
            return TileShape(32, 16, 4, 1)
        return TileShape(128 if k_dim <= 128 else 64, 32, 4, 1)
    if k_dim > 256:
        return TileShape(32, 32, 8, 2)
    if k_dim > 128:
        return TileShape(64, 32, 8, 3)
    # 128 queries are two warp groups of 64, as Hopper's matrix instruction wants. For sm_80 the compiler
    # spills with two stages, and with 64 keys of 128 dims under a soft cap and a window.
    return TileShape(128, 64 if k_dim <= 64 or arch >= 90 else 32, 8, 3)


def _full_precision_tiles(arch: int | str, k_dim: int) -> TileShape:
    """Float32 products run on ordinary ALUs with operands in registers, so tiles are small."""
    if k_dim > 256:
        return TileShape(16, 16, 4, 1) if isinstance(arch, str) else TileShape(16, 16, 8, 2)
    # For sm_80, `extend` with 3 query heads per K head spills with 32 keys.
    return TileShape(16, 32 if k_dim <= 64 and (isinstance(arch, str) or arch >= 90) else 16, 4, 2)


def dims_constants(spec: AttentionSpec) -> dict[str, int]:
    """The K dims in two pieces that the matrix instructions take, and V's in one; see ``attend_to_keys``."""
    main = max(16, 1 << (spec.k_dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(spec.k_dim - main)) if spec.k_dim > main else 0
    v_block = max(16, triton.next_power_of_2(spec.v_dim))
    return {"K_DIM": spec.k_dim, "K_MAIN": main, "K_REST": rest, "V_DIM": spec.v_dim, "V_BLOCK": v_block}


def stored_constants(layout: KVLayout) -> dict[str, int | bool]:
    item_bytes = layout.format.dtype.itemsize
    return {
        "K_HEADS_PER_GROUP": layout.k_heads_per_group,
        "V_HEADS_PER_GROUP": layout.v_heads_per_group,
        "K_RUN_BYTES": layout.k_run_bytes,
        "V_RUN_BYTES": layout.v_run_bytes,
        "K_TOKEN": layout.k_row_bytes // item_bytes,
        "V_TOKEN": (layout.k_row_bytes if layout.v_in_k else layout.v_row_bytes) // item_bytes,
        "ITEM_BYTES": item_bytes,
        "K_SCALES": layout.k_scales,
        "V_SCALES": layout.v_scales,
        "V_IN_K": layout.v_in_k,
        "BLOCK_TOKENS": layout.block_tokens,
    }


def reduce_constants(spec: AttentionSpec, heads: Heads) -> dict[str, int]:
    v_block = triton.next_power_of_2(spec.v_dim)
    # 1,024 elements per program: eight registers per thread, and enough programs if rows are few.
    block_h = min(triton.next_power_of_2(heads.tile_heads), max(1, 1024 // v_block))
    return {
        "HEADS": heads.heads,
        "TILE_HEADS": heads.tile_heads,
        "BLOCK_H": block_h,
        "V_DIM": spec.v_dim,
        "V_BLOCK": v_block,
        "STAGES": REDUCE_STAGES,
    }


def merge_constants(heads: int, v_dim: int) -> dict[str, int]:
    return {
        "V_DIM": v_dim,
        "V_BLOCK": triton.next_power_of_2(v_dim),
        "BLOCK_H": min(triton.next_power_of_2(heads), 4),
    }


def norm_constants(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    # Threads are 32 or 64 wide: at most 16 warps, for 1,024 threads on either.
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def silu_constants(size: int) -> dict[str, int]:
    return {"BLOCK": min(_SILU_BLOCK, triton.next_power_of_2(size)), "num_warps": 2}


def rotate_constants(rows: int, dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "ROWS": 1 if rows <= _FEW_ROWS else 8, "num_warps": 1 if rows <= _FEW_ROWS else 4}
