"""The kernels over whole rows: ``add_norm``, a residual addition with the normalisation that follows it, and
``silu_multiply``, of the feed-forward part of a layer. Called by ``ops``.
"""

import triton
import triton.language as tl

from farshore.kernels.gpu.dense.rounding import rounded


@triton.jit
def add_norm_kernel(
    h, h_row, x, x_row, weight, normed, normed_row, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: one row of SIZE elements, held in registers. x: the addend, or None.

    Roofline, per row: 2 SIZE elements read and 2 written, 6 FLOPs each; the weight stays in L2. Bound by
    latency for few rows: a load, a reduction in shared memory and a store, some 2 us whatever the size. Bound
    by memory for many: 2,048 rows of 4,096 in bfloat16 move 67 MB, 14 us of an H200's HBM.
    """
    DTYPE: tl.constexpr = h.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keep = i < SIZE
    values = tl.load(h + row * h_row + i, mask=keep, other=0.0).to(tl.float32)
    if x is not None:
        addend = tl.load(x + row * x_row + i, mask=keep, other=0.0).to(tl.float32)
        values = rounded(values + addend, DTYPE)
        tl.store(h + row * h_row + i, values.to(DTYPE), mask=keep)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    w = tl.load(weight + i, mask=keep, other=0.0).to(tl.float32)
    result = rounded(w * rounded(values * scale, DTYPE), DTYPE)
    tl.store(normed + row * normed_row + i, result.to(DTYPE), mask=keep)


@triton.jit
def silu_multiply_kernel(gate_up, gate_up_row, out, out_row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK of a row's SIZE results. ``gate_up`` holds SIZE gates, then SIZE factors.

    Roofline, per result: 2 elements read and 1 written, 5 FLOPs and an exponential. Bound by latency for few
    rows, else by memory: 2,048 rows of 14,336 in bfloat16 move 176 MB, 37 us of an H200's HBM.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = i < SIZE
    at = gate_up + row * gate_up_row + i
    gate = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=keep, other=0.0).to(tl.float32)
    silu = rounded(tl.div_rn(gate, 1.0 + tl.exp(-gate)), DTYPE)
    tl.store(out + row * out_row + i, rounded(silu * up, DTYPE).to(DTYPE), mask=keep)
