"""A GGUF model as safetensors; run by ``serve_peer`` in an environment with a transformers that reads GGUF.

``python peer_convert.py MODEL.gguf FOLDER``. Imports nothing of Farshore's.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

POSITIONS = 40_960
"""SmolLM2 has 8,192; contexts that are measured reach 32K. No time depends on it."""


def main(path: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.max_position_embeddings = POSITIONS
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
