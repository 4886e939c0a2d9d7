"""The device function by which the dense kernels round as PyTorch does. Called by these kernels."""

import triton
import triton.language as tl

from farshore.kernels.gpu.attend import INTERPRETED


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x, rounded to the nearest value of DTYPE, in float32."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        # The interpreter cuts bits off instead: the nearest value is made first.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE).to(tl.float32)
