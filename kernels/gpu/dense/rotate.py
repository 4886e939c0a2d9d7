"""The ``rotate`` kernel: rotates q and K, and writes K and V to buffers or to their slots in stored KV.

Called by ``ops``.
"""

import triton
import triton.language as tl

from farshore.kernels.formats import MIN_SCALE, SCALE_ELEMENTS
from farshore.kernels.gpu.dense.rounding import rounded

GROUP = tl.constexpr(SCALE_ELEMENTS)
LEAST = tl.constexpr(MIN_SCALE)
LARGEST = tl.constexpr(127.0)
ROUNDS = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 numbers of this size have no fraction, so adding it rounds to the nearest integer."""


@triton.jit
def quantised(values, GROUPS: tl.constexpr):
    """(q i8[rows, dims], scales float32[rows, GROUPS]) as ``formats.quantise`` makes them, with one scale for
    every ``dims / GROUPS`` values."""
    grouped = tl.reshape(values, (values.shape[0], GROUPS, values.shape[1] // GROUPS))
    size = tl.abs(grouped)
    finite = tl.min((size < float("inf")).to(tl.int32), axis=2) > 0
    scale = rounded(tl.maximum(tl.div_rn(tl.max(size, axis=2), LARGEST), LEAST), tl.bfloat16)
    scale = tl.where(finite, scale, float("nan"))
    q = tl.div_rn(grouped, tl.where(finite, scale, 1.0)[:, :, None])
    q = tl.where(finite[:, :, None], (q + ROUNDS) - ROUNDS, 0.0)
    return tl.reshape(q.to(tl.int8), (values.shape[0], values.shape[1])), scale


@triton.jit(do_not_specialize=["layer_bytes", "rows"])
def rotate_kernel(
    x, x_row, positions, cos, sin, q_out, q_row, q_head, k_out, k_row, k_head, v_out, v_row, v_head,
    scales, base, slot, source, layer_bytes, rows,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SCALES: tl.constexpr, RUN_BYTES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: one head of ROWS rows of x. Heads of q and K are rotated by the angles of their positions,
    those of V are copied.

    base None: K and V go to k_out and v_out, by their strides in elements. Otherwise both are the memory of
    stored KV, where a head of K has a run of RUN_BYTES, K before V, ``layer_bytes`` behind the row's base; a
    run holds BLOCK_TOKENS rows, then their scales if SCALES > 0. ``scales`` is the same memory as bfloat16.
    Rows that are not their own ``source`` are not stored.

    Roofline, per head and row: 2 DIM elements of x read (the second time from L1), DIM of the table, and DIM
    written; 3 FLOPs each. Bound by latency for few rows, else by memory: 2,048 rows of 48 heads of 128 in
    bfloat16 move 50 MB, 11 us of an H200's HBM.
    """
    HALF: tl.constexpr = DIM // 2
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    used = row < rows
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    keep = used[:, None] & (d < DIM)[None, :]
    at = x + row[:, None] * x_row + head * DIM
    values = tl.load(at + d[None, :], mask=keep, other=0.0).to(tl.float32)
    if head < Q_HEADS + KV_HEADS:
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        others = tl.load(at + partner[None, :], mask=keep, other=0.0).to(tl.float32)
        position = tl.load(positions + row, mask=used, other=0)
        angle = position[:, None] * HALF + tl.where(d < HALF, d, d - HALF)[None, :]
        c = tl.load(cos + angle, mask=keep, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=keep, other=0.0).to(tl.float32)
        crossed = rounded(others * s, DTYPE)
        crossed = tl.where((d < HALF)[None, :], -crossed, crossed)
        values = rounded(rounded(values * c, DTYPE) + crossed, DTYPE)
    if head < Q_HEADS:
        tl.store(q_out + row[:, None] * q_row + head * q_head + d[None, :], values.to(DTYPE), mask=keep)
    if KV_HEADS > 0 and head >= Q_HEADS:
        if base is None:
            # A store in each branch: triton 3.6 compiles no choice of two pointers for gfx942.
            if head < Q_HEADS + KV_HEADS:
                k_at = row[:, None] * k_row + (head - Q_HEADS) * k_head + d[None, :]
                tl.store(k_out + k_at, values.to(DTYPE), mask=keep)
            else:
                v_at = row[:, None] * v_row + (head - Q_HEADS - KV_HEADS) * v_head + d[None, :]
                tl.store(v_out + v_at, values.to(DTYPE), mask=keep)
        else:
            stored = used & (tl.load(source + row, mask=used, other=-1) == row)
            token = tl.load(slot + row, mask=stored, other=0)
            head_at = tl.load(base + row, mask=stored, other=0) + layer_bytes
            # Runs of V follow those of K and have as many bytes.
            head_at += (head - Q_HEADS) * RUN_BYTES
            inside = stored[:, None] & (d < DIM)[None, :]
            STORED: tl.constexpr = k_out.dtype.element_ty
            ITEM_BYTES: tl.constexpr = STORED.primitive_bitwidth // 8
            payload_at = k_out + (head_at // ITEM_BYTES + token * DIM)[:, None] + d[None, :]
            if SCALES > 0:
                GROUPS: tl.constexpr = (BLOCK + GROUP - 1) // GROUP
                q8, scale = quantised(values, GROUPS)
                tl.store(payload_at, q8, mask=inside)
                group = tl.arange(0, GROUPS)
                scale_at = (head_at + BLOCK_TOKENS * DIM) // 2 + token * SCALES
                known = stored[:, None] & (group < SCALES)[None, :]
                scale_at = scales + scale_at[:, None] + group[None, :]
                tl.store(scale_at, scale.to(tl.bfloat16), mask=known)
            else:
                tl.store(payload_at, values.to(STORED), mask=inside)
