"""Fixtures of the engine's tests."""

import pytest
import torch


@pytest.fixture(scope="session")
def greedy(tiny):
    """greedy(prompt, count) -> the ``count`` tokens with which transformers continues ``prompt`` greedily."""
    continued = {}

    def continuation(prompt, count):
        ids = continued.setdefault(tuple(prompt), list(prompt))
        with torch.inference_mode():
            while len(ids) < len(prompt) + count:
                ids.append(int(tiny(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) : len(prompt) + count]

    return continuation


@pytest.fixture(scope="session")
def is_greedy(tiny):
    """is_greedy(prompt, tokens, count) -> whether ``tokens`` are the ``count`` tokens of ``greedy``. One pass
    of transformers over all of them, which is cheaper for hundreds of tokens."""

    def check(prompt, tokens, count):
        with torch.inference_mode():
            logits = tiny(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        return len(tokens) == count and logits.argmax(dim=-1).tolist() == list(tokens)

    return check


@pytest.fixture(scope="session")
def attended_bytes():
    """attended_bytes(model, tokens, steps) -> float32 KV bytes that ``steps`` steps read of ``tokens``."""

    def count(model, tokens, steps):
        config = model.config
        return steps * tokens * config.layers * config.kv_heads * 2 * config.head_dim * 4

    return count
