"""Merging states on the device, one kernel for n of them."""

import triton
import triton.language as tl


@triton.jit
def absorb(peak, mass, total, lse, o):
    """One more state (lse ``[H]``, o ``[H, V_BLOCK]``) into those merged so far: total / mass is their mean,
    peak + ln(mass) their lse. A state with lse -inf changes nothing, provided its o is finite."""
    new_peak = tl.maximum(peak, lse)
    # Nothing seen so far: subtracting the peak from itself would give NaN.
    floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    fade = tl.exp(peak - floor)
    weight = tl.exp(lse - floor)
    return new_peak, mass * fade + weight, total * fade[:, None] + o * weight[:, None]


@triton.jit
def settle(peak, mass, total):
    """(o, lse) of what was absorbed; (0, -inf) of nothing."""
    some = mass > 0
    o = tl.where(some[:, None], total / tl.where(some, mass, 1.0)[:, None], 0.0)
    return o, tl.where(some, peak + tl.log(tl.where(some, mass, 1.0)), float("-inf"))


@triton.jit
def merge_kernel(
    states, strides, sink, o, o_row, o_head, lse, lse_row, lse_head, heads,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK_H heads. states: n pairs of pointers (o, lse); strides: of each, in
    elements, (o row, o head, lse row, lse head); sink: [heads], or None.

    Compiled once for each n: a table of pointers would have to be copied to the device first.

    Roofline, a row and head: (n + 1) V_DIM elements moved, 2 FLOPs each: bound by memory, in practice by the
    launch (8 states x 16 rows x 9 heads x 64 in float32 are 0.3 MB: a tenth of a microsecond of an H200's
    HBM).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = head < heads
    dims = tl.arange(0, V_BLOCK)
    keep = used[:, None] & (dims < V_DIM)[None, :]

    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, V_BLOCK), tl.float32)
    if sink is not None:
        # A state whose o is 0.
        peak = tl.load(sink + head, mask=used, other=float("-inf")).to(tl.float32)
        mass = tl.where(peak == float("-inf"), 0.0, 1.0)
    for i in tl.static_range(len(states)):
        at = row * strides[i][2] + head * strides[i][3]
        part = tl.load(states[i][1] + at, mask=used, other=float("-inf"))
        at = row * strides[i][0] + head[:, None] * strides[i][1] + dims[None, :]
        # An empty state's o carries no information, so not even a NaN in it may count.
        values = tl.load(states[i][0] + at, mask=keep & (part != float("-inf"))[:, None], other=0.0)
        peak, mass, total = absorb(peak, mass, total, part, values.to(tl.float32))
    mean, natural = settle(peak, mass, total)

    o_at = row * o_row + head[:, None] * o_head + dims[None, :]
    tl.store(o + o_at, mean.to(o.dtype.element_ty), mask=keep)
    tl.store(lse + row * lse_row + head * lse_head, natural, mask=used)
