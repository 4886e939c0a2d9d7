"""Reads the shape of a model at a source of either format.

Called by the controller, the gateway and the dense worker. It must not import torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from farshore.errors import ModelError
from farshore.model_spec import ModelSpec
from farshore.models.config.gguf import from_gguf
from farshore.models.config.hf import from_hf
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.files.gguf import GgufFile
from farshore.models.files.source import ModelSource, read_json, resolve


def load_spec(
    spec: ModelSpec, *, progress: Callable[[str], None] = lambda words: None
) -> tuple[ModelSource, ModelConfig]:
    """The source and the shape of the model that a cluster was asked for: every process takes them from here,
    so that all have the same. Raises ModelError."""
    source = resolve(spec.model, revision=spec.revision, progress=progress)
    config = load_config(source, max_model_len=spec.max_model_len, rope_scaling=spec.rope_scaling)
    return source, config


def load_config(
    source: ModelSource,
    *,
    max_model_len: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The shape of the model at ``source``, without touching its weights or torch. ``max_model_len`` and
    ``rope_scaling`` replace the files' own, as ``ModelSpec`` says. Raises ModelError."""
    config = _own_config(source)
    if rope_scaling is not None:
        given = {"rope_theta": config.rope.theta, "rope_scaling": rope_scaling}
        config = replace(config, rope=RopeConfig.from_hf(given, "--rope-scaling"))
    if max_model_len is None:
        return config
    if max_model_len > config.max_positions and rope_scaling is None:
        raise ModelError(
            f"--max-model-len {max_model_len}: {source.name} has {config.max_positions} positions;"
            " ask for at most these, or add --rope-scaling"
        )
    return replace(config, max_positions=max_model_len)


def _own_config(source: ModelSource) -> ModelConfig:
    if source.kind == "gguf":
        return from_gguf(GgufFile.open(source.path), source.name)
    generation = Path(source.path) / "generation_config.json"
    return from_hf(
        read_json(Path(source.path) / "config.json"),
        read_json(generation) if generation.exists() else None,
        source.name,
    )
