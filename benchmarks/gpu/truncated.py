"""Writes the demo model, with few layers and tokens, as a folder for a GPU machine without a network.

Run by hand, on a machine that has the demo model: ``python -P -m farshore.benchmarks.gpu.truncated FOLDER``.
``farshore bench gpu --model FOLDER`` reads it with transformers. It must not know what is measured.
"""

import json
import sys
from pathlib import Path

import torch

from farshore.benchmarks.gpu.models import LLAMA_8B
from farshore.benchmarks.load.checkpoint import write_file
from farshore.errors import ModelError
from farshore.models.files.source import DEMO, resolve
from farshore.models.weights.load import load_model
from farshore.models.weights.names import hf_name

LAYERS, VOCAB = 3, 8_192
"""Of 30 layers and 49,152 tokens: 29 MiB in bfloat16. The first tokens are the frequent ones."""
MOST_BYTES = 32 << 20


def write(folder: Path) -> int:
    """Writes config.json and model.safetensors, in bfloat16. Returns the folder's bytes. Raises ModelError if
    the demo model is not installed, or if the folder would be too large to carry."""
    model = load_model(resolve(DEMO), dtype=torch.bfloat16)
    weights, config = model.weights.dense(), model.config
    tensors = {hf_name("embed"): weights.embed[:VOCAB].clone(), hf_name("norm"): weights.norm}
    for number, layer in enumerate(weights.layers[:LAYERS]):
        present = {field: value for field, value in layer._asdict().items() if value is not None}
        tensors |= {hf_name(f"{number}.{field}"): value for field, value in present.items()}
    described = LLAMA_8B | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": VOCAB,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MOST_BYTES:
        raise ModelError(f"{folder} would have {size} bytes: keep fewer layers or tokens")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    write_file(folder / "model.safetensors", tensors)
    return size


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1])) / 2**20:.1f} MiB")
