"""The engine's behaviour around the tokens: transactions, memory, cancelling, limits."""

import threading

import pytest
import torch

from farshore.attention_offload.transport.frames import Transport
from farshore.errors import Full, Internal, InvalidRequest, NotFound, Overloaded, TransportError
from farshore.ids import SequenceId
from farshore.kvstore.store.arena import Arena, stride_bytes
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Failed, Finished, Reason, Sampling

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PROMPT = list(range(5, 50))


_GREEDY = {}
"""Prompt -> prompt and what transformers goes on with, as far as it was asked for."""


def greedy(tiny, prompt, count):
    ids = _GREEDY.setdefault(tuple(prompt), list(prompt))
    with torch.inference_mode():
        while len(ids) < len(prompt) + count:
            ids.append(int(tiny(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) : len(prompt) + count]


class Flaky:
    """A peer whose connection breaks at chosen calls: what a network does."""

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
        """For the check that nothing is left behind: its memory was freed while nobody could see it."""
        self.die_at, self._dead = None, False

    def identify(self):
        self._check()
        return self._client.identify()

    def connect(self):
        self._check()
        return self.transport

    def beat(self, wanted):
        """As a remote shard does: what is not wanted is given back."""
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
            raise TransportError("nobody answers")


def test_tokens_equal_transformers_across_many_hand_offs(tiny, tiny_model, rig, submit):
    """600 tokens cross two block boundaries, so the tail is handed to the shards while decoding goes on."""
    cluster = rig(tiny_model, shards=3, memory_bytes=64 << 20)
    engine = cluster.start()
    first = submit(engine, "a", PROMPT, Sampling(max_tokens=600, temperature=0.0))
    result = first.result()
    assert isinstance(result, Finished) and result.reason is Reason.LENGTH
    assert first.tokens == greedy(tiny, PROMPT, 600)


def test_a_transport_error_in_the_middle_of_a_step_loses_nothing(tiny, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20, wrap=Flaky)
    cluster.clients["shard0"].break_at = {2, 8, 9, 20}
    cluster.clients["shard1"].break_at = {1, 15}
    engine = cluster.start()
    collected = [submit(engine, name, PROMPT, GREEDY) for name in "ab"]
    for it in collected:
        result = it.result()
        assert isinstance(result, Finished), result
        assert it.tokens == greedy(tiny, PROMPT, GREEDY.max_tokens)
        assert sum(result.attended_bytes.values()) == attended(tiny_model, len(PROMPT), GREEDY.max_tokens - 1)
    assert cluster.clients["shard0"].waits > 20 and cluster.clients["shard1"].waits > 15


def attended(model, prompt_tokens, steps):
    """Every decode step reads the whole prompt's KV once; the tail, under one block, is the engine's own."""
    config = model.config
    return steps * prompt_tokens * config.layers * config.kv_heads * 2 * config.head_dim * 4


def test_what_the_engine_counts_is_what_the_shards_attended_to(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=3, shard_by="head", memory_bytes=64 << 20)
    result = submit(cluster.start(), "a", PROMPT, GREEDY).result()
    by_shard = {w: cluster.clients[w].identify().attended_bytes for w in cluster.targets}
    assert result.attended_bytes == by_shard
    assert all(by_shard.values())


def test_a_dead_shard_fails_its_sequences_and_only_them(tiny, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, shard_by="range", memory_bytes=64 << 20, wrap=Flaky)
    engine = cluster.start()
    single = submit(engine, "single", PROMPT[:1], Sampling(max_tokens=200, temperature=0.0))
    single.events.get(timeout=60)
    (view,) = engine.views()
    victim = cluster.clients[next(worker for worker in cluster.targets if worker != view.spans[0][0])]
    victim.die_at = 10
    spread = submit(engine, "spread", PROMPT, Sampling(max_tokens=600, temperature=0.0))
    result = spread.result()
    assert isinstance(result, Failed) and isinstance(result.error, TransportError)
    assert 0 < len(spread.tokens) < 600
    result = single.result()
    assert isinstance(result, Finished), result
    assert single.tokens == greedy(tiny, PROMPT[:1], 200)[-len(single.tokens) :]
    victim.revive()
    cluster.settle()


def test_without_a_shard_the_others_take_what_comes(tiny, tiny_model, rig, submit):
    """Nobody who does not need the dead one fails, at whatever moment it dies."""
    cluster = rig(tiny_model, shards=3, shard_by="head", memory_bytes=64 << 20, wrap=Flaky)
    engine = cluster.start()
    victim = cluster.clients["shard1"]
    victim.die()
    for name in "ab":
        collected = submit(engine, name, PROMPT, GREEDY)
        assert isinstance(collected.result(), Finished)
        assert collected.tokens == greedy(tiny, PROMPT, GREEDY.max_tokens)
    assert not victim.store.announce()
    victim.revive()


def test_a_shard_that_dies_while_a_sequence_is_placed_is_left_out(tiny, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)

    def unreachable(*_, **__):
        raise TransportError("nobody answers")

    cluster.stores["shard0"].create = unreachable
    collected = submit(cluster.start(), "a", PROMPT, GREEDY)
    assert isinstance(collected.result(), Finished)
    del cluster.stores["shard0"].create
    assert collected.tokens == greedy(tiny, PROMPT, GREEDY.max_tokens)


def test_without_any_shard_a_request_says_so_and_later_ones_are_served(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20, wrap=Flaky)
    engine = cluster.start(limits=EngineLimits(shard_grace_s=0.3))
    cluster.clients["shard0"].die()
    result = submit(engine, "a", PROMPT, GREEDY).result()
    assert isinstance(result, Failed) and result.error.retryable
    assert "no attention worker answers: shard0" in str(result.error)
    cluster.clients["shard0"].revive()
    ends = (submit(engine, f"b{n}", PROMPT, GREEDY).result() for n in range(10_000))
    assert isinstance(next(end for end in ends if not isinstance(end, Failed)), Finished)


def test_a_request_waits_for_a_shard_that_may_answer_again(tiny, tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20, wrap=Flaky)
    engine = cluster.start(limits=EngineLimits(shard_grace_s=60.0))
    cluster.clients["shard0"].die()
    collected = submit(engine, "a", PROMPT, GREEDY)
    while not cluster.clients["shard0"].refused:
        assert collected.events.empty()
    cluster.clients["shard0"].revive()
    assert isinstance(collected.result(), Finished)
    assert collected.tokens == greedy(tiny, PROMPT, GREEDY.max_tokens)


@pytest.mark.parametrize("cancelled", [False, True])
def test_whoever_is_placed_holds_nobody_up(tiny_model, rig, submit, cancelled):
    """To touch new memory takes seconds; tokens of others come meanwhile."""
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    running = submit(engine, "a", PROMPT, Sampling(max_tokens=150, temperature=0.0))
    running.events.get(timeout=60)
    go_on = threading.Event()

    def slow(create):
        def call(*args, **options):
            assert go_on.wait(60)
            return create(*args, **options)

        return call

    for store in cluster.stores.values():
        store.create = slow(store.create)
    placed = submit(engine, "b", PROMPT, GREEDY)
    assert isinstance(running.result(), Finished)
    assert placed.events.empty()
    if cancelled:
        engine.cancel(SequenceId("b"))
    go_on.set()
    result = placed.result()
    assert isinstance(result, Finished)
    assert result.reason in ({Reason.CANCELLED} if cancelled else {Reason.LENGTH})
    for store in cluster.stores.values():
        del store.create


def test_cancel_frees_memory_and_says_so(tiny_model, rig, submit):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    endless = submit(engine, "a", PROMPT, Sampling(max_tokens=1900, temperature=0.0))
    endless.events.get(timeout=60)
    engine.cancel(SequenceId("a"))
    engine.cancel(SequenceId("nobody"))
    result = endless.result()
    assert isinstance(result, Finished) and result.reason is Reason.CANCELLED
    assert len(endless.tokens) < 1900
    cluster.check_empty()


def test_stop_tokens_end_a_sequence(tiny, tiny_model, rig, submit):
    expected = greedy(tiny, PROMPT, 12)
    stop = expected[4]
    sampling = Sampling(max_tokens=12, temperature=0.0, stop_token_ids=frozenset({stop}))
    collected = submit(rig(tiny_model, memory_bytes=64 << 20).start(), "a", PROMPT, sampling)
    assert collected.result().reason is Reason.STOP
    assert collected.tokens == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], GREEDY, "empty"),
        ([97], GREEDY, "not in the vocabulary"),
        ([1], Sampling(max_tokens=0), "at least 1"),
        ([1] * 2040, GREEDY, "2048 positions"),
    ],
)
def test_what_can_never_run_is_refused_at_once(tiny_model, rig, submit, prompt, sampling, match):
    engine = rig(tiny_model, memory_bytes=64 << 20).start()
    with pytest.raises(InvalidRequest, match=match):
        submit(engine, "a", prompt, sampling)


def test_a_prompt_larger_than_the_pool_is_refused_at_once(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=512 << 10)
    with pytest.raises(InvalidRequest, match="--kv-memory"):
        submit(cluster.start(), "a", [1] * 1500, GREEDY)


def test_requests_beyond_the_pool_wait_their_turn(tiny, tiny_model, rig, submit):
    """Room for about two sequences; six ask; all are served."""
    layout = rig(tiny_model).attention.layouts[0]
    cluster = rig(tiny_model, shards=1, memory_bytes=layout.block_bytes * 6)
    engine = cluster.start()
    prompts = [[n + 1] * 300 for n in range(6)]
    running = [submit(engine, f"s{n}", prompt, GREEDY) for n, prompt in enumerate(prompts)]
    for prompt, it in zip(prompts, running, strict=True):
        assert isinstance(it.result(), Finished)
        assert it.tokens == greedy(tiny, prompt, GREEDY.max_tokens)


@pytest.mark.parametrize("placement", [{"shards": 2}, {"shards": 3, "shard_by": "head"}, {"local": True}])
def test_sequences_beyond_memory_are_parked_and_end_as_they_would_alone(
    tiny, tiny_model, rig, submit, placement
):
    """Tails cross block boundaries and the shards are small: some sequence always has to wait."""
    block_bytes = rig(tiny_model).attention.layouts[0].block_bytes
    cluster = rig(tiny_model, memory_bytes=stride_bytes(block_bytes) * 7, **placement)
    if "local" not in placement:
        cluster.resize(4 * stride_bytes(block_bytes))
    engine = cluster.start()
    sizes = [(40, 300), (250, 280), (10, 260), (500, 20), (255, 270), (3, 520)]
    prompts = [[(7 * n + i) % 90 for i in range(length)] for n, (length, _) in enumerate(sizes)]
    running = [
        submit(engine, f"s{n}", prompt, Sampling(max_tokens=size[1]))
        for n, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]
    for prompt, it, size in zip(prompts, running, sizes, strict=True):
        assert isinstance(it.result(), Finished)
        assert it.tokens == greedy(tiny, prompt, size[1])
    assert engine.load().parkings > 0
    assert engine.load()[:3] == (0, 0, 0)


def test_a_parked_request_is_cancelled_like_any_other(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20)
    cluster.resize(3 * stride_bytes(cluster.attention.layouts[0].block_bytes))
    engine = cluster.start()
    it = submit(engine, "a", PROMPT, Sampling(max_tokens=1500, n=6, temperature=1.0))
    it.events.get(timeout=60)
    while engine.load().parked < 3:
        it.events.get(timeout=60)
    engine.cancel(SequenceId("a"))
    ends = [it.result() for _ in range(6)]
    assert {end.reason for end in ends} == {Reason.CANCELLED}
    assert engine.load()[:3] == (0, 0, 0)
    cluster.check_empty()


@pytest.mark.parametrize("names", [("a/1", "a"), ("a", "a/1"), ("", "/1"), ("a\n", "a\n/1")])
def test_no_id_collides_with_a_choice_of_another_request(tiny, tiny_model, rig, submit, names):
    engine = rig(tiny_model, memory_bytes=64 << 20).start()
    alone, several = (
        submit(engine, name, PROMPT, Sampling(max_tokens=30, n=n))
        for name, n in zip(names, (1, 2), strict=True)
    )
    bystander = submit(engine, "b", PROMPT, GREEDY)
    assert isinstance(alone.result(), Finished)
    several.results(2)
    assert isinstance(bystander.result(), Finished)
    expected = greedy(tiny, PROMPT, 30)
    assert alone.tokens == several.choices[0] == several.choices[1] == expected


def test_a_full_queue_and_a_known_id_are_refused(tiny_model, rig, submit):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.engine(limits=EngineLimits(waiting=1))
    submit(engine, "a", PROMPT, GREEDY)  # not started: it waits
    claimed = next(cluster.epochs)
    with pytest.raises(InvalidRequest, match="running already"):
        submit(engine, "a", PROMPT, GREEDY)
    with pytest.raises(Overloaded, match="waiting"):
        submit(engine, "b", PROMPT, GREEDY)
    assert next(cluster.epochs) == claimed + 1  # a refusal claims nothing that nobody would give back
    engine.start()
    engine.stop()


def test_seeded_sampling_repeats_and_depends_on_the_seed(tiny_model, rig, submit):
    engine = rig(tiny_model, memory_bytes=64 << 20).start()

    def run(name, seed):
        it = submit(engine, name, PROMPT, Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=seed))
        it.result()
        return it.tokens

    assert run("a", 7) == run("b", 7) != run("c", 8)


def test_a_sequence_shows_where_its_kv_is(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    it = submit(engine, "a", PROMPT * 13, Sampling(max_tokens=1400, temperature=0.0))
    it.events.get(timeout=60)
    (view,) = engine.views()
    assert view.tail_first == 585 or view.tail_first % 256 == 0
    assert [(first, last) for _, first, last, _, _ in view.spans][:2] == [(0, 256), (256, 585)]
    assert {worker for worker, *_ in view.spans[:2]} == {"shard0", "shard1"}
    engine.cancel(SequenceId("a"))
    it.result()


def test_the_arena_says_what_is_free():
    with pytest.raises(Full) as caught:
        Arena(1 << 20).allocate(2, 1 << 20)
    assert caught.value.free_bytes == 1 << 20


def test_an_unknown_span_is_not_found(tiny_model, rig):
    with pytest.raises(NotFound):
        rig(tiny_model).stores["shard0"].segments("shard0/99", 0, 1)


class Broken(Flaky):
    """A peer with a programming mistake in it."""

    def wait(self, sent, **options):
        raise RuntimeError("a mistake")


def test_a_mistake_in_a_step_fails_the_sequence_that_raises_alone(tiny, tiny_model, rig, submit):
    """Everything that reads from the broken shard raises, also alone; the engine goes on."""
    cluster = rig(tiny_model, memory_bytes=64 << 20, wrap=Broken)
    engine = cluster.start()
    for name in "ab":
        result = submit(engine, name, PROMPT, GREEDY).result()
        assert isinstance(result, Failed) and isinstance(result.error, Internal)
        assert "RuntimeError: a mistake" in str(result.error)
    assert not engine.failure
    one = submit(engine, "c", PROMPT, Sampling(max_tokens=1))
    assert isinstance(one.result(), Finished)


def test_an_engine_that_cannot_compute_says_so_first(tiny_model, rig, submit, monkeypatch):
    """A round fails, and so does the built-in probe: health is told before any request is."""
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    told = []
    engine = cluster.start(on_failed=lambda: told.append(engine.failure))
    running = submit(engine, "a", PROMPT, Sampling(max_tokens=1900))
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


def test_an_engine_survives_a_round_that_fails(tiny, tiny_model, rig, submit, monkeypatch):
    """The probe finds that it can still compute."""
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    rounds = engine._scheduler.round
    failures = iter([RuntimeError("a mistake"), RuntimeError("another")])

    def flaky():
        if (error := next(failures, None)) is not None:
            raise error
        return rounds()

    monkeypatch.setattr(engine._scheduler, "round", flaky)
    it = submit(engine, "a", PROMPT, GREEDY)
    assert isinstance(it.result(), Finished) and not engine.failure
    assert it.tokens == greedy(tiny, PROMPT, GREEDY.max_tokens)


def test_a_full_shard_does_not_keep_the_tail_from_another(tiny, tiny_model, rig, submit):
    """The worker that has least of the sequence refuses: the next one takes the tail's blocks."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    it = submit(engine, "a", PROMPT[:1], Sampling(max_tokens=900, temperature=0.0))
    it.events.get(timeout=60)
    (view,) = engine.views()
    other = next(worker for worker in cluster.targets if worker != view.spans[0][0])

    def refuse(*_, **__):
        raise Full("no room", free_bytes=0)

    cluster.stores[other].create = refuse
    result = it.result()
    del cluster.stores[other].create
    assert isinstance(result, Finished)
    assert it.tokens == greedy(tiny, PROMPT[:1], 900)[-len(it.tokens) :]
    assert result.attended_bytes[view.spans[0][0]] > 300 * attended(tiny_model, 256, 1)


@pytest.mark.parametrize("shard_by", ["range", "both"])
def test_a_long_answer_grows_into_few_spans(tiny_model, rig, submit, shard_by):
    """Of 1, 2, 4 and at most 8 blocks, and never more than the answer can need: a read each in a step."""
    cluster = rig(tiny_model, shards=3, shard_by=shard_by, memory_bytes=64 << 20)
    engine = cluster.start()
    sampling = Sampling(max_tokens=1000, temperature=0.0)
    seen = []
    it = submit(engine, "a", PROMPT, sampling)
    engine.submit(SequenceId("b"), PROMPT, sampling, lambda event: seen.append(engine.views()))
    assert isinstance(it.result(), Finished)
    local = submit(rig(tiny_model, local=True, memory_bytes=64 << 20).start(), "a", PROMPT, sampling)
    assert isinstance(local.result(), Finished)
    assert it.tokens == local.tokens
    views = [view for views in seen for view in views if view.id == "a"]
    grown = {span[1:3] for span in views[-1].spans if span[1] >= len(PROMPT)}
    assert sorted(grown)[:2] == [(45, 256), (256, 768)]
    assert len(grown) == 3 and max(grown)[0] == 768
    usage = sum(store.usage().granted_bytes for store in cluster.stores.values())
    assert usage < 2 * 2 * cluster.attention.layouts[0].block_bytes * 8
