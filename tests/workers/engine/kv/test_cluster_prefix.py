"""Prefixes are the cluster's: engines find what other engines stored, wherever it lies, and nothing else."""

import shutil
from collections import Counter

import pytest
import torch

from farshore.errors import TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.prefix import PrefixBlock, chain
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model
from farshore.sampling import Sampling
from farshore.workers.announcer import Announcer
from farshore.workers.engine.kv import locations
from farshore.workers.engine.kv.prefix import fingerprint

GREEDY = Sampling(max_tokens=6, temperature=0.0)
PROMPT_TOKENS, CACHED_TOKENS = 1300, 1280


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Spy:
    """A shard's store that counts look-ups, and runs ``between`` before a look-up's second step."""

    def __init__(self, store):
        self._store = store
        self.calls = Counter()
        self.tokens = 0
        self.between = lambda: None

    def __getattr__(self, name):
        return getattr(self._store, name)

    def find_prefix(self, names, **options):
        self.calls["find"] += 1
        assert all(isinstance(name, bytes) and len(name) == 32 for name in names)
        return self._store.find_prefix(names, **options)

    def hold_prefix(self, blocks, **options):
        self.calls["hold"] += 1
        self.tokens += sum(len(block.tokens) for block in blocks)
        self.between()
        return self._store.hold_prefix(blocks, **options)


@pytest.fixture
def cluster(tiny_model, rig, monkeypatch):
    """Shards with spies, and a directory that knows what they hold after ``announce()``. Engines wait long
    for its answer."""
    monkeypatch.setattr(locations, "DIRECTORY_DEADLINE_S", 60.0)
    made = rig(tiny_model, shards=4, memory_bytes=64 << 20)
    made.spies = {}
    for worker in made.targets:
        made.spies[worker] = made.clients[worker].store = Spy(made.stores[worker])
    made.directory = EmbeddedDirectory(clock=lambda: 0.0)
    announcers = []
    for worker in made.targets:
        made.directory.renew(
            WorkerRecord(
                worker=worker,
                kind="attention",
                slot=worker,
                address="127.0.0.1:7",
                host="127.0.0.1",
                process_id=1,
                state="serving",
            )
        )
        announcers.append(Announcer(made.directory, worker, made.stores[worker].names))

    def announce():
        for announcer in announcers:
            announcer.announce()

    made.announce = announce
    return made


def clear(cluster):
    for spy in cluster.spies.values():
        spy.calls.clear()
        spy.tokens = 0


def holders(cluster):
    """The shards that hold named blocks."""
    return {worker for worker in cluster.targets if cluster.stores[worker].names.names()}


def test_another_engine_finds_a_prefix_and_asks_only_who_announced_it(cluster, submit, greedy):
    prompt = prompt_of(600)
    first = submit(cluster.start(find_prefix=cluster.directory.find_prefix), "a", prompt, GREEDY)
    assert first.result().cached_tokens == 0
    assert sum(sum(spy.calls.values()) for spy in cluster.spies.values()) == 0
    cluster.settle()
    assert len(holders(cluster)) == 2
    cluster.announce()
    second = submit(cluster.start(find_prefix=cluster.directory.find_prefix), "b", prompt, GREEDY)
    assert second.result().cached_tokens == 512
    assert second.tokens == first.tokens == greedy(prompt, 6)
    for worker, spy in cluster.spies.items():
        assert spy.calls == ({"find": 1, "hold": 1} if worker in holders(cluster) else {})
    assert sum(spy.tokens for spy in cluster.spies.values()) == 512, "tokens were sent for more than the hit"


def test_an_engine_remembers_what_it_sealed_before_that_is_announced(cluster, submit):
    engine = cluster.start(find_prefix=cluster.directory.find_prefix)
    for name, cached_tokens in (("a", 0), ("b", CACHED_TOKENS)):
        assert submit(engine, name, prompt_of(PROMPT_TOKENS), GREEDY).result().cached_tokens == cached_tokens
        cluster.settle()


@pytest.mark.parametrize("fault", ["away", "names a wrong worker", "names a dead worker", "names none"])
def test_a_directory_is_only_a_hint(cluster, submit, greedy, fault):
    prompt = prompt_of(PROMPT_TOKENS)
    submit(cluster.start(), "a", prompt, GREEDY).result()
    cluster.settle()

    def find_prefix(hashes):
        if fault == "away":
            raise TransportError("the directory: UNAVAILABLE")
        if fault == "names a dead worker":
            return [{WorkerId("shard-dead"), *cluster.targets}] * len(hashes)
        return [{cluster.targets[0]} if fault == "names a wrong worker" else set()] * len(hashes)

    stored = cluster.stores[cluster.targets[0]].names.names()
    assert stored, "this shard holds a part of the prefix"
    second = submit(cluster.start(find_prefix=find_prefix), "b", prompt, GREEDY)
    cached_tokens = second.result().cached_tokens
    if fault in ("away", "names a dead worker"):
        assert cached_tokens == CACHED_TOKENS
    elif fault == "names none":
        assert cached_tokens == 0
    else:
        assert cached_tokens < CACHED_TOKENS
    assert second.tokens == greedy(prompt, 6)


def test_a_block_that_goes_between_the_two_steps_makes_a_shorter_hit(cluster, submit, greedy):
    prompt = prompt_of(PROMPT_TOKENS)
    engine = cluster.start()
    submit(engine, "a", prompt, GREEDY).result()
    cluster.settle()
    clear(cluster)
    fourth = chain(prompt, fingerprint=_fingerprint(cluster))[3].hash
    (worker,) = (worker for worker in cluster.targets if fourth in cluster.stores[worker].names.names())
    store = cluster.stores[worker]

    def evict():
        granted = SequenceId("greedy")
        layout = cluster.attention.layouts[0]
        key = next(info.key for info in store.announce())
        usage = store.usage()
        blocks = usage.available_bytes // layout.block_bytes
        for _ in range(blocks):
            store.create(_replace(key, granted), capacity_tokens=256, layout=layout, epoch=Epoch(1))
        store.drop_sequence(granted, epoch=Epoch(1))

    cluster.spies[worker].between = evict
    second = submit(engine, "b", prompt, GREEDY)
    result = second.result()
    assert cluster.spies[worker].calls == {"find": 1, "hold": 1}
    assert result.cached_tokens in (512, 768) and result.cached_tokens < CACHED_TOKENS
    assert second.tokens == greedy(prompt, 6)


def test_a_forged_name_is_no_hit(cluster, submit, greedy):
    """A stored block has the name of the prompt's second block, and other tokens: as in a hash collision."""
    prompt, other = prompt_of(PROMPT_TOKENS), prompt_of(PROMPT_TOKENS, 1)
    named_by = _fingerprint(cluster)
    named = zip(chain(prompt, fingerprint=named_by), chain(other, fingerprint=named_by), strict=True)
    forged = [PrefixBlock(mine.hash, theirs.tokens, mine.first) for mine, theirs in named]
    cluster.targets = cluster.targets[:1]
    engine = cluster.start()
    spy = cluster.spies[cluster.targets[0]]
    seal, first = spy.seal, chain(prompt, fingerprint=named_by)[0]

    def forge(span, tokens, *, blocks=(), **owner):
        return seal(span, tokens, blocks=[first, *forged[1:]] if blocks else (), **owner)

    spy.seal = forge
    submit(engine, "a", prompt, GREEDY).result()
    cluster.settle()
    del spy.seal
    clear(cluster)
    second = submit(engine, "b", prompt, GREEDY)
    assert second.result().cached_tokens == 256
    assert spy.calls == {"find": 1, "hold": 1}
    assert second.tokens == greedy(prompt, 6)


def test_tenants_find_nothing_of_each_other(cluster, submit):
    engine = cluster.start(find_prefix=cluster.directory.find_prefix)
    prompt = prompt_of(600)
    for name, salt, cached_tokens in (("a", "x", 0), ("b", "y", 0), ("c", "x", 512), ("d", "", 0)):
        assert submit(engine, name, prompt, GREEDY, salt=salt).result().cached_tokens == cached_tokens
        cluster.settle()
        cluster.announce()


def test_evicted_names_are_announced_as_gone(cluster, submit):
    cluster.targets = cluster.targets[:1]
    engine = cluster.start()
    prompt = prompt_of(600)
    submit(engine, "a", prompt, GREEDY).result()
    cluster.settle()
    cluster.announce()
    names = [block.hash for block in chain(prompt, fingerprint=_fingerprint(cluster))]
    assert cluster.directory.find_prefix(names) == [{cluster.targets[0]}] * 2
    store = cluster.stores[cluster.targets[0]]
    key = next(info.key for info in store.announce())
    layout = cluster.attention.layouts[0]
    span = store.create(
        _replace(key, SequenceId("all")),
        capacity_tokens=store.usage().budget_bytes // layout.block_bytes * 256,
        layout=layout,
        epoch=Epoch(1),
    )
    cluster.announce()
    assert cluster.directory.find_prefix(names) == [frozenset()] * 2
    store.drop([span], sequence=SequenceId("all"), epoch=Epoch(1))


def test_hosts_share_prefixes_of_equal_weights_at_other_paths(
    cluster, submit, tiny_folder, tiny_model, tmp_path
):
    copy = tmp_path / "elsewhere" / "model"
    shutil.copytree(tiny_folder, copy)
    model = load_model(resolve(str(copy)), dtype=torch.float32)
    assert model is not tiny_model and model.content == tiny_model.content
    find_prefix = cluster.directory.find_prefix
    first = submit(cluster.start(find_prefix=find_prefix), "a", prompt_of(600), GREEDY)
    first.result()
    cluster.settle()
    cluster.announce()
    second = submit(cluster.start(model=model, find_prefix=find_prefix), "b", prompt_of(600), GREEDY)
    assert second.result().cached_tokens == 512
    assert second.tokens == first.tokens


def _fingerprint(cluster):
    return fingerprint(cluster.attention, model_content=cluster.model.content)


def _replace(key, sequence):
    return type(key)(sequence=sequence, layer_class=0, first=0, group0=key.group0, group1=key.group1)
