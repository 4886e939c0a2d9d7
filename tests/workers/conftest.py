"""Fixtures of the workers' tests: models, engines over in-process shards, and collected events."""

import importlib.util
import queue
from collections import defaultdict
from itertools import count
from pathlib import Path

import pytest
import torch

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.config.model import ModelConfig
from farshore.models.files.source import resolve
from farshore.models.llama import Llama
from farshore.models.weights.load import load_model
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import Failed, Finished, PromptLogprobs, Sampled

from ..waiting import until
from .hold.paused import Paused, at_tokens

ENGINE = WorkerId("engine")
EVENT_DEADLINE_S = 600.0
NEW_TOKENS = 16


@pytest.fixture(scope="session")
def demo_model(demo_source):
    """demo_model(dtype) -> the demo model, loaded by this package."""
    loaded = {}

    def load(dtype: torch.dtype):
        if dtype not in loaded:
            loaded[dtype] = load_model(demo_source, dtype=dtype)
        return loaded[dtype]

    return load


@pytest.fixture(scope="session")
def greedy_float32(hugging_face, hugging_face_greedy, prompts):
    """Prompt name -> the first NEW_TOKENS of transformers' greedy answer in float32."""
    model = hugging_face(torch.float32)
    return {name: hugging_face_greedy(model, ids, NEW_TOKENS) for name, ids in prompts.items()}


@pytest.fixture(scope="session")
def tiny():
    """A transformers Llama with random weights, small enough for hundreds of steps per second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=8,
            vocab_size=97,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ).eval()


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """A folder with the files of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """The tiny model, loaded by this package, in float32."""
    model = load_model(resolve(str(tiny_folder)), dtype=torch.float32)
    assert isinstance(model, Llama) and isinstance(model.config, ModelConfig)
    return model


class Rig:
    """One model, its shards in this process, and the engines that a test builds on them."""

    def __init__(
        self,
        model,
        *,
        shards=2,
        shard_by="range",
        local=False,
        memory_bytes=1 << 30,
        wrap=None,
        format=None,
        stores_on=lambda worker: None,
    ):
        """``stores_on``: the device runtime of a worker's store; None for host memory."""
        self.model = model
        self.attention = attention_model(model.config, model.dtype, format)
        self.arenas = {
            w: Arena(memory_bytes) for w in (ENGINE, *(WorkerId(f"shard{i}") for i in range(shards)))
        }
        self.stores = {
            w: LocalStore(worker=w, arena=arena, runtime=stores_on(w)) for w, arena in self.arenas.items()
        }
        self.clients = {w: InProcessClient(w, store, self.attention) for w, store in self.stores.items()}
        for worker in list(self.clients)[1:]:
            if wrap is not None:
                self.clients[worker] = wrap(self.clients[worker])
        self.targets = [ENGINE] if local else list(self.clients)[1:]
        self.shard_by = shard_by
        self.epochs = count(1)

    def resize(self, memory_bytes):
        """Gives the engine's own memory another size. Call it before the engine is made."""
        self.arenas[ENGINE] = Arena(memory_bytes)
        self.stores[ENGINE] = LocalStore(worker=ENGINE, arena=self.arenas[ENGINE])
        self.clients[ENGINE] = InProcessClient(ENGINE, self.stores[ENGINE], self.attention)

    def engine(self, **options):
        """Returns a new engine that is not started."""
        return Engine(
            model=options.pop("model", self.model),
            attention=self.attention,
            arena=self.arenas[ENGINE],
            clients=self.clients,
            targets=self.targets,
            shard_by=self.shard_by,
            **options,
        )

    def settle(self):
        """Waits until no span is held: the shards' queues make the drops later."""
        until(
            lambda: not any(info.holders for store in self.stores.values() for info in store.announce()),
            "spans are still held",
        )

    def check_empty(self):
        """Asserts that all memory of the engine and the shards is available and no span is held."""
        self.settle()
        for worker, arena in self.arenas.items():
            self.stores[worker].check_integrity()
            arena.check_integrity()
            usage = self.stores[worker].usage()
            assert usage.available_bytes == usage.budget_bytes, f"{worker} still holds memory"
            assert all(not info.holders for info in self.stores[worker].announce())


class Collected:
    """The events of one request."""

    def __init__(self):
        self.events = queue.SimpleQueue()
        self.choices = defaultdict(list)
        """Choice -> its tokens so far."""
        self.prompt = []
        """The prompt's tokens with their log-probabilities, if asked for."""

    @property
    def tokens(self):
        """The tokens of the first choice."""
        return self.choices[0]

    def result(self):
        """Waits for the end of the next completion; returns its Finished or Failed event."""
        while True:
            event = self.events.get(timeout=EVENT_DEADLINE_S)
            if isinstance(event, Sampled):
                self.choices[event.choice].append(event.token_id)
            elif isinstance(event, PromptLogprobs):
                assert event.first == len(self.prompt) and not self.choices
                self.prompt += event.tokens
            elif isinstance(event, Finished | Failed):
                return event

    def results(self, n):
        """Waits for the ends of ``n`` completions; returns choice -> Finished."""
        ends = [self.result() for _ in range(n)]
        assert all(isinstance(end, Finished) for end in ends), ends
        assert sorted(end.choice for end in ends) == list(range(n))
        assert self.events.empty()
        return {end.choice: end for end in ends}


@pytest.fixture
def rig():
    """rig(model, ...) -> Rig. Engines started by ``start`` are stopped, and every store is checked."""
    engines, rigs = [], []

    def build(model, **options):
        made = Rig(model, **options)
        rigs.append(made)

        def start(**engine_options):
            engine = made.engine(**engine_options)
            engines.append(engine)
            engine.start()
            return engine

        made.start = start
        return made

    yield build
    for engine in engines:
        engine.stop()
    for made in rigs:
        made.check_empty()


@pytest.fixture(scope="session")
def mortal():
    """The class MortalClient, which wraps an in-process shard client; see dead_shard.py."""
    path = Path(__file__).parent / "engine" / "dead_shard.py"
    spec = importlib.util.spec_from_file_location("farshore_dead_shard", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MortalClient


@pytest.fixture
def collect():
    """The class Collected, for a test that submits a request itself."""
    return Collected


@pytest.fixture
def submit():
    """submit(engine, name, prompt, sampling, ...) -> Collected. A name may be used again: each request has a
    newer epoch. ``pause_at``: numbers of the tokens at which the engine stands still; the Collected's
    ``paused`` is then a Paused."""
    epochs = count(1)

    def call(engine, name, prompt, sampling, *, pause_at=(), **options):
        collected = Collected()
        collected.paused = Paused(collected.events.put, at_tokens(*pause_at))
        options = {"epoch": next(epochs)} | options
        engine.submit(SequenceId(name), list(prompt), sampling, collected.paused, **options)
        return collected

    return call
