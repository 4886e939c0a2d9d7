"""The ``rotate`` kernel: rotates q and K, and writes K and V to buffers or to their slots in stored KV.

Called by ``ops``.
"""

import triton
import triton.language as tl

from farshore.kernels.formats import MIN_SCALE, SCALE_ELEMENTS
from farshore.kernels.gpu.dense.rounding import rounded

GROUP = tl.constexpr(SCALE_ELEMENTS)
LEAST = tl.constexpr(MIN_SCALE)
ROUNDS = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 numbers of this size have no fraction, so adding it rounds to the nearest integer."""


@triton.jit
def grouped(values, GROUPS: tl.constexpr):
    """[rows, GROUPS, values of a group]"""
    return tl.reshape(values, (values.shape[0], GROUPS, values.shape[1] // GROUPS))


@triton.jit
def scales_of(values, LARGEST: tl.constexpr, GROUPS: tl.constexpr):
    """float32[rows, GROUPS]: the scales that ``formats.quantise`` gives rows of ``values``, for q up to
    LARGEST; NaN for a group with an infinity or a NaN."""
    size = tl.abs(grouped(values, GROUPS))
    finite = tl.min((size < float("inf")).to(tl.int32), axis=2) > 0
    scale = rounded(tl.maximum(tl.div_rn(tl.max(size, axis=2), LARGEST), LEAST), tl.bfloat16)
    return tl.where(finite, scale, float("nan"))


@triton.jit
def quantised(values, scale, GROUPS: tl.constexpr):
    """i8, of the shape of ``values``: their q, as ``formats.quantise`` makes it. scale: float32[rows,
    GROUPS], that of each ``values.shape[1] / GROUPS`` of them."""
    finite = scale == scale
    q = tl.div_rn(grouped(values, GROUPS), tl.where(finite, scale, 1.0)[:, :, None])
    q = tl.where(finite[:, :, None], (q + ROUNDS) - ROUNDS, 0.0)
    return tl.reshape(q.to(tl.int8), (values.shape[0], values.shape[1]))


@triton.jit
def turned(at, d, keep, cos, sin, position, rotates, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """float32[rows, dims]: elements d of the heads of DIM at ``at``, rotated by the angles of their positions
    if ``rotates``; 0 where ``keep`` is false."""
    HALF: tl.constexpr = DIM // 2
    values = tl.load(at[:, None] + d[None, :], mask=keep, other=0.0).to(tl.float32)
    if rotates:
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        others = tl.load(at[:, None] + partner[None, :], mask=keep, other=0.0).to(tl.float32)
        angle = position[:, None] * HALF + tl.where(d < HALF, d, d - HALF)[None, :]
        c = tl.load(cos + angle, mask=keep, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=keep, other=0.0).to(tl.float32)
        crossed = rounded(others * s, DTYPE)
        crossed = tl.where((d < HALF)[None, :], -crossed, crossed)
        values = rounded(rounded(values * c, DTYPE) + crossed, DTYPE)
    return values


@triton.jit
def packed(
    at, byte, keep, cos, sin, position, rotates, scale,
    DIM: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """u8, of the shape of ``keep``: bytes ``byte`` of the int4 rows of the heads at ``at``. Both elements of
    a byte are computed where it is stored: to move them there from other threads would take longer."""
    HALF: tl.constexpr = GROUP // 2
    LAST: tl.constexpr = DIM // GROUP * GROUP
    low = byte // HALF * GROUP + byte % HALF
    high = low + tl.where(low < LAST, HALF, (DIM - LAST + 1) // 2)
    x_low = turned(at, low, keep, cos, sin, position, rotates, DIM, DTYPE)
    x_high = turned(at, high, keep & (high < DIM)[None, :], cos, sin, position, rotates, DIM, DTYPE)
    q_low = (quantised(x_low, scale, GROUPS) + 8).to(tl.uint8)
    q_high = (quantised(x_high, scale, GROUPS) + 8).to(tl.uint8)
    return q_low | q_high << 4


@triton.jit(do_not_specialize=["layer_bytes", "rows"])
def rotate_kernel(
    x, x_row, positions, cos, sin, q_out, q_row, q_head, k_out, k_row, k_head, v_out, v_row, v_head,
    scales, base, slot, source, layer_bytes, rows,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SCALES: tl.constexpr, RUN_BYTES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    TOKEN: tl.constexpr,
):  # fmt: skip
    """One program: one head of ROWS rows of x. Heads of q and K are rotated by the angles of their positions,
    those of V are copied.

    base None: K and V go to k_out and v_out, by their strides in elements. Otherwise both are the memory of
    stored KV, where a head of K has a run of RUN_BYTES, K before V, ``layer_bytes`` behind the row's base; a
    run holds BLOCK_TOKENS rows of TOKEN elements of the memory, then their scales if SCALES > 0: int8 rows,
    or int4 ones if the memory is unsigned. ``scales`` is the same memory as bfloat16. Rows that are not their
    own ``source`` are not stored.

    Roofline, per head and row: 2 DIM elements of x read (the second time from L1), DIM of the table, and DIM
    written; 3 FLOPs each. Bound by latency for few rows, else by memory: 2,048 rows of 48 heads of 128 in
    bfloat16 move 50 MB, 11 us of an H200's HBM.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    used = row < rows
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    keep = used[:, None] & (d < DIM)[None, :]
    at = x + row * x_row + head * DIM
    rotates = head < Q_HEADS + KV_HEADS
    position = tl.load(positions + row, mask=used, other=0)
    values = turned(at, d, keep, cos, sin, position, rotates, DIM, DTYPE)
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
            PACKED: tl.constexpr = k_out.dtype.element_ty == tl.uint8
            row_at = k_out + head_at // ITEM_BYTES + token * TOKEN
            if SCALES > 0:
                GROUPS: tl.constexpr = (BLOCK + GROUP - 1) // GROUP
                LARGEST: tl.constexpr = 7.0 if PACKED else 127.0
                scale = scales_of(values, LARGEST, GROUPS)
                if PACKED:
                    byte = tl.arange(0, BLOCK // 2)
                    whole = stored[:, None] & (byte < TOKEN)[None, :]
                    q = packed(at, byte, whole, cos, sin, position, rotates, scale, DIM, GROUPS, DTYPE)
                    tl.store(row_at[:, None] + byte[None, :], q, mask=whole)
                else:
                    q = quantised(values, scale, GROUPS)
                    tl.store(row_at[:, None] + d[None, :], q, mask=inside)
                group = tl.arange(0, GROUPS)
                scale_at = (head_at + BLOCK_TOKENS * TOKEN) // 2 + token * SCALES
                known = stored[:, None] & (group < SCALES)[None, :]
                scale_at = scales + scale_at[:, None] + group[None, :]
                tl.store(scale_at, scale.to(tl.bfloat16), mask=known)
            else:
                tl.store(row_at[:, None] + d[None, :], values.to(STORED), mask=inside)
