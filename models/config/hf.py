"""Reads a model's shape from ``config.json`` and ``generation_config.json``, as transformers reads them.

Called by ``load``. It must not import torch. Absent keys have the defaults of transformers' LlamaConfig and
MistralConfig, except sizes, which a file must name. Keys that transformers' models ignore are ignored here
too; keys that change what these compute, and that this package does not, are refused.
"""

from collections.abc import Mapping
from typing import Any

from farshore.errors import ModelError
from farshore.models.config.model import ModelConfig
from farshore.models.config.positions import served_length
from farshore.models.config.rope import RopeConfig
from farshore.models.config.rope_parameters import FLAG, ORIGINAL, check_flag, read_rope
from farshore.models.config.values import boolean, number, positive
from farshore.models.files import checkpoint

SUPPORTED = "model_type 'llama' and 'mistral'"
_MISTRAL_WINDOW = 4096
"""transformers' ``sliding_window`` of a Mistral configuration that has none."""
_MISTRAL_KV_HEADS = 8
_ATTENTION_BIASES = ("q", "k", "v", "o")
_MLP_BIASES = ("gate", "up", "down")
_REFUSED = {
    "per_layer_config": "layers of different shapes",
    "kv_sharing_modes": "layers that share KV",
    "text_config": "a model of several parts",
}
"""Key of config.json that must be absent or null → what it asks for."""


def from_hf(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    name: str,
    *,
    max_model_len: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Reads the objects in ``config.json`` and, if present, ``generation_config.json``.

    ``max_model_len``, ``rope_scaling``: see ``load_config``. Raises ModelError.
    """
    family = _checked_family(config, name)
    try:
        heads = config["num_attention_heads"]
        hidden = config["hidden_size"]
        max_positions = config["max_position_embeddings"]
        vocab = config["vocab_size"]
        layers = config["num_hidden_layers"]
        intermediate = config["intermediate_size"]
    except KeyError as error:
        raise ModelError(f"{name}: config.json lacks {error.args[0]!r}; get the model's own file") from None
    if not positive(max_positions):
        raise ModelError(
            f"{name}: max_position_embeddings must be a positive whole number, not {max_positions!r:.80}"
        )
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = hidden // heads if positive(heads) and positive(hidden) else 0
    kv_heads = config.get("num_key_value_heads", _MISTRAL_KV_HEADS if family == "mistral" else None)
    rope = _rope(config, rope_scaling, max_positions, head_dim, name)
    return ModelConfig(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocab=vocab,
        q_heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        max_positions=served_length(
            rope,
            max_positions,
            window=_window(config, family, name),
            asked=max_model_len,
            from_flag=rope_scaling is not None,
            name=name,
        ),
        rms_eps=number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", name),
        rope=rope,
        tied_embeddings=boolean(config.get("tie_word_embeddings", False), "tie_word_embeddings", name),
        biases=_biases(config, family, name),
        eos_token_ids=end_ids(config if generation_config is None else generation_config, vocab, name),
    )


def _checked_family(config: Mapping[str, Any], name: str) -> str:
    """The model type, after a look for what is refused."""
    family = config.get("model_type")
    if family not in ("llama", "mistral"):
        raise ModelError(f"{name}: model_type {family!r:.80} is unsupported; supported: {SUPPORTED}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{name}: hidden_act {config['hidden_act']!r:.80} is unsupported; supported: 'silu'")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
            raise ModelError(
                f"{name}: quantised safetensors ({method or key}) are unsupported; use the unquantised model "
                f"or a GGUF file; supported: {checkpoint.SUPPORTED}"
            )
    for key, meaning in _REFUSED.items():
        if config.get(key) is not None:
            raise ModelError(f"{name}: {key} in config.json ({meaning}) is unsupported; use another model")
    if config.get("is_causal", True) is not True or config.get("is_encoder_decoder", False) is not False:
        raise ModelError(f"{name}: the model is no causal decoder; use a model that generates text")
    return family


def _biases(config: Mapping[str, Any], family: str, name: str) -> tuple[str, ...]:
    if family == "mistral":
        return ()  # transformers' Mistral has none, whatever the file says.
    attention = boolean(config.get("attention_bias", False), "attention_bias", name)
    mlp = boolean(config.get("mlp_bias", False), "mlp_bias", name)
    return (_ATTENTION_BIASES if attention else ()) + (_MLP_BIASES if mlp else ())


def end_ids(source: Mapping[str, Any], vocab: Any, name: str) -> tuple[int, ...]:
    """The end tokens of ``source``: null, one id or a list of ids, without repeats, in order.

    ``source`` is generation_config.json, if there is one, and config.json otherwise: transformers' generate
    reads one of the two, and a generation_config.json without end tokens means none. Ids outside the
    vocabulary are dropped: they are never sampled, and files have -1 for "none".
    """
    given = source.get("eos_token_id")
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    for token in tokens:
        if type(token) is not int:
            raise ModelError(f"{name}: eos_token_id must be a token id or a list of them, not {token!r:.80}")
    return tuple(dict.fromkeys(token for token in tokens if not positive(vocab) or 0 <= token < vocab))


def _window(config: Mapping[str, Any], family: str, name: str) -> int | None:
    """The fewest tokens that a layer attends to; None if each attends to all."""
    windows: list[int] = []
    default = _MISTRAL_WINDOW if family == "mistral" else None
    for key, absent in (("sliding_window", default), ("attention_chunk_size", None)):
        window = config.get(key, absent)
        if window is not None and not positive(window):
            raise ModelError(f"{name}: {key} must be a positive whole number or null, not {window!r:.80}")
        windows += [] if window is None else [window]
    types = config.get("layer_types")
    if types is not None:
        supported = ["full_attention", "attention", *(["sliding_attention"] if windows else [])]
        if not isinstance(types, list) or not all(kind in supported for kind in types):
            raise ModelError(
                f"{name}: layer_types {types!r:.80} are unsupported; supported: a list of 'full_attention'"
            )
        if len(types) != config["num_hidden_layers"]:
            raise ModelError(
                f"{name}: {len(types)} layer_types for {config['num_hidden_layers']!r:.80} layers; get the "
                "model's own config.json"
            )
    return min(windows, default=None)


def _rope(
    config: Mapping[str, Any], scaling: Any, max_positions: int, head_dim: Any, name: str
) -> RopeConfig:
    """The rotary embedding of ``config``, with the operator's ``scaling`` in place of its own if given."""
    # transformers takes rope_scaling unless it is empty, also beside rope_parameters.
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"{name}: rope parameters must be an object, not {given!r:.80}")
    if config.get("partial_rotary_factor", 1) not in (None, 1) and "partial_rotary_factor" not in given:
        raise ModelError(f"{name}: a partial_rotary_factor other than 1 is unsupported")
    theta = config.get("rope_theta", 10000.0)
    where = "config.json"
    if scaling is not None:
        check_flag(scaling, name)
        theta = given.get("rope_theta", theta)
        given, where = scaling, FLAG
    elif ORIGINAL in config:
        # transformers puts the outer key over the inner one.
        given = {**given, ORIGINAL: config[ORIGINAL]}
    return read_rope(
        given,
        theta=theta,
        max_positions=max_positions,
        head_dim=head_dim if positive(head_dim) else 0,
        name=name,
        where=where,
    )
