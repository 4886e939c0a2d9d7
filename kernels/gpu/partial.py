"""The two kernels of ``partial`` (decode): queries attend to stored KV, then their states are merged.

The first kernel writes *split states*: each covers one split of a segment's tokens. Called by ``ops``.
"""

import triton
import triton.language as tl

from farshore.kernels.gpu.attend import attend_to_keys, load_queries, no_keys, normalise
from farshore.kernels.gpu.merge import add_state, normalise_base_e


@triton.jit(do_not_specialize=["first_tile", "layer", "group0"])
def partial_kernel(
    q, q_row, q_head, positions, memory, scales,
    base, stride, first, segment_position, segment_group0, segment_group1,
    tiles, first_tile, split_o, split_lse, layer, group0, scale,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
    K_HEADS_PER_GROUP: tl.constexpr, V_HEADS_PER_GROUP: tl.constexpr,
    K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    K_RUN_BYTES: tl.constexpr, V_RUN_BYTES: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    ITEM_BYTES: tl.constexpr, ALIGN_BYTES: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, V_IN_K: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: tile ``tiles[first_tile + pid]`` (see :class:`work.TileList`), up to BLOCK_M queries on a
    token range of one segment, for one K head and one V head. Writes their states to split_o f32[slots,
    V_DIM] and split_lse f32[slots]. ``memory`` is the KV in elements of its format, in bytes for int4;
    ``scales`` is the same memory as bf16, for int8 and int4. A token's row of K has K_TOKEN of these
    elements, one of V has V_TOKEN.

    Roofline, one row on n tokens in bf16, H query heads per K head: 2 n (K_DIM + V_DIM) bytes per K head
    (split states are < 1% of that at 512 tokens a tile) and 2 n H (K_DIM + V_DIM) FLOPs. That is H FLOPs per
    byte, 1 to 16, or 16 with the padding to M = 16. The turning point of an H200 is 206 (990 TFLOP/s, 4.8
    TB/s), that of an A100 153: bound by memory. int8 halves the bytes. The SMs of an H200 dequantise about
    7 T elements/s (an element takes one and a half of their 64 conversions per cycle, and a multiplication)
    against 4.8 T/s of memory: still bound by memory, with little to spare. R rows on a shared segment read it
    once per BLOCK_M queries, all but the first time from L2: bound by compute from about 200 queries on, and
    MLA's group of 128 nearly so.
    """
    tile = tiles + (first_tile + tl.program_id(0)) * 8
    row0 = tl.load(tile)
    rows = tl.load(tile + 1)
    segment = tl.load(tile + 2)
    pair = tl.load(tile + 3)
    head0 = tl.load(tile + 4)
    start = tl.load(tile + 5)
    stop = tl.load(tile + 6)
    slot0 = tl.load(tile + 7)

    m = tl.arange(0, BLOCK_M)
    head = head0 + m % TILE_HEADS
    used = (m // TILE_HEADS < rows) & (head < HEADS)
    row = row0 + m // TILE_HEADS
    q_at = row.to(tl.int64) * q_row + (pair * HEADS + head) * q_head
    queries = load_queries(q, q_at, used, 0, K_MAIN, K_DIM, DTYPE)
    queries_rest = load_queries(q, q_at, used, K_MAIN, K_REST, K_DIM, DTYPE) if K_REST > 0 else queries
    position = tl.load(positions + row, mask=used, other=0).to(tl.int32)

    # A pair is one K head and one V head of a group, with the query heads that share both.
    stored_group0 = tl.load(segment_group0 + segment).to(tl.int32)
    groups = tl.load(segment_group1 + segment).to(tl.int32) - stored_group0
    stored_pair = pair + (group0 - stored_group0) * (K_HEADS_PER_GROUP * V_HEADS_PER_GROUP)
    k_run = stored_pair // V_HEADS_PER_GROUP * K_RUN_BYTES
    if V_IN_K:
        v_run = k_run
    else:
        v_run = groups * K_HEADS_PER_GROUP * K_RUN_BYTES + stored_pair // K_HEADS_PER_GROUP * V_RUN_BYTES
    layer_bytes = groups * (K_HEADS_PER_GROUP * K_RUN_BYTES + V_HEADS_PER_GROUP * V_RUN_BYTES)
    layer_at = tl.load(base + segment) + layer.to(tl.int64) * layer_bytes
    # The launcher has checked every base and stride. Without the hint loads would be element by element.
    k_at = tl.multiple_of(layer_at + k_run, ALIGN_BYTES) // ITEM_BYTES
    v_at = tl.multiple_of(layer_at + v_run, ALIGN_BYTES) // ITEM_BYTES
    block_stride = tl.multiple_of(tl.load(stride + segment), ALIGN_BYTES) // ITEM_BYTES
    V_ROW_DIM: tl.constexpr = K_DIM if V_IN_K else V_DIM
    k_scales = scales + (layer_at + k_run + BLOCK_TOKENS * K_TOKEN) // 2
    v_scales = scales + (layer_at + v_run + BLOCK_TOKENS * V_TOKEN) // 2

    row_max, row_sum, acc = no_keys(BLOCK_M, V_BLOCK)
    row_max, row_sum, acc = attend_to_keys(
        queries, queries_rest, position, row_max, row_sum, acc,
        memory + k_at, memory + v_at, k_scales, v_scales, K_TOKEN, V_TOKEN, block_stride,
        tl.load(first + segment), tl.load(segment_position + segment), start, stop, scale,
        K_DIM, K_MAIN, K_REST, V_DIM, V_BLOCK, V_ROW_DIM, K_SCALES, K_SCALES if V_IN_K else V_SCALES,
        V_IS_KEYS=V_IN_K and V_BLOCK == K_MAIN, SOFT_CAP=SOFT_CAP, WINDOW=WINDOW, BLOCK_TOKENS=BLOCK_TOKENS,
        MASKED=True, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    o, lse = normalise(row_max, row_sum, acc)

    slot = slot0 + m
    dims = tl.arange(0, V_BLOCK)
    o_at = slot.to(tl.int64)[:, None] * V_DIM + dims[None, :]
    tl.store(split_o + o_at, o, mask=used[:, None] & (dims < V_DIM)[None, :])
    tl.store(split_lse + slot, lse, mask=used)


@triton.jit
def reduce_kernel(
    split_o, split_lse, slots, starts, o, o_row, o_head, lse, lse_row, lse_head,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: merges the split states of one row and BLOCK_H of a tile's heads in work-list order.

    ``slots[starts[j] .. starts[j + 1]]`` are the slots of list j, each that of the first head. There is one
    list per row, pair and tile of heads, counted in this order. An empty list gives the identity.

    Roofline: 4 V_DIM bytes per split state, read once from L2, where ``partial_kernel`` has just left them;
    3 FLOPs an element. Bound by latency: a chain of one load per split state, STAGES of them in flight.
    """
    HEAD_TILES: tl.constexpr = (HEADS + TILE_HEADS - 1) // TILE_HEADS
    CUTS: tl.constexpr = (TILE_HEADS + BLOCK_H - 1) // BLOCK_H
    row = tl.program_id(0)
    head_tile = tl.program_id(1) // CUTS
    j = row * (tl.num_programs(1) // CUTS) + head_tile
    begin = tl.load(starts + j)
    end = tl.load(starts + j + 1)

    h = tl.program_id(1) % CUTS * BLOCK_H + tl.arange(0, BLOCK_H)
    head = head_tile % HEAD_TILES * TILE_HEADS + h
    used = (h < TILE_HEADS) & (head < HEADS)
    head += head_tile // HEAD_TILES * HEADS
    dims = tl.arange(0, V_BLOCK)
    keep = used[:, None] & (dims < V_DIM)[None, :]

    row_max, row_sum, acc = no_keys(BLOCK_H, V_BLOCK)
    for i in tl.range(begin, end, num_stages=STAGES):
        slot = tl.load(slots + i) + h
        state_lse = tl.load(split_lse + slot, mask=used, other=float("-inf"))
        state_at = slot.to(tl.int64)[:, None] * V_DIM + dims[None, :]
        state_o = tl.load(split_o + state_at, mask=keep, other=0.0)
        row_max, row_sum, acc = add_state(row_max, row_sum, acc, state_lse, state_o)
    o_values, lse_values = normalise_base_e(row_max, row_sum, acc)

    o_at = row.to(tl.int64) * o_row + head[:, None] * o_head + dims[None, :]
    tl.store(o + o_at, o_values.to(o.dtype.element_ty), mask=keep)
    tl.store(lse + row.to(tl.int64) * lse_row + head * lse_head, lse_values, mask=used)
