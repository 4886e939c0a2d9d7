"""A model's shape, read from its files and checked once.

The engine sizes its tensors by :class:`ModelConfig`, shards their spans, and the gateway its limits. Called
by the controller, the dense worker, ``llama``, ``weights``, and the gateway, which runs without torch: this
module must not import it. It must not know about shards, KV storage or weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farshore.errors import ModelError
from farshore.models.gguf_file import GgufFile
from farshore.models.rope import RopeConfig
from farshore.models.source import ModelSource, read_json

SUPPORTED = "model_type 'llama', and 'mistral' without a sliding window"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama decoder. Counts are of the whole model, not of a shard.

    ``eos_token_ids``: each of them ends a generation; may be empty. The constructor raises ModelError for a
    value that no working model has.
    """

    name: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rms_eps: float
    rope: RopeConfig
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = (
            "layers",
            "hidden",
            "q_heads",
            "kv_heads",
            "head_dim",
            "intermediate",
            "vocab",
            "max_positions",
        )
        for field in counts:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"{self.name}: {field} must be a positive whole number, not {value!r}")
        if self.q_heads % self.kv_heads:
            raise ModelError(
                f"{self.name}: {self.q_heads} query heads can't share {self.kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError(f"{self.name}: head_dim must be even for rotary positions, not {self.head_dim}")
        if not isinstance(self.rms_eps, float) or not self.rms_eps > 0:
            raise ModelError(f"{self.name}: rms_eps must be a positive number, not {self.rms_eps!r}")
        self.rope.check(self.name, head_dim=self.head_dim)
        for token in (self.bos_token_id, *self.eos_token_ids):
            if token is not None and not (type(token) is int and 0 <= token < self.vocab):
                raise ModelError(f"{self.name}: special token id {token!r} lies outside 0..{self.vocab - 1}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, name: str
    ) -> "ModelConfig":
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
            raise ModelError(
                f"{name}: config.json lacks {error.args[0]!r}; get the model's own file"
            ) from None
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = hidden // heads if _positive(heads) and _positive(hidden) else 0
        kv_heads = config.get("num_key_value_heads")
        generation = generation_config or {}
        bos = config.get("bos_token_id")
        return cls(
            name=name,
            hidden=hidden,
            q_heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rms_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", name),
            rope=RopeConfig.from_hf(config, name),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            bos_token_id=bos,
            eos_token_ids=_merged(generation.get("eos_token_id"), config.get("eos_token_id")),
            **sizes,
        )

    @classmethod
    def from_gguf(cls, file: GgufFile, name: str) -> "ModelConfig":
        """Reads a GGUF file's metadata. Raises ModelError for everything but a dense 'llama' in one file."""
        architecture = file.get("general.architecture")
        if architecture != "llama":
            raise ModelError(
                f"{file.path}: GGUF architecture {architecture!r} is unsupported; supported: 'llama'"
            )
        if file.number("llama.expert_count", 0):
            raise ModelError(f"{file.path}: mixtures of experts are unsupported; supported: dense 'llama'")
        if file.number("split.count", 1) > 1:
            raise ModelError(f"{file.path}: one of several parts; join them with llama-gguf-split --merge")
        hidden = file.number("llama.embedding_length")
        heads = file.number("llama.attention.head_count")
        head_dim = file.get("llama.attention.key_length")
        if head_dim is None:
            head_dim = hidden // heads if _positive(heads) and _positive(hidden) else 0
        return cls(
            name=name,
            layers=file.number("llama.block_count"),
            hidden=hidden,
            q_heads=heads,
            kv_heads=file.number("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate=file.number("llama.feed_forward_length"),
            vocab=file.get("llama.vocab_size") or len(file.texts("tokenizer.ggml.tokens")),
            max_positions=file.number("llama.context_length"),
            rms_eps=float(file.number("llama.attention.layer_norm_rms_epsilon")),
            rope=RopeConfig.from_gguf(file, head_dim=head_dim),
            tied_embeddings="output.weight" not in file.tensor_names,
            attention_bias="blk.0.attn_q.bias" in file.tensor_names,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensor_names,
            bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
            # Llama 3 ends a turn with <|eot_id|>, which GGUF stores apart from the end of text.
            eos_token_ids=_merged(
                file.get("tokenizer.ggml.eos_token_id"), file.get("tokenizer.ggml.eot_token_id")
            ),
        )


def load_config(source: ModelSource) -> ModelConfig:
    """The shape of the model at ``source``, without touching its weights or torch. Raises ModelError."""
    if source.kind == "gguf":
        return ModelConfig.from_gguf(GgufFile.open(source.path), source.name)
    generation = Path(source.path) / "generation_config.json"
    return ModelConfig.from_hf(
        read_json(Path(source.path) / "config.json"),
        read_json(generation) if generation.exists() else None,
        source.name,
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


def _merged(*sources: Any) -> tuple[int, ...]:
    """Joins ids from several sources, each None, one id or a list of ids. Removes repeats and keeps the
    order."""
    ids: list[int] = []
    for source in sources:
        ids += [] if source is None else source if isinstance(source, list) else [source]
    return tuple(dict.fromkeys(_hashable(token) for token in ids))


def _hashable(value: Any) -> Any:
    """``value``, or its JSON text if it can't be a dict key, so that the check's message can show it."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any, what: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{name}: {what} must be a number, not {value!r}")
    return float(value)
