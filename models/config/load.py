"""Reads the shape of a model at a source of either format.

Called by the controller, the gateway and the dense worker. It must not import torch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from farshore.model_spec import ModelSpec
from farshore.models.config.gguf import from_gguf
from farshore.models.config.hf import from_hf
from farshore.models.config.model import ModelConfig
from farshore.models.files.gguf import GgufFile
from farshore.models.files.selection import GENERATION_CONFIG
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
    source: ModelSource, *, max_model_len: int | None = None, rope_scaling: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The shape of the model at ``source``, without touching its weights or torch. Raises ModelError, which
    names the fix.

    ``rope_scaling`` replaces the model's own scaling of positions, for both formats. Keys are config.json's:
    ``rope_type`` ("default", "linear", "dynamic", "yarn", "longrope", "llama3"), ``factor``,
    ``original_max_position_embeddings`` (default: the model's positions) and the kind's others;
    ``rope_theta`` is the model's unless given.

    ``max_model_len``: the served length, ``ModelConfig.max_positions``. None: the longest length of the model
    with its scaling (for linear and yarn the unscaled length × the factor), except for "dynamic" and
    "longrope", whose angles depend on the length of the sequence. One table of angles serves all sequences,
    so these two are served by default to their original length, up to which they are exact. Above it every
    sequence is rotated like one of ``max_model_len`` tokens, and ``ModelConfig.length_warning`` says so.
    """
    if source.kind == "gguf":
        file = GgufFile.open(source.path)
        return from_gguf(file, source.name, max_model_len=max_model_len, rope_scaling=rope_scaling)
    generation = Path(source.path) / GENERATION_CONFIG
    return from_hf(
        read_json(Path(source.path) / "config.json"),
        read_json(generation) if generation.exists() else None,
        source.name,
        max_model_len=max_model_len,
        rope_scaling=rope_scaling,
    )
