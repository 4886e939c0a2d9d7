"""Cases of ``extend``: new tokens over their past and themselves, as a share of the GEMM rate.

Called by ``benchmark``. PyTorch's SDPA and a matrix product alternate with it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from farshore.benchmarks.kernels.implementation import Setting
from farshore.benchmarks.kernels.shapes import Shape
from farshore.benchmarks.machine import gemm
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import interleave
from farshore.kernels.base import State

BAR_PERCENT_OF_GEMM = 65.0


def measure(setting: Setting, *, shape: Shape, past_tokens: int) -> tuple[list[Result], list[Bar]]:
    """``setting.sizes.new_tokens`` new tokens after ``past_tokens``, in bf16."""
    new = setting.sizes.new_tokens
    generator = torch.Generator().manual_seed(past_tokens)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=generator).to(torch.bfloat16)

    q = random(new, shape.q_heads, shape.dim)
    k, v = (random(shape.kv_heads, past_tokens + new, shape.dim) for _ in "kv")
    out = State.identity(new, shape.q_heads, shape.dim, dtype=torch.bfloat16, device="cpu")
    positions = torch.arange(past_tokens, past_tokens + new)
    sdpa, sdpa_new = _sdpa(q, k, v, run_s=setting.sizes.sdpa_run_s)
    product, gemm_flops = gemm(setting.rates.gemm)
    timed = interleave(
        {
            "extend": lambda: setting.implementation.extend(
                q, k, v, shape.spec, q_positions=positions, k_position=0, out=out
            ),
            "sdpa": sdpa,
            "gemm": product,
        },
        rounds=setting.sizes.rounds,
        least_run_s=setting.sizes.machine.least_run_s,
        limit_s=setting.sizes.limit_s,
    )
    work_flops = flops(shape, new, past_tokens)
    sdpa_flops = flops(shape, sdpa_new, past_tokens + new - sdpa_new)
    percent, sdpa_percent = (
        100 * timed["gemm"].over(timed[name]) * work / gemm_flops
        for name, work in (("extend", work_flops), ("sdpa", sdpa_flops))
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
            "sdpa_new_tokens": sdpa_new,
            "sdpa_gflops": sdpa_flops / timed["sdpa"].median_s / 1e9,
            "sdpa_percent_of_gemm": sdpa_percent,
            "times_faster_than_sdpa": timed["sdpa"].over(timed["extend"]) * work_flops / sdpa_flops,
        },
    )
    return [result], [Bar.at_least(name, percent, BAR_PERCENT_OF_GEMM, "% of GEMM rate")]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, run_s: float) -> tuple[Callable[[], Tensor], int]:
    """PyTorch's attention of some of the last new tokens, and their number, chosen so that a run takes about
    ``run_s``. All of them would take minutes in bfloat16 on a CPU without instructions for it."""

    def of_last(new: int) -> Callable[[], Tensor]:
        past = k.shape[1] - new
        last = q[-new:].transpose(0, 1).contiguous()[None]
        mask = causal_mask(new, past) if past else None
        return lambda: F.scaled_dot_product_attention(
            last, k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )

    new = q.shape[0]
    few = max(new // 32, 1)
    few_s = interleave({"few": of_last(few)}, rounds=1, warm_up=1)["few"].median_s
    new = min(new, max(few, int(few * run_s / few_s)))
    return of_last(new), new


def flops(shape: Shape, new_tokens: int, past_tokens: int) -> int:
    """The FLOPs of q.k and weights.v over all pairs of a query and a key that it sees."""
    pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2
    return 4 * shape.dim * shape.q_heads * pairs


def causal_mask(new_tokens: int, past_tokens: int) -> torch.Tensor:
    """``bf16[new, past + new]``, 0 or -inf. SDPA's ``is_causal`` does not support a past. On a CPU an
    additive mask in q's dtype took 20 to 50% less time than a boolean one."""
    seen = torch.ones(new_tokens, past_tokens + new_tokens, dtype=torch.bool).tril(past_tokens)
    return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
