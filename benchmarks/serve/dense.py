"""The dense benchmark: the products of a decode step and of a prompt's chunk, without attention.

Called through ``catalogue``. Runs all layers and the vocabulary's product in sequence, so that no weight is
still in a cache. Interleaved with it, for comparison: the same slices in PyTorch, and PyTorch's weight-only
int8 product.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from farshore.benchmarks import cases
from farshore.benchmarks.cases import Measured
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.serve import quantised
from farshore.benchmarks.serve.setting import Setting, weight_elements
from farshore.benchmarks.timing import interleave
from farshore.models.llama import Llama, LlamaWeights

READ_PERCENT = 85.0
"""Bar at one row, in percent of the read bandwidth, with the weights counted as bfloat16."""
GEMM_PERCENT = 80.0
"""Bar of chunks, in percent of the GEMM rate."""
Q4_K_STEP_OVER_BF16 = 0.6
"""Bar of a decode step of a quantised model."""
MOST_STEP_ROWS = 64
"""With more rows than this, the rows are a chunk of a prompt and logits are computed for the last row
only."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; tests use tiny sizes."""

    step_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    chunk_rows: tuple[int, ...] = (256, 512, 1024, 2048)
    rounds: int = 9
    limit_s: float = 20.0
    """Time limit of one case; see ``timing.interleave``."""
    q4_k: quantised.Sizes = field(default_factory=quantised.Sizes)


def run(setting: Setting, sizes: Sizes, *, only: str = "") -> Report:
    """Runs the cases whose name contains ``only``. Raises InvalidRequest before anything is measured if no
    case matches."""
    available: dict[str, Callable[[Setting], Measured]] = {
        f"{rows} rows": partial(_rows, sizes=sizes, rows=rows)
        for rows in (*sizes.step_rows, *sizes.chunk_rows)
    }
    available[quantised.NAME] = partial(_quantised, sizes=sizes)
    chosen = cases.choose(available, only)
    with torch.inference_mode():
        results, bars = cases.measure(chosen, setting, progress=setting.progress)
    return Report(asdict(setting.facts), tuple(results), tuple(bars))


def _rows(setting: Setting, *, sizes: Sizes, rows: int) -> Measured:
    name = f"{rows} rows"
    result = _measure(setting, sizes, name, rows)
    bars: list[Bar] = []
    if rows == 1:
        percent = float(result.figures["percent_of_read"])
        bars.append(Bar.at_least(name, percent, READ_PERCENT, "% of read bandwidth"))
    if rows > MOST_STEP_ROWS:
        percent = float(result.figures["percent_of_gemm"])
        bars.append(Bar.at_least(name, percent, GEMM_PERCENT, "% of GEMM rate"))
    return [result], bars


def _quantised(setting: Setting, *, sizes: Sizes) -> Measured:
    result = quantised.measure(sizes.q4_k, threads=setting.facts.threads)
    value = None if result is None else float(result.figures["q4_k_step_over_bf16"])
    note = "the native kernels are not built" if result is None else ""
    bar = Bar.at_most("q4_k_step_over_bf16", value, Q4_K_STEP_OVER_BF16, "times", note)
    return [] if result is None else [result], [bar]


def _measure(setting: Setting, sizes: Sizes, name: str, rows: int) -> Result:
    model = setting.model
    layers, vocabulary = weight_elements(model.config)
    weights = model.weights.dense()
    before = setting.limits()
    candidates = {"ours": slices(model, rows), "pytorch": slices(Llama(model.config, weights), rows)}
    if rows <= MOST_STEP_ROWS:
        candidates["int8"] = int8_products(weights, model.dtype, rows)
    timed = interleave(candidates, rounds=sizes.rounds, warm_up=1, limit_s=sizes.limit_s)
    after = setting.limits()
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
    """A function that computes everything but attention of a step of ``rows`` rows."""
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


def int8_products(weights: LlamaWeights, dtype: torch.dtype, rows: int) -> Callable[[], object]:
    """A function that computes the products of ``slices`` with int8 weights and a scale per row, by PyTorch's
    kernel: half the bytes, and approximate values. Without norms, rotations and activations."""
    matrices = [m for w in weights.layers for m in (w.q, w.k, w.v, w.o, w.gate, w.up, w.down)]
    products = [_int8(matrix) for matrix in (*matrices, weights.head)]
    inputs = {q.shape[1]: torch.randn(rows, q.shape[1]).to(dtype) for q, _ in products}

    def run() -> object:
        for q, scales in products:
            last = torch.ops.aten._weight_int8pack_mm(inputs[q.shape[1]], q, scales)
        return last

    return run


def _int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = matrix.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    return (matrix.float() / scales).round().to(torch.int8), scales[:, 0].to(matrix.dtype)
