"""Spans move off a draining shard while their sequences run, and every token stays the same.

The shards are served over loopback by this process, so that a test can look into their stores.
"""

import threading
from dataclasses import replace

import pytest

from farshore.attention_offload.shard import exports
from farshore.errors import Corrupt
from farshore.ids import SequenceId, WorkerId
from farshore.kernels.formats import KVFormat
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.kv import move
from farshore.workers.engine.membership import Draining, Opened
from farshore.workers.engine.sequence import Finished, Prefilled, Sampled

from ....waiting import until
from ...hold.endless import ENDLESS, end, end_greedy

PROMPT = [i % 90 for i in range(600)]
OTHER = [token + 1 for token in PROMPT]
DEADLINE_S = 60.0
SHARDS = 3
"""Shards of the fixture ``cluster``, unless a test asks for others."""


def await_tokens(collected, count):
    """Waits until ``count`` tokens of all choices together have come."""
    while sum(map(len, collected.choices.values())) < count:
        event = collected.events.get(timeout=DEADLINE_S)
        if isinstance(event, Sampled):
            collected.choices[event.choice].append(event.token_id)
        else:
            assert isinstance(event, Prefilled), event


def drain(engine, worker):
    """Drains the worker, and waits until no sequence reads from it. All sequences must still run."""
    before = {view.id for view in engine.views()}
    assert engine.readers().get(worker), "nothing reads from the worker"
    engine.announce(Draining(worker))
    until(lambda: not engine.readers().get(worker), f"spans stay: {engine.drains()}")
    assert {view.id for view in engine.views()} == before, "the drain was slower than the sequences"
    until(lambda: engine.drains() == {worker: ""}, "a reason why spans stay is given still")


def held(made, worker):
    return sum(info.holders > 0 for info in made.stores[worker].announce())


def check_left(made, worker):
    """The drained worker's spans are given back."""
    until(lambda: not held(made, worker), "a sequence still holds a span")


@pytest.mark.parametrize("shard_by", ["range", "head", "both"])
def test_tokens_stay_equal_across_a_drain_during_decode(is_greedy, cluster, submit, shard_by):
    made = cluster(shard_by=shard_by)
    engine = made.start(limits=EngineLimits(speculate_tokens=4))
    running = {name: submit(engine, name, PROMPT, ENDLESS) for name in "ab"}
    other = submit(engine, "c", OTHER, ENDLESS)
    for collected in (*running.values(), other):
        await_tokens(collected, 2)
    first, second = sorted(engine.readers(), key=engine.readers().get)[-2:]
    drain(engine, first)
    check_left(made, first)
    engine.announce(Opened(first))
    until(lambda: not engine.drains(), "the worker is not open again")
    drain(engine, second)
    for name, collected in running.items():
        end_greedy(engine, name, collected, PROMPT, is_greedy)
    end_greedy(engine, "c", other, OTHER, is_greedy)


def test_choices_and_sequences_that_share_spans_read_one_copy(is_greedy, cluster, submit):
    made = cluster()
    engine = made.start()
    forked = submit(engine, "a", PROMPT, replace(ENDLESS, n=3))
    await_tokens(forked, 12)
    shared = submit(engine, "b", PROMPT, ENDLESS)
    await_tokens(shared, 2)
    victim = next(worker for worker, readers in engine.readers().items() if readers == 4)
    spans = sum(info.holders == 2 for info in made.stores[victim].announce())
    copies = {worker: len(made.stores[worker].announce()) for worker in made.targets}
    drain(engine, victim)
    check_left(made, victim)
    assert spans
    others = [worker for worker in made.targets if worker != victim]
    doubly_held = sum(info.holders == 2 for w in others for info in made.stores[w].announce())
    assert doubly_held >= spans, copies
    end(engine, "a", forked, choices=3)
    end_greedy(engine, "b", shared, PROMPT, is_greedy)
    assert len(forked.choices) == 3
    assert all(is_greedy(PROMPT, tokens, len(tokens)) for tokens in forked.choices.values())


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.FLOAT32])
def test_a_drain_during_prefill_cuts_the_prompts_spans(is_greedy, cluster, submit, collect, format):
    prompt = [(7 * i) % 95 for i in range(1900)]
    made = cluster(format=format)
    # A unit per round, so that the drain is noticed before the next segment begins.
    limits = EngineLimits(segment_tokens=256, max_decode_stall_ms=0.01)
    engine = made.start(limits=limits)
    undisturbed = submit(engine, "a", prompt, Sampling(max_tokens=60))
    assert isinstance(undisturbed.result(), Finished)
    spans, collected = [], collect()

    def emit(event):
        """Runs in the engine's thread."""
        collected.events.put(event)
        first_token = isinstance(event, Sampled) and len(spans) == 1
        if first_token or (isinstance(event, Prefilled) and event.done_tokens == 512):
            spans.append(engine.views()[0].spans)
        if isinstance(event, Prefilled) and event.done_tokens == 512:
            for worker in {worker for worker, first, *_ in spans[0] if first >= 512}:
                engine.announce(Draining(worker))

    engine.submit(SequenceId("b"), prompt, Sampling(max_tokens=60), emit, epoch=1, salt="other")
    assert isinstance(collected.result(), Finished)
    assert collected.tokens == undisturbed.tokens
    if format is KVFormat.FLOAT32:
        assert is_greedy(prompt, collected.tokens, 60)
    drained = {worker for worker, first, *_ in spans[0] if first >= 512}
    assert 0 < len(drained) < SHARDS
    written_later = {worker for worker, first, last, *_ in spans[1] if last > 1024}
    assert not written_later & drained, spans
    for worker in drained:
        check_left(made, worker)


def test_hand_offs_go_elsewhere_and_what_was_handed_off_moves(is_greedy, cluster, submit):
    made = cluster(shards=2)
    engine = made.start()
    running = submit(engine, "a", PROMPT[:200], ENDLESS)
    until(lambda: len(engine.readers()) and tail_first(engine) >= 512, "no block was handed off")
    victim = max(made.targets, key=lambda worker: engine.readers().get(worker, 0))
    drain(engine, victim)
    first = tail_first(engine)
    until(lambda: tail_first(engine) > first, "no further block was handed off")
    assert not engine.readers().get(victim)
    end_greedy(engine, "a", running, PROMPT[:200], is_greedy)


def tail_first(engine):
    return max((view.tail_first for view in engine.views()), default=0)


def test_without_room_elsewhere_spans_stay_and_move_when_there_is(is_greedy, cluster, submit, monkeypatch):
    monkeypatch.setattr(move, "MOST_RETRY_S", 0.05)
    made = cluster(shards=2)
    victim, target = made.targets
    arena = made.arenas[target]
    ballast = arena.allocate(arena.free_bytes // (1 << 16), 1 << 16, commit=False)
    engine = made.start()
    running = submit(engine, "a", PROMPT, ENDLESS)
    await_tokens(running, 2)
    engine.announce(Draining(victim))
    until(lambda: "MiB free" in engine.drains().get(victim, ""), "no reason is given")
    assert engine.readers()[victim] == 1
    arena.free(ballast)
    until(lambda: not engine.readers().get(victim), "the span does not move")
    assert engine.readers()[target] == 1
    end_greedy(engine, "a", running, PROMPT, is_greedy)


def test_a_sequence_that_ends_during_a_copy_leaves_nothing(cluster, submit, monkeypatch):
    made = cluster()
    engine = made.start()
    running = submit(engine, "a", PROMPT, ENDLESS)
    await_tokens(running, 2)
    copying, go_on = hold_up_copies(monkeypatch)
    (victim, *_) = engine.readers()
    engine.announce(Draining(victim))
    assert copying.wait(DEADLINE_S)
    end(engine, "a", running)
    go_on.set()
    made.check_empty()


def hold_up_copies(monkeypatch):
    """Lets every export stop in its middle. Returns (event: one has begun, event: go on)."""
    copying, go_on, pieces = threading.Event(), threading.Event(), exports.pieces

    def slow(*args):
        for piece in pieces(*args):
            yield piece
            copying.set()
            go_on.wait(DEADLINE_S)

    monkeypatch.setattr(exports, "pieces", slow)
    return copying, go_on


def test_a_damaged_span_is_not_moved_and_says_so(is_greedy, cluster, submit, monkeypatch):
    made = cluster()
    engine = made.start()
    running = submit(engine, "a", PROMPT, ENDLESS)
    await_tokens(running, 2)
    pieces, damaged = exports.pieces, threading.Event()

    def flipped(*args):
        for piece, payload in pieces(*args):
            payload = payload.clone()
            payload[5] ^= 1
            damaged.set()
            yield piece, payload

    (victim, *_) = engine.readers()
    with monkeypatch.context() as patch:
        patch.setattr(exports, "pieces", flipped)
        engine.announce(Draining(victim))
        until(lambda: "damaged" in engine.drains().get(victim, ""), "no reason is given")
    until(lambda: not engine.readers().get(victim), "the span does not move")
    end_greedy(engine, "a", running, PROMPT, is_greedy)
    assert damaged.is_set() and Corrupt.retryable


def test_two_engines_share_the_copy_of_a_span_that_they_share(is_greedy, cluster, reach, submit):
    made = cluster()
    engines = [made.start()]
    first = submit(engines[0], "a", PROMPT, ENDLESS)
    await_tokens(first, 2)
    made.clients = made.clients | {worker: reach(made, worker, "engine-2") for worker in made.targets}
    made.resize(64 << 20)
    engines.append(made.start())
    second = submit(engines[1], "b", PROMPT, ENDLESS)
    await_tokens(second, 2)
    victim = next(w for w in made.targets if all(engine.readers().get(w) for engine in engines))
    for engine in engines:
        engine.announce(Draining(victim))
    until(lambda: not any(engine.readers().get(victim) for engine in engines), "spans stay")
    others = [worker for worker in made.targets if worker != WorkerId(victim)]
    assert any(info.holders >= 2 for w in others for info in made.stores[w].announce())
    for engine, name, collected in zip(engines, "ab", (first, second), strict=True):
        end_greedy(engine, name, collected, PROMPT, is_greedy)
