"""Models for these tests: tiny random ones that transformers writes, and the demo model if it is
installed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farshore.errors import ModelError
from farshore.models.chat.prompts import ChatPrompts, Conversation
from farshore.models.files.source import ModelSource, resolve
from farshore.models.llama import Llama
from farshore.models.tokenizer.tokenizer import Tokenizer

# These tests must not use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """tiny(dtype=…, shard=…, **config) → (transformers' model, its folder)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes: Any) -> tuple[Any, Path]:
        torch.manual_seed(5)
        model = LlamaForCausalLM(LlamaConfig(**(TINY | changes)))
        for parameter in model.parameters():
            # Biases and norms are constants at first, which would hide swapped tensors.
            torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.15)
        model.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
        # Loaded again: .to() has rounded the rotary frequencies too, and loading does not.
        return LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval(), tmp_path

    return make


@pytest.fixture(scope="session")
def demo() -> ModelSource:
    try:
        return resolve("smollm2")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def chat_ids() -> Iterator[Callable[..., list[int]]]:
    """chat_ids(tokenizer, messages) → the ids of the prompt that the tokenizer's chat template makes."""
    made = []

    def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        made.append(ChatPrompts(tokenizer))
        return made[-1].encode(Conversation(messages=messages, **options), most_chars=1 << 20)

    yield encode
    for prompts in made:
        prompts.close()


@pytest.fixture(scope="session")
def forward() -> Callable[..., torch.Tensor]:
    """forward(model, ids, first_position=0) → logits f32 [R, vocab], with plain causal attention."""

    @torch.inference_mode()
    def run(model: Llama, ids: list[int], *, first_position: int = 0) -> torch.Tensor:
        positions = torch.arange(first_position, first_position + len(ids))
        h = model.embed(torch.tensor(ids))
        for layer in range(model.config.layers):
            normed = model.attention_input(layer, h)
            q = model.query(layer, normed, positions)
            k, v = model.key_value(layer, normed, positions)
            o = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
            h = model.finish(layer, h, o.squeeze(0).transpose(0, 1))
        return model.logits(h)

    return run
