"""Reads a model's shape from ``config.json`` and ``generation_config.json``.

Called by ``load``. It must not import torch.
"""

from collections.abc import Mapping
from typing import Any

from farshore.errors import ModelError
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.config.values import merged, number, positive

SUPPORTED = "model_type 'llama', and 'mistral' without a sliding window"


def from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, name: str) -> ModelConfig:
    """Reads the objects in ``config.json`` and, if present, ``generation_config.json``. Raises
    ModelError."""
    _refuse_other_architectures(config, name)
    try:
        heads = config["num_attention_heads"]
        hidden = config["hidden_size"]
        sizes = dict(
            layers=config["num_hidden_layers"],
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
        )
    except KeyError as error:
        raise ModelError(f"{name}: config.json lacks {error.args[0]!r}; get the model's own file") from None
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = hidden // heads if positive(heads) and positive(hidden) else 0
    kv_heads = config.get("num_key_value_heads")
    generation = generation_config or {}
    bos = config.get("bos_token_id")
    return ModelConfig(
        name=name,
        hidden=hidden,
        q_heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rms_eps=number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", name),
        rope=RopeConfig.from_hf(config, name),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        bos_token_id=bos,
        eos_token_ids=merged(generation.get("eos_token_id"), config.get("eos_token_id")),
        **sizes,
    )


def _refuse_other_architectures(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ModelError(f"{name}: model_type {kind!r} is unsupported; supported: {SUPPORTED}")
    if kind == "mistral" and config.get("sliding_window") is not None:
        raise ModelError(f"{name}: a sliding window is unsupported; supported: {SUPPORTED}")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{name}: hidden_act {config['hidden_act']!r} is unsupported; supported: 'silu'")
    if config.get("quantization_config"):
        raise ModelError(
            f"{name}: quantised safetensors are unsupported; use the unquantised model or a GGUF file"
        )
