"""An attention worker that freezes or dies affects only the sequences that read from it."""

import pytest
import torch

from farshore.errors import Lost
from farshore.ids import SequenceId, WorkerId
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Failed, Finished, Prefilled, Sampled

from ...waiting import until
from ..hold.paused import Paused

SHARDS = 3
LONG = Sampling(max_tokens=1500)
SHORT = Sampling(max_tokens=10)
DEADLINE_S = 60.0


def prompt_of(length, seed):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = {f"s{n}": prompt_of(200 + 30 * n, n) for n in range(6)}


@pytest.fixture
def cluster(rig, tiny_model, start_process, connect):
    """(rig, processes by worker): three attention workers in processes of their own."""
    built = rig(tiny_model, shards=SHARDS, memory_bytes=64 << 20)
    processes = {}
    for worker in built.targets:
        processes[worker] = start_process(worker=worker)
        built.clients[worker] = connect(processes[worker].address, model=built.attention, engine="engine-1")
    return built, processes


@pytest.fixture(scope="module")
def undisturbed():
    """Prompt name -> its tokens from an engine whose shards do not fail; filled by ``expected``."""
    return {}


def expected(rig, tiny_model, submit, undisturbed):
    if not undisturbed:
        engine = rig(tiny_model, memory_bytes=256 << 20).start()
        for name, prompt in PROMPTS.items():
            collected = submit(engine, name, prompt, LONG)
            assert isinstance(collected.result(), Finished)
            undisturbed[name] = collected.tokens
    return undisturbed


def disturb(engine, collect, processes, fault):
    """Starts six sequences. When each has a token, and none has handed a block off, ``fault`` (a method of
    a process) happens to a worker that some of them, but not all, read from. Returns what the sequences give,
    the worker, and its readers."""
    running, begun = {name: collect() for name in PROMPTS}, set()

    def last_begins(named):
        name, event = named
        begins = isinstance(event, Sampled) and name not in begun
        begun.update([name] if begins else [])
        return begins and len(begun) == len(PROMPTS)

    paused = Paused(lambda named: running[named[0]].events.put(named[1]), last_begins)
    for name, prompt in PROMPTS.items():
        engine.submit(SequenceId(name), prompt, LONG, lambda event, name=name: paused((name, event)), epoch=1)
    with paused:
        readers = {worker: readers_of(engine, worker) for worker in processes}
        victim = next(worker for worker, names in readers.items() if 0 < len(names) < len(PROMPTS))
        getattr(processes[victim], fault)()
    return running, victim, readers[victim]


def readers_of(engine, worker):
    return {view.id for view in engine.views() if any(span[0] == worker for span in view.spans)}


def next_tokens(collected, count):
    while count:
        event = collected.events.get(timeout=DEADLINE_S)
        assert isinstance(event, Sampled | Prefilled), event
        if isinstance(event, Sampled):
            collected.choices[0].append(event.token_id)
            count -= 1


def used_bytes(client):
    identity = client.identify()
    return identity.budget_bytes - identity.free_bytes


def test_other_sequences_continue_while_a_shard_is_frozen_and_all_end(
    cluster, rig, tiny_model, submit, collect, undisturbed
):
    shards_rig, processes = cluster
    engine = shards_rig.start(limits=EngineLimits(shard_grace_s=120.0))
    running, victim, readers = disturb(engine, collect, processes, "freeze")
    for name, collected in running.items():
        if name not in readers:
            next_tokens(collected, 100)
    new = submit(engine, "new", prompt_of(40, 99), SHORT)
    assert isinstance(new.result(), Finished)
    processes[victim].thaw()
    tokens = expected(rig, tiny_model, submit, undisturbed)
    for name, collected in running.items():
        assert isinstance(collected.result(), Finished)
        assert collected.tokens == tokens[name]
    until(lambda: not any(map(used_bytes, (shards_rig.clients[worker] for worker in shards_rig.targets))))


def test_a_shard_frozen_beyond_its_grace_fails_its_readers_and_frees_their_spans_after_a_thaw(
    cluster, submit, collect
):
    shards_rig, processes = cluster
    engine = shards_rig.start(limits=EngineLimits(shard_grace_s=1.0))
    running, victim, readers = disturb(engine, collect, processes, "freeze")
    for name in readers:
        result = running[name].result()
        assert isinstance(result, Failed) and isinstance(result.error, Lost), result
        assert (
            result.error.retryable
            and victim in str(result.error)
            and "send the request again" in str(result.error)
        )
    for name in PROMPTS.keys() - readers:
        next_tokens(running[name], 50)
        engine.cancel(SequenceId(name))
    processes[victim].thaw()
    until(lambda: not any(map(used_bytes, (shards_rig.clients[worker] for worker in shards_rig.targets))))
    again = submit(engine, "again", PROMPTS[next(iter(readers))], SHORT)
    assert isinstance(again.result(), Finished)


def test_a_killed_shard_fails_only_its_readers(cluster, submit, collect):
    shards_rig, processes = cluster
    engine = shards_rig.start()
    running, victim, readers = disturb(engine, collect, processes, "kill")
    for name in readers:
        result = running[name].result()
        assert isinstance(result, Failed) and isinstance(result.error, Lost), result
        assert f"attention worker {victim} is gone" in str(result.error)
    for name in PROMPTS.keys() - readers:
        next_tokens(running[name], 100)
        engine.cancel(SequenceId(name))
        running[name].result()
    others = [WorkerId(worker) for worker in shards_rig.targets if worker != victim]
    until(lambda: not any(used_bytes(shards_rig.clients[worker]) for worker in others))
    assert isinstance(submit(engine, "next", PROMPTS["s0"], SHORT).result(), Finished)
