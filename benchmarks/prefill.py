"""``extend``: new tokens on their past and themselves, as a share of the rate of a matrix product.

Called by ``kernels``. PyTorch's SDPA and the product run in turns with it.
"""

import torch
import torch.nn.functional as F

from farshore.benchmarks.implementation import Implementation
from farshore.benchmarks.machine import gemm
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.shapes import Shape, Sizes
from farshore.benchmarks.timing import interleave
from farshore.kernels.base import State

BAR_PERCENT_OF_GEMM = 65.0


def measure(
    implementation: Implementation, shape: Shape, past_tokens: int, sizes: Sizes
) -> tuple[list[Result], list[Bar]]:
    new = sizes.new_tokens
    generator = torch.Generator().manual_seed(past_tokens)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator).to(torch.bfloat16)

    q = random(new, shape.q_heads, shape.dim)
    k, v = (random(shape.kv_heads, past_tokens + new, shape.dim) for _ in "kv")
    out = State.identity(new, shape.q_heads, shape.dim, dtype=torch.bfloat16)
    positions = torch.arange(past_tokens, past_tokens + new)
    head_major_q = q.transpose(0, 1).contiguous()[None]
    mask = causal_mask(new, past_tokens) if past_tokens else None
    timed = interleave(
        {
            "extend": lambda: implementation.extend(
                q, k, v, shape.spec, q_positions=positions, k_position=0, out=out
            ),
            "sdpa": lambda: F.scaled_dot_product_attention(
                head_major_q, k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
            ),
            "gemm": gemm(torch.bfloat16, sizes.gemm),
        },
        rounds=sizes.rounds,
        limit_s=sizes.limit_s,
    )
    work_flops = flops(shape, new, past_tokens)
    gemm_flops = 2 * sizes.gemm**3
    percent, sdpa_percent = (
        100 * timed["gemm"].over(timed[name]) * work_flops / gemm_flops for name in ("extend", "sdpa")
    )
    name = f"extend bfloat16, {new} new on {past_tokens} past, {shape}"
    result = Result(
        name,
        timed["extend"],
        {
            "gflop": work_flops / 1e9,
            "gflops": work_flops / timed["extend"].median_s / 1e9,
            "gemm_gflops_in_turn": gemm_flops / timed["gemm"].median_s / 1e9,
            "percent_of_gemm": percent,
            "sdpa_gflops": work_flops / timed["sdpa"].median_s / 1e9,
            "sdpa_percent_of_gemm": sdpa_percent,
            "sdpa_ms": timed["sdpa"].median_s * 1e3,
            "times_faster_than_sdpa": timed["sdpa"].over(timed["extend"]),
        },
    )
    return [result], [Bar.at_least(name, percent, BAR_PERCENT_OF_GEMM, "% of GEMM rate")]


def flops(shape: Shape, new_tokens: int, past_tokens: int) -> int:
    """Of q.k and of weights.v, over the pairs that are attended: half of the new tokens' own square."""
    pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2
    return 4 * shape.dim * shape.q_heads * pairs


def causal_mask(new_tokens: int, past_tokens: int) -> torch.Tensor:
    """``bf16[new, past + new]``, 0 or -inf. SDPA's own ``is_causal`` knows no past; on CPU an additive mask
    in q's dtype took 20 to 50% less time than a boolean one."""
    seen = torch.ones(new_tokens, past_tokens + new_tokens, dtype=torch.bool).tril(past_tokens)
    return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
