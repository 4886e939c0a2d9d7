"""Converts a GGUF model to safetensors: ``python peer_convert.py MODEL.gguf FOLDER``.

Run by ``peer`` in an environment whose transformers can read GGUF. Must not import Farshore, which is not
installed there.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

POSITIONS = 40_960
"""SmolLM2 has 8,192 positions; measured contexts have up to 32K tokens. The number changes no time."""


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
