"""The ``merge`` kernel, which merges n states in one launch, and its device functions. Called by ``ops``.

Merged states are kept as softmax sums (see ``attend``) in base e: acc / row_sum is their o, and
row_max + ln(row_sum) their lse.
"""

import triton
import triton.language as tl

from farshore.kernels.gpu.attend import no_keys


@triton.jit
def add_state(row_max, row_sum, acc, lse, o):
    """Merges one more state (lse ``[H]``, o ``[H, V_BLOCK]``) into the sums. A state with lse -inf changes
    nothing if its o is finite."""
    new_max = tl.maximum(row_max, lse)
    # Only empty states so far: subtracting row_max from itself would give NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp(row_max - base)
    weight = tl.exp(lse - base)
    return new_max, row_sum * rescale + weight, acc * rescale[:, None] + o * weight[:, None]


@triton.jit
def normalise_base_e(row_max, row_sum, acc):
    """The state (o, lse) of the sums; (0, -inf) if all states were empty."""
    seen = row_sum > 0
    divisor = tl.where(seen, row_sum, 1.0)
    o = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    return o, tl.where(seen, row_max + tl.log(divisor), float("-inf"))


@triton.jit
def merge_kernel(
    states, strides, sink, o, o_row, o_head, lse, lse_row, lse_head, heads,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK_H heads. ``states`` are n pairs of pointers (o, lse); ``strides`` are n
    tuples (o row, o head, lse row, lse head), in elements; ``sink`` is ``[heads]`` or None.

    It is compiled once for each n, because a table of pointers would have to be copied to the device first.

    Roofline, per row and head: (n + 1) V_DIM elements moved, 2 FLOPs each. Bound by memory, in practice by
    the launch: 8 states x 16 rows x 9 heads x 64 in float32 are 0.3 MB, a tenth of a microsecond of an H200's
    HBM.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    used = head < heads
    dims = tl.arange(0, V_BLOCK)
    keep = used[:, None] & (dims < V_DIM)[None, :]

    row_max, row_sum, acc = no_keys(BLOCK_H, V_BLOCK)
    if sink is not None:
        # The sink is a state whose o is 0.
        row_max = tl.load(sink + head, mask=used, other=float("-inf")).to(tl.float32)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    for i in tl.static_range(len(states)):
        state_at = row * strides[i][2] + head * strides[i][3]
        state_lse = tl.load(states[i][1] + state_at, mask=used, other=float("-inf"))
        state_at = row * strides[i][0] + head[:, None] * strides[i][1] + dims[None, :]
        # The o of an empty state may be NaN and must not count.
        nonempty = keep & (state_lse != float("-inf"))[:, None]
        state_o = tl.load(states[i][0] + state_at, mask=nonempty, other=0.0)
        row_max, row_sum, acc = add_state(row_max, row_sum, acc, state_lse, state_o.to(tl.float32))
    o_values, lse_values = normalise_base_e(row_max, row_sum, acc)

    o_at = row * o_row + head[:, None] * o_head + dims[None, :]
    tl.store(o + o_at, o_values.to(o.dtype.element_ty), mask=keep)
    tl.store(lse + row * lse_row + head * lse_head, lse_values, mask=used)
