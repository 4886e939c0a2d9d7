"""Reads the shape of a model at a source of either format.

Called by the controller, the gateway and the dense worker. It must not import torch.
"""

from pathlib import Path

from farshore.models.config.gguf import from_gguf
from farshore.models.config.hf import from_hf
from farshore.models.config.model import ModelConfig
from farshore.models.files.gguf import GgufFile
from farshore.models.files.source import ModelSource, read_json


def load_config(source: ModelSource) -> ModelConfig:
    """The shape of the model at ``source``, without touching its weights or torch. Raises ModelError."""
    if source.kind == "gguf":
        return from_gguf(GgufFile.open(source.path), source.name)
    generation = Path(source.path) / "generation_config.json"
    return from_hf(
        read_json(Path(source.path) / "config.json"),
        read_json(generation) if generation.exists() else None,
        source.name,
    )
