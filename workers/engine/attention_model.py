"""What a model's configuration means for the attention planes: spec, layout, format."""

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.models.config import ModelConfig


def attention_model(
    config: ModelConfig, dtype: torch.dtype, format: KVFormat | None = None
) -> AttentionModel:
    """One layer class; its KV is stored in ``format``, or as the model's dtype."""
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
