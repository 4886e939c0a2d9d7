"""Writing, sealing and reading of spans: tokens that were written are read unchanged."""

import pytest
import torch

from farshore.errors import Full, InvalidRequest
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import ShardStore, SpanKey, Usage

E1, E2, E3 = Epoch(1), Epoch(2), Epoch(3)
S = SequenceId("s")


def key(sequence="s", *, first=0, group0=0, group1=2) -> SpanKey:
    return SpanKey(sequence=SequenceId(sequence), layer_class=0, first=first, group0=group0, group1=group1)


def fill(store, span, layout, k, v, *, first=0, epoch=E1):
    for layer in range(layout.layers):
        store.write(span, layer, first, k, v, sequence=S, epoch=epoch)


def fragment(arena):
    """Allocates every third page, so that a span needs several runs. Returns the allocated pages."""
    pages = [arena.allocate(1, 1)[0] for _ in range(arena.free_bytes // 4096)]
    arena.free(page for i, page in enumerate(pages) if i % 3 != 1)
    return [page for i, page in enumerate(pages) if i % 3 == 1]


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
    done = 0
    for n in steps:
        for layer in reversed(range(layout.layers)):
            k, v = data[layer]
            store.write(span, layer, done, k[:, done : done + n], v[:, done : done + n], sequence=S, epoch=E1)
        done += n
        store.seal(span, done, sequence=S, epoch=E1)

    for first, last in {(0, total), (total // 2, total), (total // 3, total // 2 + 1)}:
        segments = store.segments(span, first, last)
        assert segments.count.sum() == last - first
        if last - first > 15:
            assert (segments.size > 1) == fragmented
        for layer, (k, v) in enumerate(data):
            got_k, got_v = store.read(span, layer, first, last, sequence=S)
            assert torch.equal(got_k, k[:, first:last]) and torch.equal(got_v, v[:, first:last])
            seen_k, seen_v, positions = gather(store.memory, layout, segments, layer)
            assert torch.equal(seen_k, got_k) and torch.equal(seen_v, got_v)
            assert positions.tolist() == list(range(position + first, position + last))
    store.check_integrity()
    arena.free(others)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"format": KVFormat.INT4, "k_dim": 6}, "even number of tokens"),
        ({"v_in_k": True}, "inside K"),
        ({"v_in_k": True, "v_heads_per_group": 3, "v_dim": 9}, "inside K"),
    ],
)
def test_layouts_whose_scales_or_v_do_not_fit_are_refused(store, layout, changes, named):
    with pytest.raises(InvalidRequest, match=named):
        store.create(key(), capacity_tokens=1, layout=layout._replace(**changes), epoch=E1)
    assert store.announce() == [] and store.usage().granted_bytes == 0


def test_segments_name_the_groups_of_the_span(store, layout, tokens):
    narrow = layout.of_groups(1)
    span = store.create(key(group0=1, group1=2), capacity_tokens=7, layout=narrow, epoch=E1)
    fill(store, span, narrow, *tokens(narrow, 7))
    store.seal(span, 7, sequence=S, epoch=E1)
    segments = store.segments(span, 0, 7)
    assert (segments.group0.tolist(), segments.group1.tolist()) == ([1], [2])
    assert store.segments(span, 3, 3).size == 0


def test_reading_beyond_the_sealed_mark_is_refused(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    fill(store, span, layout, *tokens(layout, 9))
    store.seal(span, 6, sequence=S, epoch=E1)
    for first, last in [(0, 7), (-1, 3), (4, 3)]:
        with pytest.raises(InvalidRequest):
            store.segments(span, first, last)
        with pytest.raises(InvalidRequest):
            store.read(span, 0, first, last, sequence=S)
    with pytest.raises(InvalidRequest, match="layer 3"):
        store.read(span, 3, 0, 6, sequence=S)


def test_writing_below_the_mark_or_beyond_the_capacity_is_refused(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 6)
    fill(store, span, layout, k, v)
    store.seal(span, 6, sequence=S, epoch=E1)
    for first in (-1, 0, 5, 4, 9):
        with pytest.raises(InvalidRequest):
            store.write(span, 0, first, k, v, sequence=S, epoch=E1)
    assert torch.equal(store.read(span, 0, 0, 6, sequence=S)[0], k)


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
            store.write(span, layer, 0, bad_k, bad_v, sequence=S, epoch=E1)


def test_sealing_needs_every_layer_complete(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    k, v = tokens(layout, 3)
    fill(store, span, layout, k, v)
    fill(store, span, layout, k, v, first=6)
    with pytest.raises(InvalidRequest, match="gaps"):
        store.seal(span, 9, sequence=S, epoch=E1)
    for layer in (0, 2):
        store.write(span, layer, 3, k, v, sequence=S, epoch=E1)
    with pytest.raises(InvalidRequest, match="layer 1 has gaps"):
        store.seal(span, 9, sequence=S, epoch=E1)
    store.write(span, 1, 3, k, v, sequence=S, epoch=E1)
    store.seal(span, 9, sequence=S, epoch=E1)


def test_a_seal_is_idempotent_and_never_shrinks(store, layout, tokens):
    span = store.create(key(), capacity_tokens=9, layout=layout, epoch=E1)
    fill(store, span, layout, *tokens(layout, 9))
    first = store.seal(span, 4, sequence=S, epoch=E1)
    assert store.seal(span, 4, sequence=S, epoch=E1) == first
    second = store.seal(span, 9, sequence=S, epoch=E1)
    assert store.seal(span, 9, sequence=S, epoch=E1) == second != first
    for tokens_ in (4, 10, -1):
        with pytest.raises(InvalidRequest):
            store.seal(span, tokens_, sequence=S, epoch=E1)


def test_a_digest_is_of_the_content_wherever_it_lies(store, arena, layout, tokens):
    k, v = tokens(layout, 12)

    def digest(k, v):
        span = store.create(key(), capacity_tokens=12, layout=layout, epoch=E1)
        fill(store, span, layout, k, v)
        return store.seal(span, 12, sequence=S, epoch=E1)

    in_one_run = digest(k, v)
    fragment(arena)
    assert digest(k, v) == in_one_run
    changed = v.clone()
    changed[1, 11, 5] += 1
    assert digest(k, changed) != in_one_run


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


def test_announcement_and_usage(store, arena, layout, tokens):
    tail = arena.allocate(1, 1)
    span = store.create(key(first=40), capacity_tokens=12, layout=layout, epoch=E2)
    fill(store, span, layout, *tokens(layout, 5), epoch=E3)
    store.seal(span, 4, sequence=S, epoch=E3)
    (info,) = store.announce()
    assert info.span == span == SpanId(f"w1/{store.incarnation}/0")
    assert (info.key, info.sealed_tokens, info.capacity_tokens) == (key(first=40), 4, 12)
    assert (info.bytes, info.epoch, info.holders) == (3 * 4096, E2, 1)
    assert store.usage() == Usage(
        budget_bytes=64 * 4096,
        granted_bytes=3 * 4096,
        sealed_bytes=4 * layout.token_bytes,
        free_bytes=60 * 4096,
        cached_bytes=0,
        committed_bytes=2 * 4096,
    )
    arena.free(tail)
