from dataclasses import replace

import pytest
import torch

from farshore.benchmarks.kernels.implementation import choose
from farshore.benchmarks.kernels.shapes import Sizes
from farshore.benchmarks.machine import MachineSizes, facts
from farshore.models.llama import LayerWeights, Llama, LlamaWeights
from farshore.models.weights.names import expected_shapes


@pytest.fixture
def machine():
    """The facts of this machine, with a tiny cache, so that buffers may be small."""
    return replace(facts(threads=1), l3_bytes=4096)


@pytest.fixture(scope="session")
def random_llama():
    """random_llama(config): a Llama with random bfloat16 weights and tied embeddings."""

    def make(config):
        generator = torch.Generator().manual_seed(2)
        made = {
            name: torch.randn(shape, generator=generator).bfloat16() / 8
            for name, shape in expected_shapes(config).items()
        }
        layers = tuple(
            LayerWeights(**{field: made.get(f"{layer}.{field}") for field in LayerWeights._fields})
            for layer in range(config.layers)
        )
        return Llama(config, LlamaWeights(made["embed"], layers, made["norm"], made["embed"]))

    return make


@pytest.fixture
def tiny():
    return Sizes(
        context_tokens=300,
        shared_tokens=40,
        shared_rows=3,
        kv_bytes=1 << 20,
        new_tokens=5,
        past_tokens=(0, 7),
        rounds=3,
        calls=2,
        machine=MachineSizes(buffer_bytes=8192, gemm=(8, 16), least_run_s=0, rounds=3),
    )


@pytest.fixture
def reference():
    return choose("reference", threads=1)
