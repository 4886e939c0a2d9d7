"""Epochs and fences, holds, write permission, and concurrent calls."""

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from farshore.errors import Fenced, Full, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore.base import Removals, SpanKey
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import blocks
from farshore.kvstore.store.store import LocalStore

E1, E2, E3 = Epoch(1), Epoch(2), Epoch(3)
S = SequenceId("s")


def key(sequence="s", *, first=0, group0=0, group1=2) -> SpanKey:
    return SpanKey(sequence=SequenceId(sequence), layer_class=0, first=first, group0=group0, group1=group1)


def hold(store, span, sequence, epoch=E1):
    store.hold([span], sequence=SequenceId(sequence), epoch=epoch)


def drop(store, span, sequence="s", epoch=E1):
    store.drop([span], sequence=SequenceId(sequence), epoch=epoch)


def fill(store, span, layout, k, v, *, first=0, epoch=E1, sequence="s"):
    for layer in range(layout.layers):
        store.write(span, layer, first, k, v, sequence=SequenceId(sequence), epoch=epoch)


def test_older_epochs_write_nothing_after_a_fence(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 4)
    fill(store, span, layout, k, v)
    store.seal(span, 3, sequence=S, epoch=E1)
    store.fence(SequenceId("s"), E2)
    store.fence(SequenceId("s"), E1)  # never lowered
    with pytest.raises(Fenced):
        store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
    with pytest.raises(Fenced):
        store.write(span, 0, 4, k, v, sequence=S, epoch=E1)
    with pytest.raises(Fenced):
        store.seal(span, 4, sequence=S, epoch=E1)
    assert torch.equal(store.read(span, 0, 0, 3, sequence=S)[0], k[:, :3])
    store.seal(span, 4, sequence=S, epoch=E2)
    store.create(key("other"), capacity_tokens=1, layout=layout, epoch=E1)


def test_a_store_made_under_inference_mode_counts_in_any_thread(layout):
    with torch.inference_mode():
        store = LocalStore(worker=WorkerId("w"), arena=Arena(1 << 20))
        span = store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
        removals = Removals()
        store.watch(removals, [S])
    with ThreadPoolExecutor(1) as thread:
        thread.submit(drop, store, span).result()
    assert int(removals.count) and not store.announce()
    store.check_integrity()


def test_a_fence_that_comes_while_memory_is_granted_takes_it_back(store, arena, layout, monkeypatch):
    allocate = arena.allocate

    def fenced_meanwhile(*asked, **options):
        store.fence(SequenceId("s"), E2)
        return allocate(*asked, **options)

    monkeypatch.setattr(arena, "allocate", fenced_meanwhile)
    with pytest.raises(Fenced):
        store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
    assert store.announce() == [] and arena.free_bytes == arena.budget_bytes


def test_a_newer_writer_fences_the_older_one(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 4)
    store.write(span, 0, 0, k, v, sequence=S, epoch=E2)
    with pytest.raises(Fenced):
        store.write(span, 0, 0, k, v, sequence=S, epoch=E1)
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
        store.write(span, 0, 0, *tokens(layout, 1), sequence=S, epoch=E1)
    store.create(
        key("a"), capacity_tokens=1, layout=layout, epoch=E1
    )  # its fence, the least recent one, is forgotten


def test_the_last_holder_frees(store, arena, layout):
    span = store.create(key(), capacity_tokens=12, layout=layout, epoch=E1)
    for _ in range(2):  # holding twice is holding once
        hold(store, span, "child")
    assert store.announce()[0].holders == 2
    for _ in range(2):
        drop(store, span)
        drop(store, span, "stranger")
    assert store.announce()[0].holders == 1
    assert arena.free_bytes == arena.budget_bytes - 3 * 4096
    drop(store, span, "child")
    assert arena.free_bytes == arena.budget_bytes
    drop(store, span, "child")
    for call in (
        lambda: hold(store, span, "child"),
        lambda: store.segments(span, 0, 0),
        lambda: store.read(span, 0, 0, 0, sequence=S),
    ):
        with pytest.raises(NotFound):
            call()
    assert store.create(key(), capacity_tokens=12, layout=layout, epoch=E1) != span


def test_dropping_a_sequence_spares_newer_epochs_other_sequences_and_holders(store, layout):
    def create(sequence, epoch):
        return store.create(key(sequence), capacity_tokens=1, layout=layout, epoch=epoch)

    old, shared, newer, other = create("s", E1), create("s", E2), create("s", E3), create("t", E1)
    hold(store, shared, "t")
    for _ in range(2):
        store.drop_sequence(SequenceId("s"), epoch=E2)
    assert {info.span for info in store.announce()} == {shared, newer, other}
    store.drop_sequence(SequenceId("t"), epoch=E3)
    assert [info.span for info in store.announce()] == [newer]
    with pytest.raises(NotFound):
        store.segments(old, 0, 0)
    with pytest.raises(NotFound):
        store.segments(shared, 0, 0)


def test_an_older_epoch_cannot_give_back_the_hold_of_a_newer_one(store, layout):
    span = store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
    hold(store, span, "s", E2)
    drop(store, span, "s", E1)
    store.drop_sequence(SequenceId("s"), epoch=E1)
    with pytest.raises(Fenced):
        hold(store, span, "s", E1)
    assert store.announce()[0].holders == 1
    drop(store, span, "s", E2)
    assert store.announce() == []


def test_a_hold_of_many_is_all_or_nothing(store, layout):
    spans = [store.create(key(), capacity_tokens=1, layout=layout, epoch=E1) for _ in range(3)]
    with pytest.raises(NotFound):
        store.hold([*spans, SpanId("w1/else/99")], sequence=SequenceId("t"), epoch=E1)
    assert [info.holders for info in store.announce()] == [1, 1, 1]
    store.hold(spans, sequence=SequenceId("t"), epoch=E1)
    assert [info.holders for info in store.announce()] == [2, 2, 2]


def test_only_the_sequence_that_created_a_span_and_holds_it_writes(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 4)
    fill(store, span, layout, k, v)
    store.seal(span, 2, sequence=S, epoch=E1)
    hold(store, span, "child")
    drop(store, span)
    with pytest.raises(NotFound, match="or gave it back"):
        store.write(span, 0, 4, k, v, sequence=S, epoch=E1)
    with pytest.raises(NotFound, match="or gave it back"):
        store.seal(span, 4, sequence=S, epoch=E1)
    for other, error in (("child", InvalidRequest), ("stranger", NotFound)):
        with pytest.raises(error, match=f"was not granted to {other}|{other} does not hold"):
            store.write(span, 0, 4, k, v, sequence=SequenceId(other), epoch=E3)
        with pytest.raises(error, match=f"was not granted to {other}|{other} does not hold"):
            store.seal(span, 4, sequence=SequenceId(other), epoch=E3)
    assert torch.equal(store.read(span, 0, 0, 2, sequence=SequenceId("child"))[0], k[:, :2])
    for reader in ("s", "stranger"):
        with pytest.raises(NotFound, match="does not hold"):
            store.read(span, 0, 0, 2, sequence=SequenceId(reader))
        with pytest.raises(NotFound, match="does not hold"):
            store.look_up(span, holder=SequenceId(reader))
    assert store.look_up(span, holder=SequenceId("child")) == (key(), layout)


def test_a_refused_write_to_another_sequences_span_fences_no_sequence(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    hold(store, span, "child")
    for other, error in (("child", InvalidRequest), ("stranger", NotFound)):
        with pytest.raises(error):
            store.write(span, 0, 0, *tokens(layout, 1), sequence=SequenceId(other), epoch=E3)
        store.create(key(other), capacity_tokens=1, layout=layout, epoch=E2)
    store.write(span, 0, 0, *tokens(layout, 1), sequence=S, epoch=E1)


def test_two_stores_of_one_worker_never_share_an_id(layout):
    """A worker that restarts under its old id has another store."""
    stores = [LocalStore(worker=WorkerId("w"), arena=Arena(64 * 4096)) for _ in range(2)]
    spans = [
        {store.create(key(), capacity_tokens=1, layout=layout, epoch=E1) for _ in range(20)}
        for store in stores
    ]
    assert not spans[0] & spans[1] and all(len(ids) == 20 for ids in spans)
    assert stores[0].incarnation != stores[1].incarnation
    for call in (
        lambda span: stores[1].look_up(span, holder=S),
        lambda span: stores[1].hold([span], sequence=S, epoch=E1),
        lambda span: stores[1].read(span, 0, 0, 0, sequence=S),
    ):
        for span in spans[0]:
            with pytest.raises(NotFound):
                call(span)


def test_a_hold_given_back_is_counted_though_the_span_stays(store, layout):
    """A session that reads the count then looks up again whether its holders still hold their spans. What
    sequences give back that it does not read does not count: they may be another engine's."""
    span = store.create(key(), capacity_tokens=1, layout=layout, epoch=E1)
    hold(store, span, "child")
    removals, other = Removals(), Removals()
    store.watch(removals, [S])
    store.watch(other, [SequenceId("child")])
    drop(store, span, "stranger")
    assert int(removals.count) == 0
    drop(store, span)
    assert (int(removals.count), int(other.count)) == (1, 0) and store.announce()[0].holders == 1
    store.watch(removals, [SequenceId("child")])
    drop(store, span, "child")
    assert (int(removals.count), int(other.count)) == (2, 1) and not store.announce()


def test_a_watch_that_nobody_reads_any_more_is_forgotten(store, layout):
    store.watch(Removals(), [S])
    gc.collect()
    assert not store._holds._watches


def test_a_sequence_may_keep_some_of_what_it_gives_back(store, layout):
    spans = [store.create(key(), capacity_tokens=1, layout=layout, epoch=E1) for _ in range(3)]
    store.drop_sequence(S, epoch=E1, keep={spans[1], SpanId("w1/else/99")})
    assert [info.span for info in store.announce()] == [spans[1]]


def test_memory_being_read_outlives_its_last_holder(store, arena, layout, tokens, monkeypatch):
    k, v = tokens(layout, 7)
    span = store.create(key(), capacity_tokens=7, layout=layout, epoch=E1)
    fill(store, span, layout, k, v)
    store.seal(span, 7, sequence=S, epoch=E1)
    copy_out = blocks.copy_out

    def dropped_meanwhile(*args, **kwargs):
        drop(store, span)
        store.check_integrity()
        assert arena.free_bytes < arena.budget_bytes
        return copy_out(*args, **kwargs)

    monkeypatch.setattr(blocks, "copy_out", dropped_meanwhile)
    assert torch.equal(store.read(span, 1, 0, 7, sequence=S)[0], k)
    assert arena.free_bytes == arena.budget_bytes


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
            fill(store, span, layout, k, v, sequence=f"s{i}")
            store.seal(span, 11, sequence=SequenceId(f"s{i}"), epoch=E1)
            got_k, got_v = store.read(span, 2, 0, 11, sequence=SequenceId(f"s{i}"))
            wrong += not (torch.equal(got_k, k) and torch.equal(got_v, v))
            usage = store.usage()
            assert usage.granted_bytes <= usage.budget_bytes
            if granted % 2:
                drop(store, span, f"s{i}")
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
