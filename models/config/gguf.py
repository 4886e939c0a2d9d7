"""Reads a model's shape from a GGUF file's metadata and tensor names, as llama.cpp reads them.

Called by ``load`` and ``weights.load``. It must not import torch. transformers ignores what GGUF files say
about rotary scaling; llama.cpp is the authority there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from farshore.errors import ModelError
from farshore.models.config.model import ModelConfig
from farshore.models.config.positions import served_length
from farshore.models.config.rope import RopeConfig
from farshore.models.config.rope_parameters import FLAG, ORIGINAL, check_flag, read_rope
from farshore.models.config.values import positive
from farshore.models.files.gguf import GgufFile

_BIASES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_NEUTRAL = {
    "llama.attention.scale": (0,),
    "llama.attention.clamp_kqv": (0,),
    "llama.attention.max_alibi_bias": (0,),
    "llama.attention.causal": (True,),
    "llama.attn_logit_softcapping": (0,),
    "llama.final_logit_softcapping": (0,),
    "llama.logit_scale": (0, 1),
    "llama.residual_scale": (0, 1),
    "llama.embedding_scale": (0, 1),
    "llama.rope.scaling.alpha": (0,),
}
"""Key that would change the result → the values at which it does not."""
_YARN_NEUTRAL = {
    "llama.rope.scaling.yarn_ext_factor": 1,
    "llama.rope.scaling.yarn_log_multiplier": 0,
    # Versions of llama.cpp differ: it multiplies the usual attention factor, or is ignored.
    "llama.rope.scaling.yarn_attn_factor": None,
}
"""Key that llama.cpp reads, and we do not → its value without effect."""
_LONG, _SHORT, _FACTORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


def from_gguf(
    file: GgufFile,
    name: str,
    *,
    max_model_len: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Reads a GGUF file's metadata. ``max_model_len``, ``rope_scaling``: see ``load_config``. End tokens
    belong to a GGUF file's tokenizer, which reads them. Raises ModelError for everything but a dense
    'llama'."""
    architecture = file.get("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{file.path}: GGUF architecture {architecture!r} is unsupported; supported: 'llama'"
        )
    if file.number("llama.expert_count", 0):
        raise ModelError(f"{file.path}: mixtures of experts are unsupported; supported: dense 'llama'")
    if file.get("general.type", "model") != "model":
        raise ModelError(
            f"{file.path}: is of general.type {file.get('general.type')!r:.40}, not a model; merge a LoRA "
            "adapter into its model with llama-export-lora, or give the model's own file"
        )
    for key, neutral in _NEUTRAL.items():
        if file.get(key, neutral[0]) not in neutral:
            raise ModelError(f"{file.path}: {key} {file.get(key)!r:.80} is unsupported; use another model")
    layers = file.number("llama.block_count")
    hidden = file.number("llama.embedding_length")
    heads = file.number("llama.attention.head_count")
    vocab = file.get("llama.vocab_size") or len(file.texts("tokenizer.ggml.tokens"))
    max_positions = file.number("llama.context_length")
    head_dim = _head_dim(file, hidden, heads)
    rope = _rope(file, rope_scaling, max_positions, head_dim, name)
    return ModelConfig(
        name=name,
        layers=layers,
        hidden=hidden,
        q_heads=heads,
        kv_heads=file.number("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate=file.number("llama.feed_forward_length"),
        vocab=vocab,
        max_positions=served_length(
            rope,
            max_positions,
            window=file.number("llama.attention.sliding_window", 0) or None,
            asked=max_model_len,
            from_flag=rope_scaling is not None,
            name=name,
        ),
        rms_eps=float(file.number("llama.attention.layer_norm_rms_epsilon")),
        rope=rope,
        tied_embeddings="output.weight" not in file.tensor_names,
        biases=_biases(file, layers),
    )


def _head_dim(file: GgufFile, hidden: Any, heads: Any) -> int:
    """Dimensions of each head. Raises ModelError unless keys and values have the same, and all rotate."""
    default = hidden // heads if positive(heads) and positive(hidden) else 0
    head_dim = file.number("llama.attention.key_length", default)
    if file.get("llama.attention.value_length", default) != head_dim:
        raise ModelError(
            f"{file.path}: values and keys of different lengths are unsupported; use another model"
        )
    if file.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{file.path}: rotating a part of each head is unsupported; use another model")
    return head_dim


def _biases(file: GgufFile, layers: Any) -> tuple[str, ...]:
    """The matrices with a bias. Raises ModelError unless all layers have the same."""
    found = []
    for field, tensor in _BIASES.items():
        biased = sum(name.endswith(f".{tensor}.bias") for name in file.tensor_names)
        if biased not in (0, layers):
            raise ModelError(
                f"{file.path}: {tensor}.bias in {biased} of {layers!r:.80} layers is unsupported; "
                "convert the model again"
            )
        found += [field] if biased else []
    return tuple(found)


def _rope(file: GgufFile, scaling: Any, max_positions: Any, head_dim: int, name: str) -> RopeConfig:
    """Reads ``llama.rope.*`` and the tensors of factors, or the operator's ``scaling`` in their place."""
    if not positive(max_positions):
        raise ModelError(f"{file.path}: llama.context_length must be a positive whole number")
    common: dict[str, Any] = dict(
        theta=file.number("llama.rope.freq_base", 10000.0),
        max_positions=max_positions,
        head_dim=head_dim,
        name=name,
    )
    if scaling is not None:
        check_flag(scaling, name)
        return read_rope(scaling, where=FLAG, **common)
    kind = file.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ModelError(
            f"{file.path}: rope kind {kind!r:.80} is unsupported; supported: 'none', 'linear', 'yarn' and "
            "'longrope'"
        )
    given = _scaling(file, kind, max_positions)
    rope = read_rope(given, where="its metadata", **common)
    extra = tuple(_values(file, _FACTORS)) if _FACTORS in file.tensor_names else ()
    attention = file.number("llama.rope.scaling.attn_factor", 1.0)
    rope = replace(rope, factors=extra, attention_factor=rope.attention_factor * attention)
    rope.check(name, head_dim=head_dim)
    return rope


def _scaling(file: GgufFile, kind: str, max_positions: int) -> dict[str, Any]:
    """The metadata's scaling in Hugging Face's spelling, without the factors that multiply every kind."""
    # llama.cpp: a factor of 0 means none, and rope.scale_linear is the first name of the key.
    old = file.number("llama.rope.scale_linear", 0)
    factor = file.number("llama.rope.scaling.factor", old) or 1.0
    original = file.number("llama.rope.scaling.original_context_length", max_positions)
    tensors = {tensor for tensor in (_LONG, _SHORT) if tensor in file.tensor_names}
    if tensors != ({_LONG, _SHORT} if kind == "longrope" else set()):
        raise ModelError(
            f"{file.path}: {_LONG} and {_SHORT} go with rope kind 'longrope'; convert the model again"
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "longrope":
        if factor != 1 or _FACTORS in file.tensor_names:
            raise ModelError(
                f"{file.path}: longrope with further factors is unsupported; convert the model again"
            )
        scaling: dict[str, Any] = {"short_factor": _values(file, _SHORT), "long_factor": _values(file, _LONG)}
        # llama.cpp has no default other than 1.
        return {"rope_type": "longrope", ORIGINAL: original, "attention_factor": 1.0} | scaling
    if kind == "none":
        return {}
    for key, neutral in _YARN_NEUTRAL.items():
        if file.get(key, neutral) != neutral:
            raise ModelError(f"{file.path}: {key} {file.get(key)!r:.80} is unsupported; use another model")
    return {
        "rope_type": "yarn",
        "factor": factor,
        ORIGINAL: original,
        "beta_fast": file.number("llama.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number("llama.rope.scaling.yarn_beta_slow", 1.0),
    }


def _values(file: GgufFile, tensor: str) -> list[float]:
    return [float(value) for value in file.tensor(tensor).ravel()]
