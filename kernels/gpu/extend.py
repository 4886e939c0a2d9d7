"""The ``extend`` kernel (prefill): new tokens attend to adjacent keys, causally. Called by ``ops``."""

import triton
import triton.language as tl

from farshore.kernels.gpu.attend import attend_to_keys, load_queries, no_keys, normalise

FAR = tl.constexpr(2**30)


# Positions and lse begin at any row of a prompt. They are read and written one by one, so a kernel for those
# at multiples of 16 bytes would gain nothing, and be compiled when the first prompt needs it.
@triton.jit(
    do_not_specialize=["k_position", "rows", "keys"], do_not_specialize_on_alignment=["positions", "lse"]
)
def extend_kernel(
    q, q_row, q_head, positions, k, k_head, k_token, v, v_head, v_token, k_position,
    o, o_row, o_head, lse, lse_row, lse_head, rows, keys, scale,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
    K_HEADS_PER_GROUP: tl.constexpr, V_HEADS_PER_GROUP: tl.constexpr,
    K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries (rows x heads that share one K head and one V head) on all keys they see.

    q, k, v, o and lse come with their strides in elements; positions ``i64[rows]``; k_position is that of the
    first of ``keys`` keys. HEADS query heads share a K head and a V head; a program takes TILE_HEADS of them.

    Roofline, n new tokens on p past ones, per query head: 2 (K_DIM + V_DIM) n (p + n / 2) FLOPs; in bf16
    2 n (K_DIM + V_DIM) bytes for q and o, and K and V once per BLOCK_M queries, mostly from L2. BLOCK_M = 128
    gives 128 FLOPs per byte of L2 and, because the programs of a head run at the same time, about n per byte
    of HBM. So it is bound by the matrix units (H200: 990 TFLOP/s bf16) from a few hundred tokens on. The
    exponentials, one per 2 (K_DIM + V_DIM) FLOPs, come next: at K_DIM = 64 the special-function units of an
    H200 (16 per cycle and SM, 4 Texp/s) take as long as its tensor cores.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // TILE_HEADS
    HEAD_TILES: tl.constexpr = (HEADS + TILE_HEADS - 1) // TILE_HEADS
    # The last rows see the most keys. They start first, so that short programs fill the gaps at the end.
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_ROWS
    pair = tl.program_id(1) // HEAD_TILES
    m = tl.arange(0, BLOCK_M)
    head = tl.program_id(1) % HEAD_TILES * TILE_HEADS + m % TILE_HEADS
    row = row0 + m // TILE_HEADS
    used = (m // TILE_HEADS < TILE_ROWS) & (row < rows) & (head < HEADS)
    head += pair * HEADS
    row = row.to(tl.int64)
    q_at = row * q_row + head * q_head
    queries = load_queries(q, q_at, used, 0, K_MAIN, K_DIM, DTYPE)
    queries_rest = load_queries(q, q_at, used, K_MAIN, K_REST, K_DIM, DTYPE) if K_REST > 0 else queries

    position = tl.load(positions + row, mask=used, other=0).to(tl.int32)
    last = tl.max(tl.where(used, position, -FAR)) - k_position
    earliest = tl.min(tl.where(used, position, FAR)) - k_position
    # Some queries see keys begin .. all_begin, all see all_begin .. all_end, some see all_end .. end.
    end = tl.minimum(tl.maximum(last + 1, 0), keys)
    begin = 0
    all_begin = 0
    if WINDOW is not None:
        begin = tl.minimum(tl.maximum(earliest + 1 - WINDOW, 0), end) // BLOCK_N * BLOCK_N
        all_begin = tl.minimum(tl.cdiv(tl.maximum(last + 1 - WINDOW, 0), BLOCK_N) * BLOCK_N, end)
    all_end = tl.minimum(tl.maximum(earliest + 1, 0), keys) // BLOCK_N * BLOCK_N
    all_end = tl.maximum(all_end, all_begin)

    k += (pair // V_HEADS_PER_GROUP).to(tl.int64) * k_head
    v += (pair // K_HEADS_PER_GROUP).to(tl.int64) * v_head
    row_max, row_sum, acc = no_keys(BLOCK_M, V_BLOCK)
    for piece in tl.static_range(3):
        if piece != 0 or WINDOW is not None:
            start = begin if piece == 0 else (all_begin if piece == 1 else all_end)
            stop = all_begin if piece == 0 else (all_end if piece == 1 else end)
            row_max, row_sum, acc = attend_to_keys(
                queries, queries_rest, position, row_max, row_sum, acc,
                k, v, k, v, k_token, v_token, 0, 0, k_position, start, stop, scale,
                K_DIM, K_MAIN, K_REST, V_DIM, V_BLOCK, V_DIM, K_SCALES=0, V_SCALES=0, V_IS_KEYS=False,
                SOFT_CAP=SOFT_CAP, WINDOW=WINDOW, BLOCK_TOKENS=None, MASKED=piece != 1, BLOCK_N=BLOCK_N,
            )  # fmt: skip
    o_values, lse_values = normalise(row_max, row_sum, acc)

    dims = tl.arange(0, V_BLOCK)
    o_at = (row * o_row + head * o_head)[:, None] + dims[None, :]
    tl.store(o + o_at, o_values.to(o.dtype.element_ty), mask=used[:, None] & (dims < V_DIM)[None, :])
    tl.store(lse + row * lse_row + head * lse_head, lse_values, mask=used)
