"""Merging states on the device, one kernel for n of them."""

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    states, strides, sink, o, o_row, o_head, lse, lse_row, lse_head, heads,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK_H heads. states: tuple of (o, lse) pointers, strides: of (o row, o head, lse row, lse head).

    Compiled once per number of states: a table of pointers would have to be copied to the device first.

    Roofline: bytes (n + 1) V_DIM elements a row and head, 2 FLOPs an element read: bound by memory, in practice by
    the launch (8 states x 16 rows x 9 heads x 64 in float32 are 2.7 MB: under a microsecond of an H200's HBM).
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = head < heads
    dims = tl.arange(0, V_BLOCK)
    keep = used[:, None] & (dims < V_DIM)[None, :]

    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    if sink is not None:
        sinks = tl.load(sink + head, mask=used, other=float("-inf")).to(tl.float32)
        peak = sinks
    for i in tl.static_range(len(states)):
        at = row * strides[i][2] + head * strides[i][3]
        peak = tl.maximum(peak, tl.load(states[i][1] + at, mask=used, other=float("-inf")))
    # Nothing seen by any state: subtracting the peak from itself would give NaN.
    floor = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.zeros((BLOCK_H,), tl.float32)
    if sink is not None:
        mass += tl.exp(sinks - floor)
    total = tl.zeros((BLOCK_H, V_BLOCK), tl.float32)
    for i in tl.static_range(len(states)):
        at = row * strides[i][2] + head * strides[i][3]
        weight = tl.exp(tl.load(states[i][1] + at, mask=used, other=float("-inf")) - floor)
        at = row * strides[i][0] + head[:, None] * strides[i][1] + dims[None, :]
        # An empty state's o carries no information, so not even a NaN in it may count.
        values = tl.load(states[i][0] + at, mask=keep & (weight > 0)[:, None], other=0.0).to(tl.float32)
        mass += weight
        total += values * weight[:, None]

    some = mass > 0
    mean = tl.where(some[:, None], total / tl.where(some, mass, 1.0)[:, None], 0.0)
    natural = tl.where(some, floor + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    o_at = row * o_row + head[:, None] * o_head + dims[None, :]
    tl.store(o + o_at, mean.to(o.dtype.element_ty), mask=keep)
    tl.store(lse + row * lse_row + head * lse_head, natural, mask=used)
