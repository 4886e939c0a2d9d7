"""The names and shapes of a Llama decoder's tensors: ours, Hugging Face's and ggml's.

Called by ``load``, by the readers of the file formats, and by the controller, which runs without torch. It
must not know how tensors are read.
"""

from math import prod

from farshore.models.config.model import ModelConfig

# Our name → (Hugging Face's, ggml's), between the layer's prefix and ".weight" or ".bias".
_MATRICES = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the model needs, by our names, in the order of reading."""
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"q": q, "k": kv, "v": kv, "o": config.hidden}
    rows |= {"gate": config.intermediate, "up": config.intermediate, "down": config.hidden}
    columns = dict.fromkeys(rows, config.hidden) | {"o": q, "down": config.intermediate}
    biased = [field for field in _MATRICES if field in config.biases]
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab, config.hidden)}
    for layer in range(config.layers):
        for field in _MATRICES:
            shape = (rows[field], columns[field]) if field in rows else (config.hidden,)
            shapes[f"{layer}.{field}"] = shape
        shapes |= {f"{layer}.{field}_bias": (rows[field],) for field in biased}
    shapes["norm"] = (config.hidden,)
    if not config.tied_embeddings:
        shapes["head"] = (config.vocab, config.hidden)
    return shapes


def parameters(config: ModelConfig) -> int:
    """The number of the model's weights."""
    return sum(prod(shape) for shape in expected_shapes(config).values())


def hf_name(name: str) -> str:
    global_names = {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
    if name in global_names:
        return global_names[name]
    layer, _, field = name.partition(".")
    return f"model.layers.{layer}.{_MATRICES[field.removesuffix('_bias')][0]}.{_suffix(field)}"


def gguf_name(name: str) -> str:
    global_names = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    if name in global_names:
        return global_names[name]
    layer, _, field = name.partition(".")
    return f"blk.{layer}.{_MATRICES[field.removesuffix('_bias')][1]}.{_suffix(field)}"


def _suffix(field: str) -> str:
    return "bias" if field.endswith("_bias") else "weight"
