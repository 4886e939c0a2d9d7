"""A checkpoint as plain values, and how it is written to a folder.

The draws make recipes; the comparison writes them. ``repr`` of a recipe is Python that makes it again, so a
failing draw can be repeated by itself.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .tokenizer_files import TokenizerRecipe, write_tokenizer

ROPE_KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "original_max_position_embeddings")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """The sizes of the tensors in the files; config.json may say them in several ways."""

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocab: int


@dataclass(frozen=True)
class Tensors:
    """``head``: 'absent', 'equal' to the embedding or 'different'. ``embed``: False leaves the embedding out.
    ``prefix``: of all tensors but the head. ``biases``: of which projections the files hold biases.
    ``extra``: names of tensors that no model of this kind has. ``missing``: a tensor that is left out."""

    seed: int
    dtype: str = "f32"
    norm_dtype: str = "f32"
    head: str = "different"
    embed: bool = True
    prefix: str = "model."
    biases: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Layout:
    """``kind``: one of LAYOUTS. ``beside``: names of more safetensors files, which hold other weights under
    the same names."""

    kind: str = "single"
    beside: tuple[str, ...] = ()


LAYOUTS = (
    "single",
    "sharded",
    "single and a stale index",  # the index names shards with other weights
    "single and an index without shards",
    "sharded, index swapped",  # the index names the wrong one of two files
    "sharded, a shard missing",
    "shards without an index",
    "another name",
)


@dataclass(frozen=True)
class Recipe:
    """``config``, ``generation``: the objects in config.json and generation_config.json. ``options``: of the
    command line, which transformers does not have (``reference_config``)."""

    sizes: Sizes
    config: dict[str, Any]
    generation: dict[str, Any] | None
    tensors: Tensors
    layout: Layout
    tokenizer: TokenizerRecipe
    prompts: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def reference_config(self) -> dict[str, Any]:
        """config.json as ``--rope-scaling`` changes it: the model keeps its theta and its length."""
        scaling = self.options.get("rope_scaling")
        if scaling is None:
            return self.config
        own = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        config = {key: value for key, value in self.config.items() if key not in ROPE_KEYS}
        theta = {key: values[key] for values in (self.config, own) for key in ["rope_theta"] if key in values}
        return config | {"rope_scaling": theta | scaling}


def write(recipe: Recipe, folder: Path) -> None:
    """Writes the files of ``recipe`` to ``folder``, which exists and is empty."""
    write_json(folder / "config.json", recipe.config)
    if recipe.generation is not None:
        write_json(folder / "generation_config.json", recipe.generation)
    write_tokenizer(recipe.tokenizer, folder)
    tensors = state(recipe.sizes, recipe.tensors)
    _write_weights(recipe.layout, tensors, folder)
    if recipe.layout.beside:
        other = {name: tensor + 1 for name, tensor in tensors.items()}
        for name in recipe.layout.beside:
            save_file(other, folder / name, metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def state(sizes: Sizes, tensors: Tensors) -> dict[str, Tensor]:
    """Random tensors by their Hugging Face names."""
    generator = torch.Generator().manual_seed(tensors.seed)
    q, kv = sizes.q_heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    matrices = {
        "self_attn.q_proj": (q, sizes.hidden),
        "self_attn.k_proj": (kv, sizes.hidden),
        "self_attn.v_proj": (kv, sizes.hidden),
        "self_attn.o_proj": (sizes.hidden, q),
        "mlp.gate_proj": (sizes.intermediate, sizes.hidden),
        "mlp.up_proj": (sizes.intermediate, sizes.hidden),
        "mlp.down_proj": (sizes.hidden, sizes.intermediate),
    }

    def random(*shape: int) -> Tensor:
        # The scale keeps activations near 1, so that rounding differences stay small.
        scale = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
        mean = 0.5 if len(shape) == 1 else 0.0
        kind = tensors.norm_dtype if len(shape) == 1 else tensors.dtype
        return (torch.randn(shape, generator=generator) * scale + mean).to(DTYPES[kind])

    inner = {"embed_tokens.weight": random(sizes.vocab, sizes.hidden), "norm.weight": random(sizes.hidden)}
    for layer in range(sizes.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            inner[f"layers.{layer}.{norm}.weight"] = random(sizes.hidden)
        for name, shape in matrices.items():
            inner[f"layers.{layer}.{name}.weight"] = random(*shape)
            # Drawn always, so that the other tensors don't depend on the biases.
            bias = random(shape[0])
            if name.partition(".")[2] in tensors.biases:
                inner[f"layers.{layer}.{name}.bias"] = bias
    head = inner["embed_tokens.weight"].clone()
    if tensors.head == "different":
        head = random(sizes.vocab, sizes.hidden)
    if not tensors.embed:
        del inner["embed_tokens.weight"]
    result = {tensors.prefix + name: tensor for name, tensor in inner.items() if name != tensors.missing}
    if tensors.head != "absent":
        result["lm_head.weight"] = head
    return result | {name: random(4, 4) for name in tensors.extra}


def _write_weights(layout: Layout, tensors: dict[str, Tensor], folder: Path) -> None:
    whole, index = "model.safetensors", "model.safetensors.index.json"
    shards = tuple(f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    names = list(tensors)
    where = {name: shards[2 * place >= len(names)] for place, name in enumerate(names)}

    def save(file: str, chosen: dict[str, Tensor]) -> None:
        save_file(chosen, folder / file, metadata={"format": "pt"})

    def save_shards(values: dict[str, Tensor]) -> None:
        for shard in shards:
            save(shard, {name: values[name] for name in names if where[name] == shard})

    def save_index(weight_map: dict[str, str]) -> None:
        write_json(folder / index, {"metadata": {"total_size": 1}, "weight_map": weight_map})

    if layout.kind.startswith("single"):
        save(whole, tensors)
        if layout.kind == "single and a stale index":
            save_shards({name: tensor + 1 for name, tensor in tensors.items()})
        if layout.kind != "single":
            save_index(where)
    elif layout.kind == "another name":
        save("weights.safetensors", tensors)
    else:
        save_shards(tensors)
        if layout.kind == "sharded, index swapped":
            where = {name: shards[file == shards[0]] for name, file in where.items()}
        if layout.kind != "shards without an index":
            save_index(where)
        if layout.kind == "sharded, a shard missing":
            (folder / shards[1]).unlink()
