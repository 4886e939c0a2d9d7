"""Sharing of KV: stored prefixes, and completions of one prompt."""

from collections import defaultdict
from copy import copy
from dataclasses import replace

import pytest
import torch

from farshore.errors import TransportError
from farshore.ids import SequenceId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey, SpanSlice
from farshore.kvstore.store.arena.arena import stride_bytes
from farshore.sampling import Sampling
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.kv.prefix import assemble, fingerprint
from farshore.workers.engine.sequence import Finished, Reason, Sampled

from ...hold.endless import ENDLESS

GREEDY = Sampling(max_tokens=10, temperature=0.0)


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Counting:
    """A store that counts the tokens written to layer 0."""

    def __init__(self, store):
        self._store = store
        self.tokens = 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def write(self, span, layer, first, k, v, **owner):
        self.tokens += k.shape[1] if layer == 0 else 0
        self._store.write(span, layer, first, k, v, **owner)


@pytest.fixture
def counted(rig):
    """counted(model, ...) -> (a rig, a function that returns the tokens written since its last call)."""

    def build(model, **options):
        cluster = rig(model, **({"memory_bytes": 64 << 20} | options))
        stores = [Counting(cluster.clients[worker].store) for worker in cluster.targets]
        for worker, store in zip(cluster.targets, stores, strict=True):
            cluster.clients[worker].store = store

        def written():
            assert stores
            total = sum(store.tokens for store in stores)
            for store in stores:
                store.tokens = 0
            return total

        return cluster, written

    return build


@pytest.mark.parametrize(
    "options",
    [
        {"local": True, "shards": 0},
        {"shards": 2},
        {"shards": 3, "shard_by": "head"},
        {"shards": 5, "shard_by": "both"},
    ],
)
def test_a_repeated_prompt_computes_only_its_last_partial_block(tiny_model, counted, submit, options):
    cluster, written = counted(tiny_model, **options)
    engine = cluster.start()
    prompt = prompt_of(1300)
    first = submit(engine, "a", prompt, GREEDY)
    assert isinstance(first.result(), Finished)
    prompt_written = written()
    again, longer = (
        submit(engine, "b", prompt, GREEDY),
        submit(engine, "c", prompt + prompt_of(50, 1), GREEDY),
    )
    assert isinstance(again.result(), Finished) and isinstance(longer.result(), Finished)
    classes = prompt_written // 1300
    assert prompt_written == classes * 1300
    assert written() == classes * (1300 - 1280 + 1350 - 1280)
    assert again.tokens == first.tokens
    fresh = submit(engine_of_another_content(cluster), "d", prompt + prompt_of(50, 1), GREEDY)
    assert isinstance(fresh.result(), Finished)
    assert longer.tokens == fresh.tokens


@pytest.mark.parametrize("length", [256, 300, 700, 1300])
@pytest.mark.parametrize("shards", [1, 3, 5])
def test_all_full_blocks_are_shared_for_any_number_of_shards(tiny_model, counted, submit, shards, length):
    """Prompts are cut between blocks only, even with few blocks on many shards."""
    cluster, written = counted(tiny_model, shards=shards)
    engine = cluster.start()
    first = submit(engine, "a", prompt_of(length), GREEDY)
    result = first.result()
    assert isinstance(result, Finished) and written() == length
    used = [worker for worker, size in result.attended_bytes.items() if size]
    assert len(used) == min(shards, length // 256)
    again = submit(engine, "b", prompt_of(length), GREEDY)
    assert isinstance(again.result(), Finished)
    assert written() == length - (length - 1) // 256 * 256
    assert again.tokens == first.tokens


def engine_of_another_content(cluster):
    """Starts an engine on the same shards that finds no stored prefix."""
    model = copy(cluster.model)
    model.content = "another"
    return cluster.start(model=model)


def test_kv_is_not_shared_across_fingerprints(tiny_model, counted, submit):
    cluster, written = counted(tiny_model)
    engine = cluster.start()
    prompt = prompt_of(600)
    for name, salt, new in (("a", "x", 600), ("b", "y", 600), ("c", "x", 600 - 512), ("d", "", 600)):
        assert isinstance(submit(engine, name, prompt, GREEDY, salt=salt).result(), Finished)
        assert written() == new, (name, salt)
    config = tiny_model.config
    plain = attention_model(config, torch.float32)
    (spec,) = plain.specs
    int8 = plain._replace(layouts=(KVLayout.of(spec, layers=config.layers, format=KVFormat.INT8),))
    prints = {
        fingerprint(plain, model_content="1"),
        fingerprint(plain, model_content="2"),
        fingerprint(plain, model_content="1", salt="a"),
        fingerprint(int8, model_content="1"),
    }
    assert len(prints) == 4


def test_cached_blocks_are_evicted_for_new_prompts(tiny_model, rig, submit):
    """The shard has room for one prompt and its completion."""
    layout = rig(tiny_model).attention.layouts[0]
    cluster = rig(tiny_model, shards=1, memory_bytes=layout.block_bytes * 9)
    engine = cluster.start()
    answers = defaultdict(list)
    for number, seed in enumerate((0, 1, 0, 2, 1)):
        collected = submit(engine, f"s{number}", prompt_of(1300, seed), GREEDY)
        assert isinstance(collected.result(), Finished)
        answers[seed].append(collected.tokens)
    assert all(len({tuple(tokens) for tokens in of_seed}) == 1 for of_seed in answers.values())


def test_a_prefix_ends_where_a_shard_does_not_answer(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    first = submit(engine, "a", prompt_of(1300), GREEDY)
    assert isinstance(first.result(), Finished)

    def unreachable(*_, **__):
        raise TransportError("no answer")

    cluster.stores[cluster.targets[0]].find_prefix = unreachable
    again = submit(engine, "b", prompt_of(1300), GREEDY)
    assert isinstance(again.result(), Finished)
    del cluster.stores[cluster.targets[0]].find_prefix
    assert again.tokens == first.tokens


def slice_of(span, first, last, group0, group1, origin=None):
    key = SpanKey(
        sequence=SequenceId("s"),
        layer_class=0,
        first=first if origin is None else origin,
        group0=group0,
        group1=group1,
    )
    return SpanSlice(span=span, key=key, layout=None, first=first, last=last)


def test_a_prefix_is_assembled_from_all_head_groups():
    a, b, c = (WorkerId(name) for name in "abc")
    found = {
        a: [slice_of("a/0", 0, 512, 0, 1), slice_of("a/1", 512, 1024, 0, 3)],
        b: [slice_of("b/0", 256, 768, 1, 3, origin=100)],
        c: [slice_of("c/0", 0, 256, 1, 3), slice_of("c/1", 0, 2048, 2, 3)],
    }
    placed = assemble(found, groups=3)
    assert [(s.span, s.first, s.last, s.group0, s.group1, s.origin, s.sealed) for s in placed] == [
        ("a/0", 0, 512, 0, 1, 0, 512),
        ("c/0", 0, 256, 1, 3, 0, 256),
        ("b/0", 256, 512, 1, 3, 100, 512),
        ("a/1", 512, 1024, 0, 3, 512, 1024),
    ]
    assert assemble({b: found[b]}, groups=3) == []
    assert assemble({}, groups=3) == []


@pytest.mark.parametrize("options", [{"local": True, "shards": 0}, {"shards": 3, "shard_by": "both"}])
def test_completions_share_the_prompt_and_draw_their_own(tiny_model, counted, submit, options):
    cluster, written = counted(tiny_model, **options)
    engine = cluster.start()
    prompt = prompt_of(700)
    sampling = Sampling(max_tokens=30, n=4, temperature=1.0, seed=5)
    collected = submit(engine, "a", prompt, sampling)
    ends = collected.results(4)
    assert all(len(tokens) == 30 for tokens in collected.choices.values())
    assert len({tuple(tokens) for tokens in collected.choices.values()}) == 4
    assert written() == 700 * (1 if len(cluster.targets) == 1 else 2), (
        "the prompt was prefilled more than once"
    )
    again = submit(engine, "b", prompt, sampling)
    again.results(4)
    assert again.choices == collected.choices
    alone = submit(engine, "c", prompt, Sampling(max_tokens=30, temperature=1.0, seed=5))
    alone.results(1)
    assert alone.tokens == collected.tokens
    # Shared spans are read once for all completions.
    config = tiny_model.config
    token_bytes = config.layers * config.kv_heads * 2 * config.head_dim * 4
    assert sum(sum(end.attended_bytes.values()) for end in ends.values()) == 29 * 700 * token_bytes


def test_forks_hand_off_their_own_tails(tiny_model, rig, submit):
    engine = rig(tiny_model, shards=2, memory_bytes=64 << 20).start()
    both = submit(engine, "a", prompt_of(300), Sampling(max_tokens=300, n=2, temperature=1.0, seed=1))
    both.results(2)
    alone = submit(engine, "b", prompt_of(300), Sampling(max_tokens=300, temperature=1.0, seed=1))
    alone.results(1)
    assert alone.tokens == both.tokens and len(both.choices[1]) == 300


@pytest.mark.parametrize("length", [300, 1900])
def test_cancelling_ends_all_completions_once(tiny_model, rig, submit, length):
    """After the first token, and before the request is forked."""
    engine = rig(tiny_model, shards=2, memory_bytes=64 << 20).start()
    collected = submit(engine, "a", prompt_of(length), replace(ENDLESS, n=3))
    while length == 300 and not isinstance(collected.events.get(timeout=60), Sampled):
        pass
    engine.cancel(SequenceId("a"))
    assert [end.reason for end in collected.results(3).values()] == [Reason.CANCELLED] * 3
    assert engine.views() == []


def test_completions_whose_tails_find_no_room_are_parked_and_continue(tiny, tiny_model, rig, submit):
    """Of twelve tails five fit: a few choices run at a time, and get the tokens of an engine with room."""
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20)
    cluster.resize(5 * stride_bytes(cluster.attention.layouts[0].block_bytes))
    engine = cluster.start()
    sampling = Sampling(max_tokens=32, temperature=1.0, seed=5, n=12)
    collected = submit(engine, "a", prompt_of(300), sampling)
    bystander = submit(engine, "b", prompt_of(40, 1), Sampling(max_tokens=300))
    collected.results(12)
    assert isinstance(bystander.result(), Finished)
    assert engine.load().parkings >= 7
    roomy = rig(tiny_model, shards=1, memory_bytes=64 << 20).start()
    alone = submit(roomy, "a", prompt_of(300), sampling)
    alone.results(12)
    assert collected.choices == alone.choices
    quiet = submit(roomy, "b", prompt_of(40, 1), Sampling(max_tokens=300))
    assert isinstance(quiet.result(), Finished) and quiet.tokens == bystander.tokens
    assert not roomy.load().parkings
    assert not engine.failure
