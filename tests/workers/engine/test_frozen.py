"""An attention worker that freezes or dies: only the sequences that read from it notice."""

import threading
import time

import pytest
import torch

from farshore.errors import Lost
from farshore.ids import SequenceId, WorkerId
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Failed, Finished, Sampled, Sampling

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
    it = rig(tiny_model, shards=SHARDS, memory_bytes=64 << 20)
    processes = {}
    for worker in it.targets:
        processes[worker] = start_process(worker=worker)
        it.clients[worker] = connect(processes[worker].address, model=it.attention, engine="engine-1")
    return it, processes


@pytest.fixture(scope="module")
def undisturbed():
    """Tokens of every prompt, as an engine gives them that nothing happens to."""
    return {}


def expected(rig, tiny_model, submit, undisturbed):
    if not undisturbed:
        engine = rig(tiny_model, memory_bytes=256 << 20).start()
        for name, prompt in PROMPTS.items():
            it = submit(engine, name, prompt, LONG)
            assert isinstance(it.result(), Finished)
            undisturbed[name] = it.tokens
    return undisturbed


def start_all(engine, submit, processes):
    """Six sequences that decode, and the worker that some of them read from, and others don't."""
    running = {name: submit(engine, name, prompt, LONG) for name, prompt in PROMPTS.items()}
    for it in running.values():
        while not isinstance(event := it.events.get(timeout=DEADLINE_S), Sampled):
            pass
        it.choices[0].append(event.token_id)
    readers = {worker: readers_of(engine, worker) for worker in processes}
    victim = next(worker for worker, names in readers.items() if 0 < len(names) < len(PROMPTS))
    return running, victim


def readers_of(engine, worker):
    return {view.id for view in engine.views() if any(span[0] == worker for span in view.spans)}


def next_tokens(it, count):
    while count:
        event = it.events.get(timeout=DEADLINE_S)
        assert isinstance(event, Sampled), event
        it.choices[0].append(event.token_id)
        count -= 1


def used_bytes(client):
    identity = client.identify()
    return identity.budget_bytes - identity.free_bytes


def wait_until(condition):
    pause, end_s = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        pause.wait(0.02)


def test_sequences_elsewhere_go_on_while_a_shard_is_frozen_and_all_end(
    cluster, rig, tiny_model, submit, undisturbed
):
    it, processes = cluster
    engine = it.start(limits=EngineLimits(shard_grace_s=120.0))
    running, victim = start_all(engine, submit, processes)
    processes[victim].freeze()
    hit = readers_of(engine, victim)
    assert 0 < len(hit) < len(PROMPTS)
    for name, collected in running.items():
        if name not in hit:
            next_tokens(collected, 100)
    new = submit(engine, "new", prompt_of(40, 99), SHORT)
    assert isinstance(new.result(), Finished)
    processes[victim].thaw()
    tokens = expected(rig, tiny_model, submit, undisturbed)
    for name, collected in running.items():
        assert isinstance(collected.result(), Finished)
        assert collected.tokens == tokens[name]
    wait_until(lambda: not any(map(used_bytes, (it.clients[worker] for worker in it.targets))))


def test_a_shard_frozen_for_good_ends_its_readers_and_is_whole_again_after_a_thaw(cluster, submit):
    it, processes = cluster
    engine = it.start(limits=EngineLimits(shard_grace_s=1.0))
    running, victim = start_all(engine, submit, processes)
    processes[victim].freeze()
    hit = readers_of(engine, victim)
    for name in hit:
        result = running[name].result()
        assert isinstance(result, Failed) and isinstance(result.error, Lost), result
        assert (
            result.error.retryable
            and victim in str(result.error)
            and "send the request again" in str(result.error)
        )
    for name in PROMPTS.keys() - hit:
        next_tokens(running[name], 50)
        engine.cancel(SequenceId(name))
    processes[victim].thaw()
    wait_until(lambda: not any(map(used_bytes, (it.clients[worker] for worker in it.targets))))
    again = submit(engine, "again", PROMPTS[next(iter(hit))], SHORT)
    assert isinstance(again.result(), Finished)


def test_a_killed_shard_ends_its_readers_alone(cluster, submit):
    it, processes = cluster
    engine = it.start()
    running, victim = start_all(engine, submit, processes)
    hit = readers_of(engine, victim)
    processes[victim].kill()
    for name in hit:
        result = running[name].result()
        assert isinstance(result, Failed) and isinstance(result.error, Lost), result
        assert f"attention worker {victim} is gone" in str(result.error)
    for name in PROMPTS.keys() - hit:
        next_tokens(running[name], 100)
        engine.cancel(SequenceId(name))
        running[name].result()
    others = [WorkerId(worker) for worker in it.targets if worker != victim]
    wait_until(lambda: not any(used_bytes(it.clients[worker]) for worker in others))
    assert isinstance(submit(engine, "next", PROMPTS["s0"], SHORT).result(), Finished)
