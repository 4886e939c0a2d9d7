"""Fixtures of the engine's tests."""

import pytest
import torch

from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.shard import engine_holds, imports


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


@pytest.fixture
def reach():
    """reach(rig, worker, engine) -> a client of a served shard, closed after the test."""
    clients = []

    def to(made, worker, engine):
        address, dtype = made.served[worker].address, made.model.dtype
        clients.append(RemoteClient(address, made.attention, dtype, engine=engine))
        return clients[-1]

    yield to
    for client in clients:
        client.close()


@pytest.fixture
def cluster(serve_store, reach, rig, tiny_model, monkeypatch):
    """cluster(shards=..., ...) -> Rig whose shards are served over loopback by this process, so that a test
    can look into their stores. A copy that a sequence has held and dropped is free soon."""
    monkeypatch.setattr(imports, "KEEP_S", 0.5)
    monkeypatch.setattr(engine_holds, "TICK_S", 0.05)

    def build(**options):
        made = rig(tiny_model, **{"shards": 3, "memory_bytes": 64 << 20} | options)
        made.served = {}
        for worker in made.targets:
            made.served[worker] = serve_store(made.stores[worker], worker)
            made.clients[worker] = reach(made, worker, "engine-1")
        return made

    return build
