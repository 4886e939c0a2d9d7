"""An engine's memory: waiting for it, parking, and the spans that tails grow into."""

from dataclasses import replace

import pytest

from farshore.errors import Full, InvalidRequest, NotFound
from farshore.ids import SequenceId
from farshore.kvstore.store.arena.arena import Arena, stride_bytes
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished

from ..hold.endless import ENDLESS, end
from ..hold.paused import unhurried

GREEDY = Sampling(max_tokens=12, temperature=0.0)
PROMPT = list(range(5, 50))


def test_an_arena_that_is_full_reports_its_free_bytes():
    with pytest.raises(Full) as caught:
        Arena(1 << 20).allocate(2, 1 << 20)
    assert caught.value.free_bytes == 1 << 20


def test_an_unknown_span_is_not_found(tiny_model, rig):
    with pytest.raises(NotFound):
        rig(tiny_model).stores["shard0"].segments("shard0/99", 0, 1)


def test_a_prompt_larger_than_the_pool_is_refused_at_once(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=512 << 10)
    with pytest.raises(InvalidRequest, match="--kv-memory"):
        submit(cluster.start(), "a", [1] * 1500, GREEDY)


def test_requests_beyond_the_pool_wait_and_are_served(greedy, tiny_model, rig, submit):
    """The pool has room for about two of the six sequences."""
    layout = rig(tiny_model).attention.layouts[0]
    cluster = rig(tiny_model, shards=1, memory_bytes=layout.block_bytes * 6)
    engine = cluster.start()
    prompts = [[n + 1] * 300 for n in range(6)]
    running = [submit(engine, f"s{n}", prompt, GREEDY) for n, prompt in enumerate(prompts)]
    for prompt, collected in zip(prompts, running, strict=True):
        assert isinstance(collected.result(), Finished)
        assert collected.tokens == greedy(prompt, GREEDY.max_tokens)


@pytest.mark.parametrize("placement", [{"shards": 2}, {"shards": 3, "shard_by": "head"}, {"local": True}])
def test_sequences_beyond_memory_are_parked_and_end_as_they_would_alone(
    greedy, tiny_model, rig, submit, placement
):
    """Tails cross block boundaries and the shards are small, so some sequence always has to wait."""
    block_bytes = rig(tiny_model).attention.layouts[0].block_bytes
    cluster = rig(tiny_model, memory_bytes=stride_bytes(block_bytes) * 7, **placement)
    if "local" not in placement:
        cluster.resize(4 * stride_bytes(block_bytes))
    engine = cluster.start()
    sizes = [(250, 280), (245, 290), (255, 270), (240, 300), (500, 20), (3, 260)]
    prompts = [[(7 * n + i) % 90 for i in range(length)] for n, (length, _) in enumerate(sizes)]
    running = [
        submit(engine, f"s{n}", prompt, Sampling(max_tokens=size[1]))
        for n, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]
    for prompt, collected, size in zip(prompts, running, sizes, strict=True):
        assert isinstance(collected.result(), Finished)
        assert collected.tokens == greedy(prompt, size[1])
    assert engine.load().parkings > 0
    assert engine.load()[:3] == (0, 0, 0)


def test_a_parked_request_is_cancelled_like_any_other(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20)
    cluster.resize(3 * stride_bytes(cluster.attention.layouts[0].block_bytes))
    engine = cluster.start()
    collected = submit(engine, "a", PROMPT, replace(ENDLESS, n=6, temperature=1.0))
    collected.events.get(timeout=60)
    while engine.load().parked < 3:
        collected.events.get(timeout=60)
    end(engine, "a", collected, choices=6)
    assert engine.load()[:3] == (0, 0, 0)
    cluster.check_empty()


def test_a_full_shard_does_not_keep_the_tail_from_another(greedy, tiny_model, rig, submit, attended_bytes):
    """The worker with the fewest tokens of the sequence refuses, so another one takes the tail's blocks."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    collected = submit(engine, "a", PROMPT[:1], Sampling(max_tokens=900, temperature=0.0), pause_at=[1])

    def refuse(*_, **__):
        raise Full("no room", free_bytes=0)

    with collected.paused:
        (view,) = engine.views()
        other = next(worker for worker in cluster.targets if worker != view.spans[0][0])
        cluster.stores[other].create = refuse
    result = collected.result()
    del cluster.stores[other].create
    assert isinstance(result, Finished)
    assert collected.tokens == greedy(PROMPT[:1], 900)
    assert result.attended_bytes[view.spans[0][0]] > 300 * attended_bytes(tiny_model, 256, 1)


@pytest.mark.parametrize("shard_by", ["range", "both"])
def test_a_long_answer_grows_into_few_spans(tiny_model, rig, submit, shard_by):
    """The prompt's block is filled first. Then spans of 1, 2, 4 and at most 8 blocks follow, never beyond the
    answer's bound: few reads per step."""
    cluster = rig(tiny_model, shards=3, shard_by=shard_by, memory_bytes=64 << 20)
    engine = cluster.start()
    unhurried(engine)
    sampling = Sampling(max_tokens=1000, temperature=0.0)
    seen = []
    collected = submit(engine, "a", PROMPT, sampling, pause_at=[1])
    with collected.paused:
        engine.submit(SequenceId("b"), PROMPT, sampling, lambda event: seen.append(engine.views()), epoch=1)
    assert isinstance(collected.result(), Finished)
    local = submit(rig(tiny_model, local=True, memory_bytes=64 << 20).start(), "a", PROMPT, sampling)
    assert isinstance(local.result(), Finished)
    assert collected.tokens == local.tokens
    views = [view for views in seen for view in views if view.id == "a"]
    spans = {span[1:3] for span in views[-1].spans}
    assert sorted(spans) == [(0, 256), (256, 512), (512, 1024)]
    usage = sum(store.usage().granted_bytes for store in cluster.stores.values())
    assert usage < 2 * 2 * cluster.attention.layouts[0].block_bytes * 8
