"""Shards join and leave a running engine."""

import pytest

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.ids import WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.sampling import Sampling
from farshore.workers.engine.membership import Joined, Left, Opened, Shut
from farshore.workers.engine.sequence import Finished

from ...waiting import until
from ..hold.endless import ENDLESS, end_greedy

PROMPT = [i % 90 for i in range(600)]
OLD, NEW = WorkerId("shard0"), WorkerId("shard1")


def stored(cluster, worker):
    """Tokens in the worker's store, sealed."""
    return sum(info.sealed_tokens for info in cluster.stores[worker].announce())


def members(engine):
    return {worker for worker, answers in engine.shards().items() if answers}


@pytest.fixture
def cluster(tiny_model, rig):
    """One shard, and a second one that the engine does not know."""
    made = rig(tiny_model, shards=1, memory_bytes=64 << 20)
    made.arenas[NEW] = Arena(64 << 20)
    made.stores[NEW] = LocalStore(worker=NEW, arena=made.arenas[NEW])
    return made


@pytest.fixture
def join(cluster):
    def call(engine):
        client = InProcessClient(NEW, cluster.stores[NEW], cluster.attention)
        engine.announce(Joined(NEW, client))
        until(lambda: NEW in members(engine), "the engine did not take the shard in")

    return call


def test_a_new_shard_stores_new_sequences_and_the_next_spans_of_running_ones(
    greedy, is_greedy, cluster, join, submit
):
    engine = cluster.start()
    running = submit(engine, "a", PROMPT, ENDLESS)
    until(lambda: engine.views(), "the request did not start")
    assert stored(cluster, NEW) == 0
    join(engine)
    until(lambda: stored(cluster, NEW) >= 256, "no block of the running sequence goes to the new shard")
    end_greedy(engine, "a", running, PROMPT, is_greedy)
    cluster.settle()
    handed_off = stored(cluster, NEW)
    other = [token + 1 for token in PROMPT]
    new = submit(engine, "b", other, Sampling(max_tokens=5))
    assert isinstance(new.result(), Finished)
    assert stored(cluster, NEW) > handed_off
    assert new.tokens == greedy(other, 5)


def test_a_shut_shard_gets_nothing_new_and_leaves_when_nothing_reads_it(is_greedy, cluster, join, submit):
    engine = cluster.start()
    join(engine)
    running = submit(engine, "a", PROMPT, ENDLESS)
    until(lambda: stored(cluster, OLD) and stored(cluster, NEW), "the prompt is not on both shards")
    engine.announce(Shut(OLD))
    engine.announce(Left(OLD))
    until(lambda: not running.events.empty(), "no token came")
    assert OLD in members(engine)
    end_greedy(engine, "a", running, PROMPT, is_greedy)
    cluster.settle()
    before = stored(cluster, OLD)
    engine.announce(Left(OLD))
    until(lambda: OLD not in members(engine), "the shard did not leave")
    other = submit(engine, "b", [token + 1 for token in PROMPT], Sampling(max_tokens=300))
    assert isinstance(other.result(), Finished)
    assert stored(cluster, OLD) == before


def test_an_opened_shard_is_used_again_and_does_not_leave(cluster, submit):
    engine = cluster.start()
    for change in (Shut(OLD), Left(OLD), Opened(OLD), Left(WorkerId("unknown"))):
        engine.announce(change)
    request = submit(engine, "a", PROMPT, Sampling(max_tokens=5))
    assert isinstance(request.result(), Finished)
    assert stored(cluster, OLD) >= 512


def test_requests_wait_for_a_first_shard(greedy, cluster, join, submit):
    cluster.targets = []
    del cluster.clients[OLD]
    engine = cluster.start()
    waiting = submit(engine, "a", PROMPT, Sampling(max_tokens=5))
    assert engine.load().waiting == 1
    join(engine)
    assert isinstance(waiting.result(), Finished)
    assert waiting.tokens == greedy(PROMPT, 5)
