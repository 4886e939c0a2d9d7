"""Measures a decode step of a quantised model against the same model in bfloat16.

Called by ``dense``, which compares the ratio with its bar. The model is random: Llama's shape with about a
billion weights, in llama.cpp's mixture Q4_K_M. Its values change no time.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from random import Random
from statistics import median
from typing import Any

import torch

from farshore.benchmarks.report import Result
from farshore.benchmarks.serve.engine import LocalEngine
from farshore.benchmarks.timing import SETTLE_S, Timing
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.llama import LayerWeights, LlamaWeights, Matrix
from farshore.models.weights.names import expected_shapes

NAME = "q4_k step"
CONTEXT = 128
SKIPPED_TOKENS = 3
"""The first tokens of each run, whose times are not counted."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; tests use tiny sizes."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 8192
    vocab: int = 32000
    rounds: int = 9
    tokens: int = 12
    """Tokens of each run that are counted."""


# ggml's type -> (weights and bytes of a block, float16 scales by their place in it). With random integers
# they make weights of about 1 / 50, the size of real ones, half of them negative.
_BLOCKS = {"Q4_K": (256, 144, {0: 1.5e-4, 2: 1.1e-3}), "Q6_K": (256, 210, {208: 1.5e-5})}


def measure(sizes: Sizes, *, threads: int) -> Result | None:
    """Decodes one sequence after CONTEXT tokens, alternately with both models. The figure
    ``q4_k_step_over_bf16`` is the median of the ratios of each round. None without native kernels, which keep
    no quantised weights."""
    try:
        native = import_module("farshore.models.native_llama")
    except ImportError:
        return None
    config = ModelConfig(
        name="random",
        layers=sizes.layers,
        hidden=sizes.hidden,
        q_heads=sizes.hidden // 64,
        kv_heads=sizes.hidden // 256,
        head_dim=64,
        intermediate=sizes.intermediate,
        vocab=sizes.vocab,
        max_positions=CONTEXT + SKIPPED_TOKENS + sizes.tokens + 1,
        rms_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        tied_embeddings=True,
    )
    weights = _random_weights(config, native, threads)
    steps_s: dict[str, list[float]] = {"q4_k": [], "bf16": []}
    with ExitStack() as running:
        engines = {
            name: running.enter_context(
                LocalEngine(native.NativeLlama(config, given, threads=threads), kv_bytes=64 << 20)
            )
            for name, given in zip(steps_s, (weights, weights.dense()), strict=True)
        }
        for _ in range(1 + sizes.rounds):
            for name, engine in engines.items():
                time.sleep(SETTLE_S)
                steps_s[name].append(_step_s(engine, config.vocab, sizes.tokens))
    timed = {name: Timing(tuple(samples[1:])) for name, samples in steps_s.items()}
    figures = {
        "q4_k_step_ms": timed["q4_k"].median_s * 1e3,
        "bf16_step_ms": timed["bf16"].median_s * 1e3,
        "q4_k_step_over_bf16": timed["q4_k"].over(timed["bf16"]),
    }
    return Result(NAME, timed["q4_k"], figures)


def _step_s(engine: LocalEngine, vocab: int, tokens: int) -> float:
    random = Random(0)
    prompt = [random.randrange(vocab) for _ in range(CONTEXT)]
    request = engine.submit(prompt, max_tokens=tokens + SKIPPED_TOKENS).wait()
    return median(request.gaps_s(skip=SKIPPED_TOKENS - 1))


def _random_weights(config: ModelConfig, native: Any, threads: int) -> LlamaWeights:
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> Matrix:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        rows = _random_rows(_kind(name, config.layers), shape, generator)
        return native.matrix(_kind(name, config.layers), rows, dtype=torch.bfloat16, threads=threads)

    made = {name: tensor(name, shape) for name, shape in expected_shapes(config).items()}
    layers = tuple(
        LayerWeights(**{field: made.get(f"{layer}.{field}") for field in LayerWeights._fields})
        for layer in range(config.layers)
    )
    return LlamaWeights(made["embed"], layers, made["norm"], made["embed"])


def _kind(name: str, layers: int) -> str:
    """Q4_K_M: the vocabulary, and v and down of half of the layers, in Q6_K."""
    layer, _, field = name.rpartition(".")
    if not layer:
        return "Q6_K"
    number, eighth = int(layer), layers // 8
    more_bits = number < eighth or number >= 7 * eighth or (number - eighth) % 3 == 2
    return "Q6_K" if field in ("v", "down") and more_bits else "Q4_K"


def _random_rows(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    weights, size, scales = _BLOCKS[kind]
    blocks = torch.randint(256, (shape[0], shape[1] // weights, size), generator=generator, dtype=torch.uint8)
    for at, scale in scales.items():
        blocks[..., at : at + 2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    return blocks.flatten(1)
