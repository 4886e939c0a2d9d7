"""Derives the attention model (spec, layout and format of KV) from a model's configuration.

Called by ``dense``, the engine's steps and prefill, benchmarks and tests. It must not know weights or shards.
"""

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.models.config.model import ModelConfig


def attention_model(
    config: ModelConfig, dtype: torch.dtype, format: KVFormat | None = None
) -> AttentionModel:
    """Returns an AttentionModel with one layer class.

    ``format`` is the format of stored KV; None stores it in ``dtype``, the model's dtype.
    """
    spec = AttentionSpec(
        q_heads=config.q_heads,
        k_heads=config.kv_heads,
        v_heads=config.kv_heads,
        k_dim=config.head_dim,
        v_dim=config.head_dim,
        scale=config.head_dim**-0.5,
    )
    layout = KVLayout.of(spec, layers=config.layers, format=format or KVFormat.of(dtype))
    return AttentionModel(specs=(spec,), layer_class=(0,) * config.layers, layouts=(layout,))


def merged_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of states that are to be merged, for a model in ``dtype``: float32, or float64 as the
    model. So the output is rounded only once."""
    return torch.float64 if dtype == torch.float64 else torch.float32
