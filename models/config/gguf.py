"""Reads a model's shape from a GGUF file's metadata.

Called by ``load`` and ``weights.load``. It must not import torch.
"""

from farshore.errors import ModelError
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.config.values import merged, positive
from farshore.models.files.gguf import GgufFile


def from_gguf(file: GgufFile, name: str) -> ModelConfig:
    """Reads a GGUF file's metadata. Raises ModelError for everything but a dense 'llama'."""
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
    hidden = file.number("llama.embedding_length")
    heads = file.number("llama.attention.head_count")
    head_dim = file.get("llama.attention.key_length")
    if head_dim is None:
        head_dim = hidden // heads if positive(heads) and positive(hidden) else 0
    return ModelConfig(
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
        eos_token_ids=merged(
            file.get("tokenizer.ggml.eos_token_id"), file.get("tokenizer.ggml.eot_token_id")
        ),
    )
