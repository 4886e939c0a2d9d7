"""Decoding on the device: rows attend to stored KV by a work list of tiles, then the splits are merged."""

import triton
import triton.language as tl

from farshore.kernels.gpu.attend import finish, load_queries, sweep
from farshore.kernels.gpu.merge import absorb, settle


@triton.jit(do_not_specialize=["first_tile", "layer", "group0"])
def partial_kernel(
    q, q_row, q_head, positions, memory, scales,
    base, stride, first, segment_position, segment_group0, segment_group1,
    tiles, first_tile, part_o, part_lse, layer, group0, scale,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
    K_HEADS_PER_GROUP: tl.constexpr, V_HEADS_PER_GROUP: tl.constexpr,
    K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    K_RUN_BYTES: tl.constexpr, V_RUN_BYTES: tl.constexpr, ITEM_BYTES: tl.constexpr, ALIGN_BYTES: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, V_IN_K: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: tile ``tiles[first_tile + pid]`` (see :class:`work.Work`), up to BLOCK_M queries on one
    stretch of one segment, for one K head and one V head; its state goes to part_o f32[slots, V_DIM] and
    part_lse f32[slots]. memory: the KV in elements of its format; scales: the same bytes as bf16, for int8.

    Roofline, one row on n tokens in bf16, H query heads to a K head: bytes 2 n (K_DIM + V_DIM) a K head, part
    states < 1% of that at 512 tokens a tile; FLOPs 2 n H (K_DIM + V_DIM). That is H FLOPs a byte, 1 to 16,
    and 16 with the padding to M = 16, where an H200 turns at 206 (990 TFLOP/s, 4.8 TB/s) and an A100 at 153:
    bound by memory. int8 halves the bytes; the SMs of an H200 dequantise about 7 T elements/s (each element
    one and a half of their 64 conversions a cycle, and a multiplication) against 4.8 T/s of memory: still
    memory, with little to spare. R rows on a shared segment read it once for each BLOCK_M queries, the others
    from L2: compute-bound from some 200 queries on, and MLA's group of 128 nearly so.
    """
    tile = tiles + (first_tile + tl.program_id(0)) * 8
    row0 = tl.load(tile)
    rows = tl.load(tile + 1)
    segment = tl.load(tile + 2)
    unit = tl.load(tile + 3)
    head0 = tl.load(tile + 4)
    start = tl.load(tile + 5)
    stop = tl.load(tile + 6)
    slot0 = tl.load(tile + 7)

    m = tl.arange(0, BLOCK_M)
    head = head0 + m % TILE_HEADS
    used = (m // TILE_HEADS < rows) & (head < HEADS)
    row = row0 + m // TILE_HEADS
    q_at = row.to(tl.int64) * q_row + (unit * HEADS + head) * q_head
    queries = load_queries(q, q_at, used, 0, K_MAIN, K_DIM, DTYPE)
    queries_rest = load_queries(q, q_at, used, K_MAIN, K_REST, K_DIM, DTYPE) if K_REST > 0 else queries
    position = tl.load(positions + row, mask=used, other=0).to(tl.int32)

    # A unit is the query heads that share one K head and one V head: K x V of them in a group.
    stored_group0 = tl.load(segment_group0 + segment).to(tl.int32)
    groups = tl.load(segment_group1 + segment).to(tl.int32) - stored_group0
    stored_unit = unit + (group0 - stored_group0) * (K_HEADS_PER_GROUP * V_HEADS_PER_GROUP)
    k_run = stored_unit // V_HEADS_PER_GROUP * K_RUN_BYTES
    if V_IN_K:
        v_run = k_run
    else:
        v_run = groups * K_HEADS_PER_GROUP * K_RUN_BYTES + stored_unit // K_HEADS_PER_GROUP * V_RUN_BYTES
    layer_bytes = groups * (K_HEADS_PER_GROUP * K_RUN_BYTES + V_HEADS_PER_GROUP * V_RUN_BYTES)
    here = tl.load(base + segment) + layer.to(tl.int64) * layer_bytes
    # Promised by the launcher, which checks every base and stride: without it loads would be element-wise.
    k_at = tl.multiple_of(here + k_run, ALIGN_BYTES) // ITEM_BYTES
    v_at = tl.multiple_of(here + v_run, ALIGN_BYTES) // ITEM_BYTES
    block_stride = tl.multiple_of(tl.load(stride + segment), ALIGN_BYTES) // ITEM_BYTES
    V_TOKEN: tl.constexpr = K_DIM if V_IN_K else V_DIM
    k_scales = scales + (here + k_run + BLOCK_TOKENS * K_DIM) // 2
    v_scales = scales + (here + v_run + BLOCK_TOKENS * V_TOKEN) // 2

    peak, mass, total = sweep(
        queries, queries_rest, position,
        tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, V_BLOCK), tl.float32),
        memory + k_at, memory + v_at, k_scales, v_scales, K_DIM, V_TOKEN, block_stride,
        tl.load(first + segment), tl.load(segment_position + segment), start, stop, scale,
        K_DIM, K_MAIN, K_REST, V_DIM, V_BLOCK, K_SCALES, K_SCALES if V_IN_K else V_SCALES,
        V_IS_KEYS=V_IN_K and V_BLOCK == K_MAIN, SOFT_CAP=SOFT_CAP, WINDOW=WINDOW, BLOCK_TOKENS=BLOCK_TOKENS,
        MASKED=True, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    o, lse = finish(peak, mass, total)

    slot = slot0 + m
    dims = tl.arange(0, V_BLOCK)
    o_at = slot.to(tl.int64)[:, None] * V_DIM + dims[None, :]
    tl.store(part_o + o_at, o, mask=used[:, None] & (dims < V_DIM)[None, :])
    tl.store(part_lse + slot, lse, mask=used)


@triton.jit
def reduce_kernel(
    part_o, part_lse, parts, starts, o, o_row, o_head, lse, lse_row, lse_head,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK_H of a tile's heads; merges their part states in the work list's order.

    ``parts[starts[j] .. starts[j + 1]]`` are the slots (of the first head) of list j; lists are counted row
    by row, unit by unit, tile of heads by tile of heads. An empty list gives the identity.

    Roofline: bytes 4 V_DIM a part and head, read once, from L2, where ``partial_kernel`` has just left them;
    3 FLOPs an element: bound by latency, a chain of one load a part, hidden STAGES deep.
    """
    HEAD_TILES: tl.constexpr = (HEADS + TILE_HEADS - 1) // TILE_HEADS
    CUTS: tl.constexpr = (TILE_HEADS + BLOCK_H - 1) // BLOCK_H
    row = tl.program_id(0)
    which = tl.program_id(1) // CUTS
    j = row * (tl.num_programs(1) // CUTS) + which
    begin = tl.load(starts + j)
    end = tl.load(starts + j + 1)

    h = tl.program_id(1) % CUTS * BLOCK_H + tl.arange(0, BLOCK_H)
    head = which % HEAD_TILES * TILE_HEADS + h
    used = (h < TILE_HEADS) & (head < HEADS)
    head += which // HEAD_TILES * HEADS
    dims = tl.arange(0, V_BLOCK)
    keep = used[:, None] & (dims < V_DIM)[None, :]

    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, V_BLOCK), tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        slot = tl.load(parts + i) + h
        part = tl.load(part_lse + slot, mask=used, other=float("-inf"))
        values = tl.load(part_o + slot.to(tl.int64)[:, None] * V_DIM + dims[None, :], mask=keep, other=0.0)
        peak, mass, total = absorb(peak, mass, total, part, values)
    mean, natural = settle(peak, mass, total)

    o_at = row.to(tl.int64) * o_row + head[:, None] * o_head + dims[None, :]
    tl.store(o + o_at, mean.to(o.dtype.element_ty), mask=keep)
    tl.store(lse + row.to(tl.int64) * lse_row + head * lse_head, natural, mask=used)
