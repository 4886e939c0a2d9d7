"""GGUF checkpoints: draws, the file, and the same model in transformers.

The reference is a LlamaForCausalLM with the dequantised weights: transformers' own reader of GGUF ignores
metadata that llama.cpp reads, such as a scaling factor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .draw_config import one_in
from .recipe import Sizes, Tensors, state

LEGACY = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
BLOCKS_OF_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BIASES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class GgufRecipe:
    """``quants``: types of the matrices, taken in turn. ``metadata``: by key, without 'llama.'. ``rope``:
    what the metadata mean, as transformers' rope_parameters. ``factors``: rope_freqs.weight. ``eps``,
    ``positions``: as the metadata say. ``parts``: number of files."""

    sizes: Sizes
    tensors: Tensors
    quants: tuple[str, ...]
    metadata: dict[str, Any]
    rope: dict[str, Any]
    positions: int
    eps: float
    factors: tuple[float, ...] | None = None
    parts: int = 1


@st.composite
def gguf_recipes(draw: st.DrawFn) -> GgufRecipe:
    wide = draw(one_in(4))
    heads, kv_heads = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2))))
    hidden = 256 if wide else draw(st.sampled_from((32, 64)))
    head_dim = draw(st.sampled_from((hidden // heads, hidden // heads, 16)))
    sizes = Sizes(
        hidden=hidden,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=256 if wide else draw(st.sampled_from((32, 96))),
        layers=draw(st.integers(1, 2)),
        vocab=draw(st.sampled_from((40, 97))),
    )
    kinds = BLOCKS_OF_256 + LEGACY if wide else LEGACY
    positions = draw(st.sampled_from((32, 64, 96)))
    eps = draw(st.sampled_from((1e-5, 1e-6)))
    metadata = {
        "block_count": sizes.layers,
        "context_length": positions,
        "embedding_length": hidden,
        "feed_forward_length": sizes.intermediate,
        "attention.head_count": heads,
        "attention.layer_norm_rms_epsilon": eps,
    }
    if kv_heads != heads or draw(st.booleans()):
        metadata["attention.head_count_kv"] = kv_heads
    if head_dim * heads != hidden or draw(st.booleans()):
        metadata |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    for key, value in (("rope.dimension_count", head_dim), ("vocab_size", sizes.vocab)):
        if draw(st.booleans()):
            metadata[key] = value
    scaling, rope = draw(_scaling(positions))
    factors = st.lists(st.sampled_from((1.0, 1.5, 4.0, 8.0)), min_size=head_dim // 2, max_size=head_dim // 2)
    return GgufRecipe(
        sizes=sizes,
        tensors=Tensors(
            seed=draw(st.integers(0, 99)),
            head=draw(st.sampled_from(("absent", "different", "different", "equal"))),
            biases=draw(st.sampled_from(((), (), BIASES, BIASES[:3]))),
        ),
        quants=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))),
        metadata=metadata | scaling,
        rope=rope,
        positions=positions,
        eps=eps,
        factors=tuple(draw(factors)) if rope["rope_type"] != "yarn" and draw(one_in(5)) else None,
        parts=draw(st.sampled_from((1, 1, 1, 2))),
    )


@st.composite
def _scaling(draw: st.DrawFn, positions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, rope_parameters). llama.cpp's rules: a factor without a type is linear, the older key of a
    factor is ``rope.scale_linear``, and type none ignores factors."""
    metadata: dict[str, Any] = {}
    theta = draw(st.sampled_from((None, 10000.0, 500000.0)))
    if theta is not None:
        metadata["rope.freq_base"] = theta
    rope = {"rope_type": "default", "rope_theta": theta or 10000.0}
    kind = draw(st.sampled_from(("absent", "absent", "none", "linear", "no type", "old", "yarn")))
    factor = draw(st.sampled_from((2.0, 4.0, 1.5)))
    if kind in ("none", "linear", "yarn"):
        metadata["rope.scaling.type"] = kind
    if kind in ("linear", "yarn", "no type") or (kind == "none" and draw(st.booleans())):
        metadata["rope.scaling.factor"] = factor
    if kind == "old":
        metadata["rope.scale_linear"] = factor
    if kind in ("linear", "no type", "old"):
        rope |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        if draw(st.booleans()):
            metadata["rope.scaling.original_context_length"] = 16
            rope["original_max_position_embeddings"] = 16
    return metadata, rope


def write_gguf(recipe: GgufRecipe, folder: Path) -> tuple[Path, LlamaForCausalLM]:
    """(the file, or the first of several; the same model in transformers)."""
    per_part = 2**20
    values: dict[str, Tensor] = {}
    tensors = state(recipe.sizes, recipe.tensors)
    if recipe.parts > 1:
        per_part = -(-(len(tensors) + (recipe.factors is not None)) // recipe.parts)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=per_part % 2**20)
    for key, value in recipe.metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{key}", value) if not isinstance(value, str) else writer.add_string(f"llama.{key}", value)
    _add_tokenizer(writer, recipe.sizes.vocab)
    for place, (name, tensor) in enumerate(tensors.items()):
        kind = Quant[recipe.quants[place % len(recipe.quants)]] if tensor.ndim == 2 else Quant.F32
        stored = _rows_of_pairs(name, tensor, recipe.sizes).numpy()
        raw = _quantised(stored, kind, seed=place)
        if raw is None:
            kind, raw = Quant.F32, stored
        writer.add_tensor(_ggml_name(name), raw, raw_dtype=kind)
        read = gguf.dequantize(raw, kind).astype(np.float32).reshape(tensor.shape)
        values[name] = _rows_of_halves(name, torch.from_numpy(read), recipe.sizes)
    if recipe.factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(recipe.factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob("*.gguf")), _reference(recipe, values)


def _reference(recipe: GgufRecipe, values: dict[str, Tensor]) -> LlamaForCausalLM:
    sizes, biases = recipe.sizes, recipe.tensors.biases
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.q_heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=recipe.positions,
        # As the file stores it.
        rms_norm_eps=float(np.float32(recipe.eps)),
        rope_parameters=dict(recipe.rope),
        tie_word_embeddings="lm_head.weight" not in values,
        attention_bias=bool(biases),
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        # transformers has a bias on all four projections or on none.
        parameter.data = values[name] if name in values else torch.zeros_like(parameter)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if recipe.factors is not None:
        model.model.rotary_emb.inv_freq /= torch.tensor(recipe.factors)
    return model


def _quantised(values: np.ndarray, kind: Quant, *, seed: int) -> np.ndarray | None:
    """None if a row is no whole number of blocks."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.shape[-1] % block:
        return None
    if kind.name in LEGACY:
        return values if kind is Quant.F32 else gguf.quantize(values, kind)
    return _random_blocks(values.shape, kind, seed)


def _random_blocks(shape: tuple[int, ...], kind: Quant, seed: int) -> np.ndarray:
    """Random bytes with small scales: ``gguf`` can only read these types."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    # Where a block holds its float16 scales.
    first, count = {"Q2_K": (80, 2), "Q3_K": (108, 1), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1)}[
        kind.name
    ]
    raw[..., first : first + 2 * count] = 0
    read = gguf.dequantize(raw.reshape(shape[0], -1), kind)
    assert not read.any()
    scale = np.array([2e-4], np.float16).view(np.uint8)
    for number in range(count):
        raw[..., first + 2 * number : first + 2 * number + 2] = scale
    return raw.reshape(shape[0], -1)


def _ggml_name(name: str) -> str:
    whole = {"lm_head.weight": "output.weight", "model.embed_tokens.weight": "token_embd.weight"}
    whole["model.norm.weight"] = "output_norm.weight"
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


def _heads(name: str, sizes: Sizes) -> int | None:
    if "q_proj" in name:
        return sizes.q_heads
    return sizes.kv_heads if "k_proj" in name else None


def _rows_of_pairs(name: str, tensor: Tensor, sizes: Sizes) -> Tensor:
    """Rows of Q and K as convert_hf_to_gguf orders them."""
    heads = _heads(name, sizes)
    if heads is None:
        return tensor.float()
    rows = tensor.float().reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2)
    return rows.reshape(tensor.shape).contiguous()


def _rows_of_halves(name: str, tensor: Tensor, sizes: Sizes) -> Tensor:
    heads = _heads(name, sizes)
    if heads is None:
        return tensor
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_token_merges([])
    writer.add_eos_token_id(2)
