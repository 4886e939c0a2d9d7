"""transformers' answers to a config.json, and a small config.json to start from."""

import copy

import pytest
import torch


@pytest.fixture(scope="session")
def base():
    """A small config.json without scaling."""
    return dict(
        model_type="llama",
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=100,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )


@pytest.fixture(scope="session")
def their_config():
    """their_config(config.json's object) -> transformers' configuration."""
    from transformers import LlamaConfig, MistralConfig

    def read(config):
        family = {"llama": LlamaConfig, "mistral": MistralConfig}[config["model_type"]]
        return family.from_dict(copy.deepcopy(config))

    return read


@pytest.fixture(scope="session")
def their_table(their_config):
    """their_table(config.json's object, tokens, dtype) -> transformers' (cos, sin) for one sequence of
    ``tokens`` tokens, each [tokens, head_dim/2]."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    def compute(config, tokens, dtype=torch.float32):
        family = {"llama": LlamaRotaryEmbedding, "mistral": MistralRotaryEmbedding}[config["model_type"]]
        rotary = family(their_config(config))
        tables = rotary(torch.empty(0, dtype=dtype), torch.arange(tokens)[None])
        return tuple(table[0].chunk(2, dim=-1)[0] for table in tables)

    return compute
