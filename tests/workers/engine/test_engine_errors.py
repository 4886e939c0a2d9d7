"""Errors in an engine: broken connections, dead shards, and programming mistakes."""

import pytest

from farshore.attention_offload.transport.frames import Transport
from farshore.errors import Internal, TransportError
from farshore.kvstore.store.arena.arena import Arena
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Failed, Finished

from ..hold.endless import ENDLESS

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PROMPT = list(range(5, 50))


class FlakyClient:
    """A shard client whose connection breaks at chosen waits, and that can die, as over a network."""

    def __init__(self, client):
        self._client = client
        self.store = client.store
        self.transport = self.bulk_transport = Transport.TCP
        self.native_connection = None
        self.waits = 0
        self.break_at = set()
        self.die_at = None
        self.refused = 0
        self._dead = False

    def die(self):
        self._dead = True

    def revive(self):
        """Makes the shard answer again, so that the engine can release its spans."""
        self.die_at, self._dead = None, False

    def identify(self):
        self._check()
        return self._client.identify()

    def connect(self):
        self._check()
        return self.transport

    def beat(self, wanted):
        """Drops the spans that are not wanted, as a remote shard does."""
        self._check()
        if wanted is not None:
            kept = {sequence: spans for (sequence, _), spans in wanted.items()}
            for sequence in self.store.sequences():
                self.store.drop_sequence(sequence, epoch=1 << 62, keep=kept.get(sequence, ()))
        return self._client.beat(wanted)

    def begin(self, step, **options):
        self._check()
        self._client.begin(step, **options)

    def send(self, layer, micro_batch, q):
        self._check()
        return self._client.send(layer, micro_batch, q)

    def wait(self, sent, **options):
        self.waits += 1
        self._dead |= self.waits == self.die_at
        self._check()
        if self.waits in self.break_at:
            raise TransportError("the connection broke")
        return self._client.wait(sent, **options)

    def close(self):
        self._client.close()

    def _check(self):
        if self._dead:
            self.refused += 1
            raise TransportError("no answer")


def test_a_transport_error_in_the_middle_of_a_step_loses_nothing(
    greedy, tiny_model, rig, submit, attended_bytes
):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20, wrap=FlakyClient)
    cluster.clients["shard0"].break_at = {2, 8, 9, 20}
    cluster.clients["shard1"].break_at = {1, 15}
    engine = cluster.start()
    collected = [submit(engine, name, PROMPT, GREEDY) for name in "ab"]
    for answer in collected:
        result = answer.result()
        assert isinstance(result, Finished), result
        assert answer.tokens == greedy(PROMPT, GREEDY.max_tokens)
        assert sum(result.attended_bytes.values()) == attended_bytes(
            tiny_model, len(PROMPT), GREEDY.max_tokens - 1
        )
    assert cluster.clients["shard0"].waits > 20 and cluster.clients["shard1"].waits > 15


def test_a_dead_shard_fails_its_sequences_and_only_them(greedy, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, shard_by="range", memory_bytes=64 << 20, wrap=FlakyClient)
    engine = cluster.start()
    single = submit(engine, "single", PROMPT[:1], Sampling(max_tokens=200, temperature=0.0), pause_at=[1])
    with single.paused:
        (view,) = engine.views()
        victim = cluster.clients[next(worker for worker in cluster.targets if worker != view.spans[0][0])]
        victim.die_at = 10
        spread = submit(engine, "spread", PROMPT, Sampling(max_tokens=600, temperature=0.0))
    result = spread.result()
    assert isinstance(result, Failed) and isinstance(result.error, TransportError)
    assert 0 < len(spread.tokens) < 600
    result = single.result()
    assert isinstance(result, Finished), result
    assert single.tokens == greedy(PROMPT[:1], 200)
    victim.revive()
    cluster.settle()


def test_new_sequences_are_placed_on_the_shards_that_answer(greedy, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=3, shard_by="head", memory_bytes=64 << 20, wrap=FlakyClient)
    engine = cluster.start()
    victim = cluster.clients["shard1"]
    victim.die()
    for name in "ab":
        collected = submit(engine, name, PROMPT, GREEDY)
        assert isinstance(collected.result(), Finished)
        assert collected.tokens == greedy(PROMPT, GREEDY.max_tokens)
    assert not victim.store.announce()
    victim.revive()


def test_a_shard_that_dies_while_a_sequence_is_placed_is_left_out(greedy, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)

    def unreachable(*_, **__):
        raise TransportError("no answer")

    cluster.stores["shard0"].create = unreachable
    collected = submit(cluster.start(), "a", PROMPT, GREEDY)
    assert isinstance(collected.result(), Finished)
    del cluster.stores["shard0"].create
    assert collected.tokens == greedy(PROMPT, GREEDY.max_tokens)


def test_a_request_fails_without_any_shard_and_later_ones_are_served(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20, wrap=FlakyClient)
    engine = cluster.start(limits=EngineLimits(shard_grace_s=0.3))
    cluster.clients["shard0"].die()
    result = submit(engine, "a", PROMPT, GREEDY).result()
    assert isinstance(result, Failed) and result.error.retryable
    assert "no attention worker answers: shard0" in str(result.error)
    cluster.clients["shard0"].revive()
    ends = (submit(engine, f"b{n}", PROMPT, GREEDY).result() for n in range(10_000))
    assert isinstance(next(end for end in ends if not isinstance(end, Failed)), Finished)


def test_a_request_waits_for_a_shard_that_may_answer_again(greedy, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20, wrap=FlakyClient)
    engine = cluster.start(limits=EngineLimits(shard_grace_s=60.0))
    cluster.clients["shard0"].die()
    collected = submit(engine, "a", PROMPT, GREEDY)
    while not cluster.clients["shard0"].refused:
        assert collected.events.empty()
    cluster.clients["shard0"].revive()
    assert isinstance(collected.result(), Finished)
    assert collected.tokens == greedy(PROMPT, GREEDY.max_tokens)


class BrokenClient(FlakyClient):
    """A shard client with a programming mistake."""

    def wait(self, sent, **options):
        raise RuntimeError("a mistake")


def test_a_mistake_in_a_step_fails_the_sequence_that_raises_alone(tiny_model, rig, submit):
    """Each sequence that reads from the broken shard raises, also alone; the engine continues."""
    cluster = rig(tiny_model, memory_bytes=64 << 20, wrap=BrokenClient)
    engine = cluster.start()
    for name in "ab":
        result = submit(engine, name, PROMPT, GREEDY).result()
        assert isinstance(result, Failed) and isinstance(result.error, Internal)
        assert "RuntimeError: a mistake" in str(result.error)
    assert not engine.failure
    one = submit(engine, "c", PROMPT, Sampling(max_tokens=1))
    assert isinstance(one.result(), Finished)


def test_an_engine_that_cannot_compute_reports_it_first(tiny_model, rig, submit, monkeypatch):
    """A round and the probe fail: ``on_failed`` is called before any request gets its event."""
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    told = []
    engine = cluster.start(on_failed=lambda: told.append(engine.failure))
    running = submit(engine, "a", PROMPT, ENDLESS)
    running.events.get(timeout=60)

    def broken(*_):
        raise RuntimeError("no memory for a thread")

    monkeypatch.setattr(engine._scheduler, "round", broken)
    monkeypatch.setattr("farshore.workers.engine.engine.probe", broken)
    result = running.result()
    assert isinstance(result, Failed) and isinstance(result.error, Internal)
    assert told and "RuntimeError: no memory for a thread" in told[0] == engine.failure
    with pytest.raises(Internal, match="the engine failed"):
        submit(engine, "b", PROMPT, GREEDY)


def test_an_engine_survives_a_round_that_fails(greedy, tiny_model, rig, submit, monkeypatch):
    """The probe succeeds, so the engine continues."""
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    rounds = engine._scheduler.round
    failures = iter([RuntimeError("a mistake"), RuntimeError("another")])

    def flaky():
        if (error := next(failures, None)) is not None:
            raise error
        return rounds()

    monkeypatch.setattr(engine._scheduler, "round", flaky)
    collected = submit(engine, "a", PROMPT, GREEDY)
    assert isinstance(collected.result(), Finished) and not engine.failure
    assert collected.tokens == greedy(PROMPT, GREEDY.max_tokens)


def test_an_engine_refuses_an_arena_on_another_device(rig, tiny_model):
    cluster = rig(tiny_model)
    cluster.arenas["engine"] = Arena(1 << 20, device="meta")
    with pytest.raises(ValueError, match=r"KV and model lie on .*: give the arena the model's device"):
        cluster.engine()
