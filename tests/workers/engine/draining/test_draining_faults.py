"""Drains of attention workers in processes of their own, which freeze and die meanwhile."""

import pytest

from farshore.attention_offload.client.remote import RemoteClient
from farshore.errors import Lost
from farshore.ids import WorkerId
from farshore.sampling import Sampling
from farshore.workers.engine.kv import move
from farshore.workers.engine.membership import Draining, Joined, Left
from farshore.workers.engine.sequence import Failed, Finished, Sampled

from ....waiting import until
from ...hold.endless import ENDLESS, end_greedy

pytestmark = pytest.mark.heavy

PROMPTS = [[(n + i) % 90 for i in range(300)] for n in range(4)]
DEADLINE_S = 60.0
OLD, A, B = (WorkerId(f"shard{n}") for n in range(3))


@pytest.fixture
def cluster(rig, tiny_model, start_process):
    """(engine, processes by worker): four sequences that read from the first worker; two others have joined
    since."""
    made = rig(tiny_model, shards=1, memory_bytes=64 << 20)
    processes = {worker: start_process(worker=worker, kv_memory_bytes=16 << 20) for worker in (OLD, A, B)}

    def client(worker):
        return RemoteClient(processes[worker].address, made.attention, made.model.dtype, engine="engine-1")

    made.clients[OLD] = client(OLD)
    engine = made.start()

    def join():
        for worker in (A, B):
            engine.announce(Joined(worker, client(worker)))
        until(lambda: all(engine.shards().get(worker) for worker in (A, B)), "the workers do not join")

    yield engine, processes, join
    for process in processes.values():
        process.kill()
    made.clients[OLD].close()


def start_all(engine, submit, join):
    running = [submit(engine, f"s{n}", prompt, ENDLESS) for n, prompt in enumerate(PROMPTS)]
    for collected in running:
        while not isinstance(event := collected.events.get(timeout=DEADLINE_S), Sampled):
            pass
        collected.choices[0].append(event.token_id)
    join()
    assert engine.readers()[OLD] == len(PROMPTS)
    return running


def end_all(engine, running, is_greedy):
    for n, (prompt, collected) in enumerate(zip(PROMPTS, running, strict=True)):
        end_greedy(engine, f"s{n}", collected, prompt, is_greedy)


def test_a_worker_that_freezes_while_it_drains_is_empty_soon_after_it_wakes(
    cluster, submit, is_greedy, monkeypatch
):
    monkeypatch.setattr(move, "MOST_RETRY_S", 0.2)
    engine, processes, join = cluster
    running = start_all(engine, submit, join)
    processes[OLD].freeze()
    engine.announce(Draining(OLD))
    until(lambda: engine.drains().get(OLD), "no reason is given")
    processes[OLD].thaw()
    until(lambda: not engine.readers().get(OLD), f"spans stay: {engine.drains()}")
    end_all(engine, running, is_greedy)


def test_a_target_that_is_dead_or_frozen_takes_nothing_and_no_request_fails(
    cluster, submit, is_greedy, monkeypatch
):
    monkeypatch.setattr(move, "IMPORT_DEADLINE_S", 1.0)
    monkeypatch.setattr(move, "MOST_RETRY_S", 0.2)
    engine, processes, join = cluster
    running = start_all(engine, submit, join)
    processes[A].freeze()
    engine.announce(Draining(OLD))
    until(lambda: engine.readers().get(B), f"spans stay: {engine.drains()}")
    processes[A].kill()
    until(lambda: not engine.readers().get(OLD), f"spans stay: {engine.drains()}")
    assert not engine.readers().get(A)
    end_all(engine, running, is_greedy)


def test_a_worker_that_dies_while_it_drains_fails_those_that_still_read_from_it(cluster, submit, is_greedy):
    engine, processes, join = cluster
    running = start_all(engine, submit, join)
    engine.announce(Draining(OLD))
    until(lambda: engine.readers().get(OLD, 0) < len(PROMPTS), f"spans stay: {engine.drains()}")
    processes[OLD].kill()
    engine.announce(Left(OLD))
    until(lambda: OLD not in engine.shards(), "the worker does not leave")
    survivors = {view.id for view in engine.views()}
    assert survivors
    for n, (prompt, collected) in enumerate(zip(PROMPTS, running, strict=True)):
        if f"s{n}" in survivors:
            end_greedy(engine, f"s{n}", collected, prompt, is_greedy)
        else:
            end = collected.result()
            assert isinstance(end, Failed) and isinstance(end.error, Lost) and OLD in end.error.shards
    again = submit(engine, "again", PROMPTS[0], Sampling(max_tokens=5))
    assert isinstance(again.result(), Finished)
    assert is_greedy(PROMPTS[0], again.tokens, 5)
