from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from farshore.errors import Fenced, Full, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore import blocks
from farshore.kvstore.arena import Arena
from farshore.kvstore.base import ShardStore, SpanKey, Usage
from farshore.kvstore.store import LocalStore

E1, E2, E3 = Epoch(1), Epoch(2), Epoch(3)


def key(sequence="s", *, first=0, group0=0, group1=2) -> SpanKey:
    return SpanKey(sequence=SequenceId(sequence), layer_class=0, first=first, group0=group0, group1=group1)


def fill(store, span, layout, k, v, *, first=0, epoch=E1):
    for layer in range(layout.layers):
        store.write(span, layer, first, k, v, epoch=epoch)


def fragment(arena):
    """Leaves free pages with holes between them, so that a span needs several runs."""
    pages = [arena.allocate(1, 1)[0] for _ in range(arena.budget_bytes // 4096)]
    arena.free(p for i, p in enumerate(pages) if i % 3 != 1)
    return [p for i, p in enumerate(pages) if i % 3 == 1]


def test_it_is_a_shard_store(store):
    def takes(store: ShardStore) -> ShardStore:
        return store

    assert takes(store).memory.dtype == torch.uint8


@pytest.mark.parametrize("fragmented", [False, True])
@pytest.mark.parametrize("steps", [[1], [4, 1, 7], [5, 5], [23], [2] * 11])
def test_what_was_written_is_read_byte_for_byte(store, arena, layout, tokens, gather, steps, fragmented):
    others = fragment(arena) if fragmented else []
    total, position = sum(steps), 1003
    span = store.create(key(first=position), capacity_tokens=total, layout=layout, epoch=E1)
    data = [tokens(layout, total) for _ in range(layout.layers)]
    at = 0
    for n in steps:
        for layer in reversed(range(layout.layers)):
            k, v = data[layer]
            store.write(span, layer, at, k[:, at : at + n], v[:, at : at + n], epoch=E1)
        at += n
        store.seal(span, at, epoch=E1)

    for first, last in {(0, total), (total // 2, total), (total // 3, total // 2 + 1)}:
        segments = store.segments(span, first, last)
        assert segments.count.sum() == last - first
        if last - first > 15:
            assert (segments.size > 1) == fragmented
        for layer, (k, v) in enumerate(data):
            got_k, got_v = store.read(span, layer, first, last)
            assert torch.equal(got_k, k[:, first:last]) and torch.equal(got_v, v[:, first:last])
            seen_k, seen_v, positions = gather(store.memory, layout, segments, layer)
            assert torch.equal(seen_k, got_k) and torch.equal(seen_v, got_v)
            assert positions.tolist() == list(range(position + first, position + last))
    store.check_integrity()
    arena.free(others)


def test_segments_name_the_groups_of_the_span(store, layout, tokens):
    narrow = layout.of_groups(1)
    span = store.create(key(group0=1, group1=2), capacity_tokens=7, layout=narrow, epoch=E1)
    fill(store, span, narrow, *tokens(narrow, 7))
    store.seal(span, 7, epoch=E1)
    segments = store.segments(span, 0, 7)
    assert (segments.group0.tolist(), segments.group1.tolist()) == ([1], [2])
    assert store.segments(span, 3, 3).size == 0


def test_reading_beyond_the_sealed_mark_is_refused(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    fill(store, span, layout, *tokens(layout, 9))
    store.seal(span, 6, epoch=E1)
    for first, last in [(0, 7), (-1, 3), (4, 3)]:
        with pytest.raises(InvalidRequest):
            store.segments(span, first, last)
        with pytest.raises(InvalidRequest):
            store.read(span, 0, first, last)
    with pytest.raises(InvalidRequest, match="layer 3"):
        store.read(span, 3, 0, 6)


def test_writing_below_the_mark_or_beyond_the_capacity_is_refused(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 6)
    fill(store, span, layout, k, v)
    store.seal(span, 6, epoch=E1)
    for first in (-1, 0, 5, 4, 9):
        with pytest.raises(InvalidRequest):
            store.write(span, 0, first, k, v, epoch=E1)
    assert torch.equal(store.read(span, 0, 0, 6)[0], k)


def test_tensors_that_do_not_fit_the_layout_are_refused(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 2)
    for layer, bad_k, bad_v in [
        (3, k, v),
        (-1, k, v),
        (0, k.float(), v),
        (0, k, v[:, :1]),
        (0, k[:3], v),
        (0, k[..., :7], v),
        (0, k[0], v),
    ]:
        with pytest.raises(InvalidRequest):
            store.write(span, layer, 0, bad_k, bad_v, epoch=E1)


def test_sealing_needs_every_layer_complete(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 3)
    fill(store, span, layout, k, v)
    fill(store, span, layout, k, v, first=6)
    with pytest.raises(InvalidRequest, match="gaps"):
        store.seal(span, 9, epoch=E1)
    for layer in (0, 2):
        store.write(span, layer, 3, k, v, epoch=E1)
    with pytest.raises(InvalidRequest, match="layer 1 has gaps"):
        store.seal(span, 9, epoch=E1)
    store.write(span, 1, 3, k, v, epoch=E1)
    store.seal(span, 9, epoch=E1)


def test_a_seal_is_idempotent_and_never_shrinks(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    fill(store, span, layout, *tokens(layout, 9))
    first = store.seal(span, 4, epoch=E1)
    assert store.seal(span, 4, epoch=E1) == first
    second = store.seal(span, 9, epoch=E1)
    assert store.seal(span, 9, epoch=E1) == second != first
    for tokens_ in (4, 10, -1):
        with pytest.raises(InvalidRequest):
            store.seal(span, tokens_, epoch=E1)


def test_a_digest_is_of_the_content_wherever_it_lies(store, arena, layout, tokens):
    k, v = tokens(layout, 12)

    def digest(k, v):
        span = store.create(key(), capacity_tokens=12, layout=layout, epoch=E1)
        fill(store, span, layout, k, v)
        return store.seal(span, 12, epoch=E1)

    whole = digest(k, v)
    fragment(arena)
    assert digest(k, v) == whole
    changed = v.clone()
    changed[1, 11, 5] += 1
    assert digest(k, changed) != whole


def test_older_epochs_write_nothing_after_a_fence(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 4)
    fill(store, span, layout, k, v)
    store.seal(span, 3, epoch=E1)
    store.fence(SequenceId("s"), E2)
    store.fence(SequenceId("s"), E1)  # never lowered
    with pytest.raises(Fenced):
        store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
    with pytest.raises(Fenced):
        store.write(span, 0, 4, k, v, epoch=E1)
    with pytest.raises(Fenced):
        store.seal(span, 4, epoch=E1)
    assert torch.equal(store.read(span, 0, 0, 3)[0], k[:, :3])
    store.seal(span, 4, epoch=E2)
    store.create(key("other"), capacity_tokens=1, layout=layout, epoch=E1)


def test_a_newer_writer_fences_the_older_one(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 4)
    store.write(span, 0, 0, k, v, epoch=E2)
    with pytest.raises(Fenced):
        store.write(span, 0, 0, k, v, epoch=E1)
    with pytest.raises(Fenced):
        store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)


def test_fences_are_bounded_but_spans_keep_theirs(arena, layout, tokens):
    store = LocalStore(worker=WorkerId("w"), arena=arena, fences=2)
    span = store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
    for sequence in ("s", "a", "b", "c"):
        store.fence(SequenceId(sequence), E2)
    for sequence in ("s", "b", "c"):
        with pytest.raises(Fenced):
            store.create(key(sequence), capacity_tokens=1, layout=layout, epoch=E1)
    with pytest.raises(Fenced):
        store.write(span, 0, 0, *tokens(layout, 1), epoch=E1)
    store.create(key("a"), capacity_tokens=1, layout=layout, epoch=E1)  # forgotten: the least recent


def test_full_says_what_is_left_and_takes_nothing(store, arena, layout):
    store.create(key(), capacity_tokens=5 * 60, layout=layout, epoch=E1)
    with pytest.raises(Full) as caught:
        store.create(key(), capacity_tokens=5 * 4 + 1, layout=layout, epoch=E1)
    assert caught.value.free_bytes == arena.free_bytes == 4 * 4096
    store.create(key(), capacity_tokens=5 * 4, layout=layout, epoch=E1)
    assert store.usage().free_bytes == 0


@pytest.mark.parametrize(
    "bad, tokens_",
    [
        (key(), 0),
        (key(first=-1), 1),
        (key(first=2**31 - 2), 2),
        (key(group0=-1, group1=1), 1),
        (key(group0=1, group1=1), 1),
        (key(group0=0, group1=1), 1),
        (key(group0=2**15 - 1, group1=2**15 + 1), 1),
    ],
)
def test_a_span_of_impossible_shape_is_refused(store, layout, bad, tokens_):
    with pytest.raises(InvalidRequest):
        store.create(bad, capacity_tokens=tokens_, layout=layout, epoch=E1)


def test_the_last_holder_frees(store, arena, layout):
    span = store.create(key(), capacity_tokens=12, layout=layout, epoch=E1)
    store.hold(span)
    assert store.announce()[0].holders == 2
    store.drop(span)
    assert arena.free_bytes == arena.budget_bytes - 3 * 4096
    store.drop(span)
    assert arena.free_bytes == arena.budget_bytes
    for call in (store.drop, store.hold, lambda s: store.segments(s, 0, 0), lambda s: store.read(s, 0, 0, 0)):
        with pytest.raises(NotFound):
            call(span)
    assert store.create(key(), capacity_tokens=12, layout=layout, epoch=E1) != span


def test_dropping_a_sequence_spares_newer_epochs_other_sequences_and_holders(store, layout):
    def create(sequence, epoch):
        return store.create(key(sequence), capacity_tokens=1, layout=layout, epoch=epoch)

    old, shared, newer, other = create("s", E1), create("s", E2), create("s", E3), create("t", E1)
    store.hold(shared)
    for _ in range(2):
        store.drop_sequence(SequenceId("s"), epoch=E2)
    assert {info.span for info in store.announce()} == {shared, newer, other}
    store.drop(shared)
    with pytest.raises(NotFound):
        store.segments(old, 0, 0)
    with pytest.raises(NotFound):
        store.segments(shared, 0, 0)


def test_memory_being_read_outlives_its_last_holder(store, arena, layout, tokens, monkeypatch):
    k, v = tokens(layout, 7)
    span = store.create(key(), capacity_tokens=7, layout=layout, epoch=E1)
    fill(store, span, layout, k, v)
    store.seal(span, 7, epoch=E1)
    copy_out = blocks.copy_out

    def dropped_meanwhile(*args, **kwargs):
        store.drop(span)
        store.check_integrity()
        assert arena.free_bytes < arena.budget_bytes
        return copy_out(*args, **kwargs)

    monkeypatch.setattr(blocks, "copy_out", dropped_meanwhile)
    assert torch.equal(store.read(span, 1, 0, 7)[0], k)
    assert arena.free_bytes == arena.budget_bytes


def test_announcement_and_usage(store, arena, layout, tokens):
    tail = arena.allocate(1, 1)
    span = store.create(key(first=40), capacity_tokens=12, layout=layout, epoch=E2)
    fill(store, span, layout, *tokens(layout, 5), epoch=E3)
    store.seal(span, 4, epoch=E3)
    (info,) = store.announce()
    assert info.span == span == SpanId("w1/0")
    assert (info.key, info.sealed_tokens, info.capacity_tokens) == (key(first=40), 4, 12)
    assert (info.bytes, info.epoch, info.holders) == (3 * 4096, E2, 1)
    assert store.usage() == Usage(
        budget_bytes=64 * 4096,
        granted_bytes=3 * 4096,
        sealed_bytes=4 * layout.token_bytes,
        free_bytes=60 * 4096,
    )
    arena.free(tail)


def test_concurrent_use_keeps_the_budget_and_the_data(arena, layout, tokens):
    store = LocalStore(worker=WorkerId("w"), arena=arena)
    data = [tokens(layout, 11) for _ in range(8)]
    barrier = Barrier(8)

    def work(i: int) -> tuple[int, int]:
        """Creates, fills and checks spans until refused; (granted, wrong)."""
        k, v = data[i]
        barrier.wait()
        granted = wrong = 0
        for _ in range(20):
            try:
                span = store.create(key(f"s{i}"), capacity_tokens=11, layout=layout, epoch=E1)
            except Full as full:
                assert full.free_bytes < 3 * 4096
                continue
            granted += 1
            fill(store, span, layout, k, v)
            store.seal(span, 11, epoch=E1)
            got_k, got_v = store.read(span, 2, 0, 11)
            wrong += not (torch.equal(got_k, k) and torch.equal(got_v, v))
            usage = store.usage()
            assert usage.granted_bytes <= usage.budget_bytes
            if granted % 2:
                store.drop(span)
        return granted, wrong

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert sum(granted for granted, _ in results) >= 21
    assert not any(wrong for _, wrong in results)
    store.check_integrity()


def test_concurrent_creates_never_exceed_the_budget(layout):
    arena = Arena(10 * 4096)
    store = LocalStore(worker=WorkerId("w"), arena=arena)
    barrier = Barrier(16)

    def create(i: int) -> SpanId | None:
        barrier.wait()
        try:
            return store.create(key(f"s{i}"), capacity_tokens=5, layout=layout, epoch=E1)
        except Full:
            return None

    with ThreadPoolExecutor(16) as pool:
        spans = [span for span in pool.map(create, range(16)) if span]
    assert len(spans) == len(set(spans)) == 10
    assert store.usage().granted_bytes == arena.budget_bytes
    store.check_integrity()
