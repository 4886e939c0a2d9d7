"""An engine's tokens, events, cancelling and refusals."""

import threading

import pytest

from farshore.errors import InvalidRequest, Overloaded
from farshore.ids import SequenceId
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Finished, Reason

from ..hold.endless import ENDLESS, end

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PROMPT = list(range(5, 50))


def test_tokens_equal_transformers_across_many_hand_offs(greedy, tiny_model, rig, submit):
    """600 tokens cross two block boundaries, so the tail is handed off during decoding."""
    cluster = rig(tiny_model, shards=3, memory_bytes=64 << 20)
    engine = cluster.start()
    first = submit(engine, "a", PROMPT, Sampling(max_tokens=600, temperature=0.0))
    result = first.result()
    assert isinstance(result, Finished) and result.reason is Reason.LENGTH
    assert first.tokens == greedy(PROMPT, 600)


def test_attended_bytes_equal_those_that_the_shards_count(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=3, shard_by="head", memory_bytes=64 << 20)
    result = submit(cluster.start(), "a", PROMPT, GREEDY).result()
    by_shard = {w: cluster.clients[w].identify().attended_bytes for w in cluster.targets}
    assert result.attended_bytes == by_shard
    assert all(by_shard.values())


@pytest.mark.parametrize("cancelled", [False, True])
def test_placing_a_sequence_does_not_delay_others(tiny_model, rig, submit, cancelled):
    """First touches of memory take seconds; other sequences get tokens meanwhile."""
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    running = submit(engine, "a", PROMPT, Sampling(max_tokens=150, temperature=0.0))
    running.events.get(timeout=60)  # It is placed.
    may_create = threading.Event()

    def slow(create):
        def call(*args, **options):
            assert may_create.wait(60)
            return create(*args, **options)

        return call

    for store in cluster.stores.values():
        store.create = slow(store.create)
    placed = submit(engine, "b", PROMPT, GREEDY)
    assert isinstance(running.result(), Finished)
    assert placed.events.empty()
    if cancelled:
        engine.cancel(SequenceId("b"))
    may_create.set()
    result = placed.result()
    assert isinstance(result, Finished)
    assert result.reason in ({Reason.CANCELLED} if cancelled else {Reason.LENGTH})
    for store in cluster.stores.values():
        del store.create


def test_cancel_frees_memory_and_reports_it(tiny_model, rig, submit):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.start()
    endless = submit(engine, "a", PROMPT, ENDLESS)
    endless.events.get(timeout=60)
    engine.cancel(SequenceId("unknown"))
    end(engine, "a", endless)
    assert len(endless.tokens) < ENDLESS.max_tokens
    cluster.check_empty()


def test_stop_tokens_end_a_sequence(greedy, tiny_model, rig, submit):
    expected = greedy(PROMPT, 12)
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
        ([1] * 8184, GREEDY, "8192 positions"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_once(tiny_model, rig, submit, prompt, sampling, match):
    engine = rig(tiny_model, memory_bytes=64 << 20).start()
    with pytest.raises(InvalidRequest, match=match):
        submit(engine, "a", prompt, sampling)


@pytest.mark.parametrize("names", [("a/1", "a"), ("a", "a/1"), ("", "/1"), ("a\n", "a\n/1")])
def test_no_id_collides_with_a_choice_of_another_request(greedy, tiny_model, rig, submit, names):
    engine = rig(tiny_model, memory_bytes=64 << 20).start()
    alone, several = (
        submit(engine, name, PROMPT, Sampling(max_tokens=30, n=n))
        for name, n in zip(names, (1, 2), strict=True)
    )
    bystander = submit(engine, "b", PROMPT, GREEDY)
    assert isinstance(alone.result(), Finished)
    several.results(2)
    assert isinstance(bystander.result(), Finished)
    expected = greedy(PROMPT, 30)
    assert alone.tokens == several.choices[0] == several.choices[1] == expected


def test_a_full_queue_and_a_known_id_are_refused(tiny_model, rig, submit):
    cluster = rig(tiny_model, memory_bytes=64 << 20)
    engine = cluster.engine(limits=EngineLimits(waiting=1))
    submit(engine, "a", PROMPT, GREEDY)  # The engine is not started, so the request waits.
    with pytest.raises(InvalidRequest, match="running already"):
        submit(engine, "a", PROMPT, GREEDY)
    with pytest.raises(Overloaded, match="waiting"):
        submit(engine, "b", PROMPT, GREEDY)
    engine.start()
    engine.stop()


def test_seeded_sampling_repeats_and_depends_on_the_seed(tiny_model, rig, submit):
    engine = rig(tiny_model, memory_bytes=64 << 20).start()

    def run(name, seed):
        collected = submit(
            engine, name, PROMPT, Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=seed)
        )
        collected.result()
        return collected.tokens

    assert run("a", 7) == run("b", 7) != run("c", 8)


def test_a_sequence_shows_where_its_kv_is(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    collected = submit(engine, "a", PROMPT * 13, ENDLESS, pause_at=[1])
    with collected.paused:
        (view,) = engine.views()
    assert view.tail_first == 585
    assert [(span.first, span.last) for span in view.spans] == [(0, 256), (256, 585)]
    assert {worker for worker, *_ in view.spans} == {"shard0", "shard1"}
    end(engine, "a", collected)
