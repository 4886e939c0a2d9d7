"""Writes a random checkpoint with the shape of a Llama, in several safetensors files and an index.

Called by ``benchmark`` and by tests of memory. It must not use the code that is measured to write.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from farshore.models.config.load import load_config
from farshore.models.files.source import ModelSource
from farshore.models.weights.names import expected_shapes, hf_name

SEED = 17


@dataclass(frozen=True, slots=True)
class Shape:
    """The defaults make 2.2 GB of bf16."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32_000
    files: int = 5


def write(folder: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """Writes config.json, the index and the files in ``folder``. Returns the files. ``dtype``: bfloat16 or
    float32."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(load_config(ModelSource("random", folder, "hf")))
    names = list(shapes)
    generator = torch.Generator().manual_seed(SEED)
    weight_map, files = {}, []
    for number in range(shape.files):
        path = folder / f"model-{number + 1:05}-of-{shape.files:05}.safetensors"
        share = names[number * len(names) // shape.files : (number + 1) * len(names) // shape.files]
        tensors = {
            hf_name(name): torch.empty(shapes[name], dtype=dtype).uniform_(-0.02, 0.02, generator=generator)
            for name in share
        }
        write_file(path, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
        files.append(path)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes contiguous tensors, in bfloat16 or float32, as one safetensors file."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = "BF16" if tensor.dtype == torch.bfloat16 else "F32"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(memoryview(tensor.view(torch.uint8).numpy()))
