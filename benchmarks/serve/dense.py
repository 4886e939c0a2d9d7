"""The dense benchmark: a decode step's and a prompt chunk's products, without attention.

Called through ``catalogue``. All layers and the vocabulary run one after the other, so that no weight is
still cached. What it is compared with runs in turns: the slices in PyTorch, and its weight-only int8 product.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from farshore.benchmarks import cases
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.serve.setting import Setting, weight_elements
from farshore.benchmarks.timing import interleave
from farshore.models.llama import Llama

READ_PERCENT = 85.0
"""Of the read bandwidth, at batch 1, counting the weights as bfloat16."""
GEMM_PERCENT = 80.0
MOST_STEP_ROWS = 64
"""More rows than these are a chunk of a prompt, and logits are wanted of its last row alone."""


@dataclass(frozen=True, slots=True)
class Sizes:
    step_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    chunk_rows: tuple[int, ...] = (256, 512, 1024, 2048)
    rounds: int = 9
    limit_s: float = 20.0
    """For one case; see ``timing.interleave``."""


def run(at: Setting, sizes: Sizes, *, only: str = "") -> Report:
    """The cases whose name holds ``only``. InvalidRequest, before anything is measured, if there are none."""
    names = {f"{rows} rows": rows for rows in (*sizes.step_rows, *sizes.chunk_rows)}
    chosen = cases.choose(names, only)
    results: list[Result] = []
    bars: list[Bar] = []
    with torch.inference_mode():
        for name, rows in chosen.items():
            at.progress(name)
            result = _measure(at, sizes, name, rows)
            results.append(result)
            if rows == 1:
                percent = float(result.figures["percent_of_read"])
                bars.append(Bar.at_least(name, percent, READ_PERCENT, "% of read bandwidth"))
            if rows > MOST_STEP_ROWS:
                percent = float(result.figures["percent_of_gemm"])
                bars.append(Bar.at_least(name, percent, GEMM_PERCENT, "% of GEMM rate"))
    return Report(asdict(at.facts), tuple(results), tuple(bars))


def _measure(at: Setting, sizes: Sizes, name: str, rows: int) -> Result:
    model = at.model
    layers, vocabulary = weight_elements(model.config)
    before = at.limits()
    candidates = {"ours": slices(model, rows), "pytorch": slices(Llama(model.config, model.weights), rows)}
    if rows <= MOST_STEP_ROWS:
        candidates["int8"] = int8_products(model, rows)
    timed = interleave(candidates, rounds=sizes.rounds, warm_up=1, limit_s=sizes.limit_s)
    after = at.limits()
    seconds = timed["ours"].median_s
    size = (layers + vocabulary) * model.dtype.itemsize
    flops = 2 * rows * layers + 2 * (rows if rows <= MOST_STEP_ROWS else 1) * vocabulary
    read_gbps = (before.read_gbps + after.read_gbps) / 2
    gemm_gflops = (before.gemm_gflops + after.gemm_gflops) / 2
    figures = {
        "gbps": size / seconds / 1e9,
        "gflops": flops / seconds / 1e9,
        "read_gbps": read_gbps,
        "gemm_gflops": gemm_gflops,
        "percent_of_read": 100 * size / seconds / 1e9 / read_gbps,
        "percent_of_gemm": 100 * flops / seconds / 1e9 / gemm_gflops,
        "times_faster_than_pytorch": timed["pytorch"].over(timed["ours"]),
        "times_faster_than_int8": timed["int8"].over(timed["ours"]) if "int8" in timed else None,
    }
    return Result(name, timed["ours"], figures)


def slices(model: Llama, rows: int) -> Callable[[], object]:
    """All that a step of ``rows`` rows computes outside of attention."""
    config = model.config
    generator = torch.Generator().manual_seed(rows)
    h0 = torch.randn(rows, config.hidden, generator=generator).to(model.dtype)
    o = torch.randn(rows, config.q_heads, config.head_dim, generator=generator).to(model.dtype)
    positions = torch.arange(rows)

    def run() -> object:
        h = h0
        for layer in range(config.layers):
            normed = model.attention_input(layer, h)
            model.query(layer, normed, positions)
            model.key_value(layer, normed, positions)
            h = model.finish(layer, h, o)
        return model.logits(h if rows <= MOST_STEP_ROWS else h[-1:])

    return run


def int8_products(model: Llama, rows: int) -> Callable[[], object]:
    """The same matrices as int8 with a scale a row, through PyTorch's own kernel: other values than the
    model's, at half the bytes. Products alone: no norm, rotation or activation."""
    weights = model.weights
    matrices = [m for w in weights.layers for m in (w.q, w.k, w.v, w.o, w.gate, w.up, w.down)]
    quantised = [_int8(matrix) for matrix in (*matrices, weights.head)]
    inputs = {q.shape[1]: torch.randn(rows, q.shape[1]).to(model.dtype) for q, _ in quantised}

    def run() -> object:
        for q, scales in quantised:
            last = torch.ops.aten._weight_int8pack_mm(inputs[q.shape[1]], q, scales)
        return last

    return run


def _int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = matrix.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    return (matrix.float() / scales).round().to(torch.int8), scales[:, 0].to(matrix.dtype)
