"""Speed of the attention kernels: decode against the copy bandwidth, prefill against a bfloat16 product.

Called by ``benchmark``. Launches run in a CUDA graph, since the host takes longer to launch a kernel than the
GPU to read a short context. It must not know models.
"""

from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu.setting import Setting
from farshore.benchmarks.kernels.cold import ColdKV
from farshore.benchmarks.kernels.implementation import Implementation
from farshore.benchmarks.kernels.shapes import LLAMA_8B, SMOLLM2, Shape
from farshore.benchmarks.report import Bar, Result
from farshore.kernels.base import State
from farshore.kernels.formats import KVFormat

DECODE_PERCENT = 80.0
"""Bar of decode in bfloat16 at 32K tokens, in percent of the copy bandwidth."""
EXTEND_PERCENT = 60.0
"""Bar of prefill at 8K tokens, in percent of the rate of a bfloat16 product."""


def decode(setting: Setting) -> Measured:
    """One sequence and several, in bfloat16, int8 and int4."""
    tokens = setting.sizes.decode_tokens
    cases = (
        (LLAMA_8B, KVFormat.BFLOAT16, 1, tokens),
        (LLAMA_8B, KVFormat.INT8, 1, tokens),
        (LLAMA_8B, KVFormat.INT4, 1, tokens),
        (LLAMA_8B, KVFormat.BFLOAT16, max(setting.sizes.batches), tokens // 8),
        (SMOLLM2, KVFormat.BFLOAT16, 1, tokens),
    )
    results, bars = [], []
    for shape, format, sequences, context in cases:
        result = _decode(setting, shape, format, sequences, context)
        results.append(result)
        if not bars:
            percent = float(result.figures["percent_of_copy"])
            bars.append(Bar.at_least(result.name, percent, DECODE_PERCENT, "% of copy bandwidth"))
    return results, bars


def _decode(setting: Setting, shape: Shape, format: KVFormat, sequences: int, tokens: int) -> Result:
    kernels, layers = setting.kernels, setting.sizes.decode_layers
    kv = ColdKV(shape, format, sequences=sequences, tokens=tokens, layers=layers)
    kv.memory = kv.memory.to(setting.device)
    bound = Implementation("gpu", None, kernels.plan, kernels.partial, kernels.extend, kernels.merge)
    plan = kv.plan_separate(bound)
    q = torch.randn(sequences, shape.q_heads, shape.dim, device=setting.device).to(torch.bfloat16)
    out = State.identity(sequences, shape.q_heads, shape.dim, dtype=torch.bfloat16, device=setting.device)

    def all_layers() -> None:
        for layer in range(layers):
            kernels.partial(plan, layer, q, out=out)

    next_layer = cycle(range(layers))
    timed = setting.timed(
        {
            "graph": setting.captured(all_layers),
            "launched": lambda: kernels.partial(plan, next(next_layer), q, out=out),
        }
    )
    seconds = timed["graph"].median_s / layers
    gbps = kv.layer_bytes / seconds / 1e9
    figures = {
        "us_a_layer": seconds * 1e6,
        "us_launched_one_by_one": timed["launched"].median_s * 1e6,
        "gbps": gbps,
        "copy_gbps": setting.copy_gbps,
        "percent_of_copy": 100 * gbps / setting.copy_gbps,
    }
    return Result(f"decode {format.value}, {sequences} x {tokens} tokens, {shape}", timed["graph"], figures)


def extend(setting: Setting) -> Measured:
    """New tokens without a past, beside PyTorch's SDPA, which the engine could use in its place."""
    n = setting.sizes.extend_tokens
    results, bars = [], []
    for shape in (LLAMA_8B, SMOLLM2):
        timed = setting.timed(_extend(setting, shape, n))
        flops = 2 * n * n * shape.q_heads * shape.dim
        tflops = flops / timed["ours"].median_s / 1e12
        percent = 100 * tflops / setting.gemm_tflops
        figures = {
            "tflops": tflops,
            "gemm_tflops": setting.gemm_tflops,
            "percent_of_gemm": percent,
            "sdpa_tflops": flops / timed["sdpa"].median_s / 1e12,
            "times_faster_than_sdpa": timed["sdpa"].over(timed["ours"]),
        }
        result = Result(f"extend bfloat16, {n} tokens, {shape}", timed["ours"], figures)
        results.append(result)
        if shape is LLAMA_8B:
            bars.append(Bar.at_least(result.name, percent, EXTEND_PERCENT, "% of a bfloat16 product"))
    return results, bars


def _extend(setting: Setting, shape: Shape, n: int) -> dict[str, Callable[[], object]]:
    def random(heads: int) -> torch.Tensor:
        # Token-major, as projections write them; kernels get views.
        return torch.randn(n, heads, shape.dim, dtype=torch.bfloat16, device=setting.device)

    q, k, v = random(shape.q_heads), random(shape.kv_heads), random(shape.kv_heads)
    positions = torch.arange(n, device=setting.device)
    out = State.identity(n, shape.q_heads, shape.dim, dtype=torch.bfloat16, device=setting.device)
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    batched = [x.unsqueeze(0) for x in heads_first]
    return {
        "ours": lambda: setting.kernels.extend(
            q, *heads_first[1:], shape.spec, q_positions=positions, k_position=0, out=out
        ),
        "sdpa": lambda: F.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True),
    }
