"""Models for the benchmark: random ones of any shape, and those that transformers has loaded. They compute as
a GPU's dense worker does, also on a CPU.

Called by the sections and by ``dry``. It must not read files: the packages for that may be missing on a
machine with a GPU. It must not know what is measured.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from farshore.models.config.hf import from_hf
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.device_llama import DeviceLlama
from farshore.models.llama import LayerWeights, Llama, LlamaWeights
from farshore.models.weights.names import expected_shapes, hf_name

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
"""The shape of Llama 3.1 8B, as its config.json has it."""


def tiny_config(
    *, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 64, layers: int = 2, **changes: Any
) -> ModelConfig:
    """A small model; attention has the shape asked for."""
    config = ModelConfig(
        name="random",
        layers=layers,
        hidden=64,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=96,
        vocab=97,
        max_positions=1024,
        rms_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        tied_embeddings=True,
    )
    return replace(config, **changes)


def random_llama(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Llama:
    """Weights from PyTorch's default generator, scaled so that hidden states keep their size."""

    def made(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[-1] ** -0.5)

    return _assembled(config, {name: made(shape) for name, shape in expected_shapes(config).items()})


def of_transformers(theirs: Any) -> Llama:
    """A Llama with the weights of a model of transformers. Both share all matrices but those that ours
    joins: q, k and v, gate and up."""
    config = from_hf(theirs.config.to_dict(), None, "transformers' model")
    state = theirs.state_dict()
    return _assembled(config, {name: state[hf_name(name)] for name in expected_shapes(config)})


def _assembled(config: ModelConfig, found: dict[str, Tensor]) -> Llama:
    layers = tuple(
        LayerWeights(**{field: found.get(f"{layer}.{field}") for field in LayerWeights._fields})  # type: ignore[arg-type]
        for layer in range(config.layers)
    )
    head = found.get("head", found["embed"])
    return DeviceLlama(config, LlamaWeights(found["embed"], layers, found["norm"], head))
