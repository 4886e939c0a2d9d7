"""Parity: any one span of a group is rebuilt bit for bit, or an error is raised and nothing is kept."""

from dataclasses import replace

import pytest
import torch

from farshore.errors import Corrupt, Full, InvalidRequest
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store import parity, transfer
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import images
from farshore.kvstore.store.parity import Member
from farshore.kvstore.store.store import LocalStore

E1 = Epoch(1)
GROUP, BACK = SequenceId("parity of s"), SequenceId("s, rebuilt")


@pytest.fixture
def shards():
    """Four workers' stores, and a fifth for the parity."""
    stores = [LocalStore(worker=WorkerId(f"shard{i}"), arena=Arena(64 * 4096)) for i in range(5)]
    yield stores
    for store in stores:
        store.check_integrity()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, layout):
    monkeypatch.setattr(images, "CHUNK_BYTES", 2 * layout.layer_bytes)


@pytest.fixture
def grouped(shards, sealed):
    """grouped(layout, lengths) -> (the members' stores by span, the parity's SpanInfo)."""

    def make(layout, lengths):
        members = {sealed(s, n, layout, first=9): s for s, n in zip(shards, lengths, strict=False)}
        sent = {
            span: Member(transfer.verified_images(store.export(span, 0, n)), store.digest(span, n))
            for (span, store), n in zip(members.items(), lengths, strict=True)
        }
        span = parity.encode(shards[4], sent, sequence=GROUP, epoch=E1)
        (info,) = shards[4].announce()
        assert info.span == span
        return members, info

    return make


def images_of(members, info, *, lost):
    return {
        covered.span: members[covered.span].chunk_images(covered.span, 0, covered.tokens)
        for covered in info.covers
        if covered.span is not lost
    }


def rebuild(shards, members, info, lost, **changes):
    given = {
        "parity": shards[4].chunk_images(info.span, 0, info.sealed_tokens),
        "survivors": images_of(members, info, lost=lost),
    } | changes
    return parity.rebuild(shards[3], lost, info.covers, sequence=BACK, epoch=E1, **given)


@pytest.mark.parametrize("lengths", [(13, 13, 13), (3, 12, 7, 20), (10, 1)])
def test_any_one_span_is_rebuilt_bit_for_bit(copies, shards, any_layout, grouped, content, lengths):
    members, info = grouped(any_layout, lengths)
    for covered, tokens in zip(info.covers, lengths, strict=True):
        assert covered.tokens == tokens
        back = rebuild(shards, members, info, covered.span)
        rebuilt_bytes, lost_bytes = (
            content(store, span, 0, tokens, sequence=sequence)
            for store, span, sequence in ((shards[3], back, BACK), (members[covered.span], covered.span, "s"))
        )
        assert all(torch.equal(a, b) for a, b in zip(rebuilt_bytes, lost_bytes, strict=True))
        rebuilt = next(info for info in shards[3].announce() if info.span == back)
        assert rebuilt.key == replace(covered.key, sequence=BACK) and rebuilt.sealed_tokens == tokens
        shards[3].drop([back], sequence=BACK, epoch=E1)


def test_parity_is_granted_accounted_and_given_back_like_any_span(shards, layout, grouped):
    _, info = grouped(layout, (12, 7))
    assert info.key == SpanKey(sequence=GROUP, layer_class=0, first=0, group0=0, group1=2)
    assert (info.sealed_tokens, info.bytes, info.holders) == (12, 3 * 4096, 1)
    usage = shards[4].usage()
    assert (usage.granted_bytes, usage.sealed_bytes) == (3 * 4096, 12 * layout.token_bytes)
    shards[4].drop_sequence(GROUP, epoch=E1)
    assert shards[4].usage().free_bytes == usage.budget_bytes


def test_parity_is_not_read_as_tokens(shards, layout, grouped):
    _, info = grouped(layout, (12, 7))
    for read in (
        lambda: shards[4].segments(info.span, 0, 1),
        lambda: shards[4].read(info.span, 0, 0, 1, sequence=GROUP),
    ):
        with pytest.raises(InvalidRequest, match="parity of 2 spans"):
            read()


def test_parity_covers_what_was_sealed_and_later_tokens_change_nothing(shards, layout, sealed, tokens):
    spans = [sealed(store, 7, layout, capacity_tokens=14) for store in shards[:2]]
    sent = {
        span: Member(store.chunk_images(span, 0, 7), store.digest(span, 7))
        for span, store in zip(spans, shards, strict=False)
    }
    group = parity.encode(shards[4], sent, sequence=GROUP, epoch=E1)
    for layer in range(layout.layers):
        shards[1].write(spans[1], layer, 7, *tokens(layout, 7), sequence=SequenceId("s"), epoch=E1)
    shards[1].seal(spans[1], 14, sequence=SequenceId("s"), epoch=E1)
    (info,) = shards[4].announce()
    members = dict(zip(spans, shards, strict=False))
    rebuild(shards, members, info, spans[0])
    longer = {spans[1]: shards[1].chunk_images(spans[1], 0, 14)}
    with pytest.raises(InvalidRequest, match=f"14 tokens of {spans[1]}: the parity is of its first 7"):
        rebuild(shards, members, info, spans[0], survivors=longer)
    assert group == info.span


def test_a_group_needs_two_spans_of_one_layout(shards, layout, sealed):
    spans = [sealed(shards[0], 7, layout), sealed(shards[0], 7, layout._replace(k_dim=4))]
    for chosen, named in [(spans[:1], "1 spans: give 2"), (spans, "stored as")]:
        with pytest.raises(InvalidRequest, match=named):
            sent = {
                span: Member(shards[0].chunk_images(span, 0, 7), shards[0].digest(span, 7)) for span in chosen
            }
            parity.encode(shards[4], sent, sequence=GROUP, epoch=E1)
    assert shards[4].announce() == []


def test_every_other_span_is_needed(shards, layout, grouped):
    members, info = grouped(layout, (7, 7, 7))
    lost = info.covers[0].span
    survivors = images_of(members, info, lost=lost)
    some = dict(list(survivors.items())[:1])
    for given, target in [(some, lost), (survivors, SpanId("unknown/7"))]:
        with pytest.raises(InvalidRequest, match="give all others"):
            rebuild(shards, members, info, target, survivors=given)


def test_parity_that_does_not_fit_is_refused_and_takes_nothing(shards, layout, sealed):
    shards[4] = LocalStore(worker=WorkerId("small"), arena=Arena(2 * 4096))
    spans = [sealed(shards[0], 11, layout) for _ in range(2)]
    sent = {span: Member(shards[0].chunk_images(span, 0, 11), shards[0].digest(span, 11)) for span in spans}
    with pytest.raises(Full):
        parity.encode(shards[4], sent, sequence=GROUP, epoch=E1)
    assert shards[4].announce() == [] and shards[4].usage().free_bytes == 2 * 4096


def damage(store, span, offset):
    """Flips a bit of stored memory, before any chunk's checksum is computed from it."""
    store.memory[store.segments(span, 0, 1).base + offset] ^= 4


@pytest.mark.parametrize("offset", [0, 400, 1199])
def test_damage_in_memory_fails_a_rebuild_and_nothing_is_kept(shards, layout, grouped, offset):
    members, info = grouped(layout, (7, 7, 7))
    lost, other, _ = (covered.span for covered in info.covers)
    damage(members[other], other, offset)
    with pytest.raises(
        Corrupt, match=r"shard0/\w+/0, rebuilt out of parity and shard1/\w+/0, shard2/\w+/0, has the digest"
    ):
        rebuild(shards, members, info, lost)
    assert shards[3].announce() == [] and shards[3].usage().free_bytes == 64 * 4096


def test_a_damaged_chunk_leaves_no_parity(shards, layout, sealed):
    spans = [sealed(store, 7, layout) for store in shards[:2]]
    good, bad = (list(store.export(span, 0, 7)) for store, span in zip(shards, spans, strict=False))
    bad[2] = replace(bad[2], payload=bytes(len(bad[2].payload)))
    sent = {
        span: Member(transfer.verified_images(chunks), store.digest(span, 7))
        for span, store, chunks in zip(spans, shards, (good, bad), strict=False)
    }
    with pytest.raises(Corrupt, match="chunk 2"):
        parity.encode(shards[4], sent, sequence=GROUP, epoch=E1)
    assert shards[4].announce() == [] and shards[4].usage().free_bytes == 64 * 4096


def test_parity_itself_can_move(shards, layout, grouped):
    members, info = grouped(layout, (7, 12))
    sent = list(shards[4].export(info.span, 0, 12))
    with pytest.raises(InvalidRequest, match="parity=True, but 0 spans"):
        shards[2].import_span(sent, sequence=GROUP, epoch=E1)
    moved = shards[2].import_span(sent, sequence=GROUP, epoch=E1, covers=info.covers)
    back = rebuild(shards, members, info, info.covers[0].span, parity=shards[2].chunk_images(moved, 0, 12))
    assert shards[3].announce()[0].span == back
