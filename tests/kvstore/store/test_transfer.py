"""Exports: an import has exactly the exported bytes, or raises an error and keeps nothing."""

from dataclasses import replace

import pytest
import torch

from farshore.errors import Corrupt, Fenced, Full, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store import transfer
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import images
from farshore.kvstore.store.store import LocalStore

E1, E2 = Epoch(1), Epoch(2)
S, T = SequenceId("s"), SequenceId("t")


@pytest.fixture
def other():
    """Another worker's store."""
    store = LocalStore(worker=WorkerId("w2"), arena=Arena(64 * 4096))
    yield store
    store.check_integrity()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, layout):
    """Each block takes two chunks: one of two layers and one of one layer."""
    monkeypatch.setattr(images, "CHUNK_BYTES", 2 * layout.layer_bytes)


@pytest.fixture
def sent(store, layout, sealed):
    """The six chunks of 12 tokens in 5-token blocks."""
    return list(store.export(sealed(store, 12, layout, first=40), 0, 12))


def same(mine, theirs):
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("first, last", [(0, 13), (0, 5), (5, 10), (3, 13), (7, 8), (4, 6)])
def test_an_imported_span_has_the_bytes_that_were_exported(
    store, other, any_layout, sealed, content, first, last
):
    span = sealed(store, 13, any_layout, first=40, capacity_tokens=20)
    copy = other.import_span(store.export(span, first, last), sequence=T, epoch=E2)
    (info,) = other.announce()
    assert (info.span, info.sealed_tokens, info.capacity_tokens) == (copy, last - first, last - first)
    assert (info.key.sequence, info.key.first, info.epoch, info.holders) == (T, 40 + first, E2, 1)
    assert other.look_up(copy, holder=T).layout == any_layout
    assert same(content(other, copy, 0, last - first, sequence="t"), content(store, span, first, last))
    other.drop([copy], sequence=T, epoch=E2)
    assert other.usage().granted_bytes == 0


def test_a_digest_is_of_the_content_however_it_is_cut(store, layout, sealed, monkeypatch):
    span = sealed(store, 13, layout)
    digests = set()
    for size in (1, 2 * layout.layer_bytes, layout.block_bytes):
        monkeypatch.setattr(images, "CHUNK_BYTES", size)
        digests.add(transfer.digest(store.chunk_images(span, 2, 13)))
    assert len(digests) == 1
    assert (
        store.digest(span, 13) == transfer.digest(store.chunk_images(span, 0, 13)) != store.digest(span, 12)
    )
    assert store.digest(span, 12) == transfer.digest(store.chunk_images(span, 0, 12))
    with pytest.raises(InvalidRequest):
        store.digest(span, 14)
    assert transfer.digest(store.chunk_images(span, 2, 12)) not in digests


def test_a_header_comes_back_as_it_was_packed():
    for format in KVFormat:
        header = transfer.ExportHeader(
            key=transfer.SpanKey(
                sequence=SequenceId("größer/1"),
                layer_class=3,
                first=2**31 - 2,
                group0=2**15 - 2,
                group1=2**15 - 1,
            ),
            layout=KVLayout(80, 1, 3, 2, 192, 128, format, 256, v_in_k=True),
            tokens=9,
            parity=True,
        )
        chunk = images.ChunkRange(0, 9, 10, 12)
        packed = header.pack(chunk)
        assert transfer.ExportHeader.unpack(packed) == (header, chunk)
        for bad in (b"", packed[:50], b"FSX0" + packed[4:], packed + b"\xff"):
            with pytest.raises(ValueError):
                transfer.ExportHeader.unpack(bad)


def test_every_flipped_bit_is_caught_and_named(sent, other):
    chunk = sent[3]
    for field in ("header", "payload"):
        data = bytearray(getattr(chunk, field))
        for bit in range(0, 8 * len(data), 7):
            data[bit // 8] ^= 1 << bit % 8
            damaged = [*sent[:3], replace(chunk, **{field: bytes(data)}), *sent[4:]]
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(Corrupt, match=r"chunk 3 of .*'s'.* damaged"):
                other.import_span(damaged, sequence=T, epoch=E1)
    with pytest.raises(Corrupt, match="chunk 3"):
        damaged = [*sent[:3], replace(chunk, checksum=chunk.checksum ^ 1 << 63), *sent[4:]]
        other.import_span(damaged, sequence=T, epoch=E1)
    assert other.announce() == [] and other.usage().free_bytes == other.usage().budget_bytes


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda sent: [], "everything is missing"),
        (lambda sent: sent[:-1], "after chunk 4: tokens 10 to 12 in layers 2 to 3 is missing"),
        (lambda sent: sent[1:], "chunk 0 holds tokens 0 to 5 in layers 2 to 3; tokens 0 to 5 in"),
        (lambda sent: [*sent[:2], sent[3], sent[2], *sent[4:]], "chunk 2 of .* holds tokens 5 to 10 in"),
        (lambda sent: [sent[0], *sent], "chunk 1 of .* holds tokens 0 to 5 in layers 0 to 2; .* had to come"),
        (lambda sent: [*sent, sent[0]], "chunk 6 of .* holds tokens 0 to 5 in layers 0 to 2; nothing more"),
        (lambda sent: [*sent[:5], replace(sent[5], payload=sent[5].payload[:-1])], "chunk 5 of .* damaged"),
        (lambda sent: [resealed(sent[0], payload=sent[0].payload[:-1]), *sent[1:]], "chunk 0 has 1199 bytes"),
        (lambda sent: [resealed(sent[0], header=b"FSX1"), *sent[1:]], "chunk 0: a header of 4 bytes"),
    ],
)  # fmt: skip
def test_missing_repeated_reordered_and_resized_chunks_are_refused_and_named(sent, other, spoil, named):
    with pytest.raises(Corrupt, match=named):
        other.import_span(spoil(sent), sequence=T, epoch=E1)
    assert other.announce() == [] and other.usage().free_bytes == other.usage().budget_bytes


def resealed(chunk, **changes):
    """The chunk with other content and a valid checksum: a mistake of the sender, not of the transport."""
    chunk = replace(chunk, **changes)
    return replace(chunk, checksum=transfer._checksum(chunk.header, chunk.payload))


def test_chunks_of_two_exports_do_not_mix(store, other, layout, sealed, sent):
    other_key = list(store.export(sealed(store, 12, layout, first=41), 0, 12))
    other_length = list(store.export(sealed(store, 11, layout, first=40), 0, 11))
    for stranger in (other_key, other_length):
        with pytest.raises(Corrupt, match=r"chunk 2 of .* another export"):
            other.import_span([*sent[:2], *stranger[2:]], sequence=T, epoch=E1)
    assert other.announce() == []


def test_an_impossible_layout_is_refused_before_memory_is_granted(other, layout, sent):
    header, _ = transfer.ExportHeader.unpack(sent[0].header)
    for bad in (layout._replace(groups=3), layout._replace(v_in_k=True)):
        chunk = next(images.chunk_ranges(bad, 12))
        size = images.image_layout(bad, chunk).block_bytes
        packed = replace(header, layout=bad).pack(chunk)
        with pytest.raises(InvalidRequest):
            other.import_span([resealed(sent[0], header=packed, payload=bytes(size))], sequence=T, epoch=E1)
    assert other.announce() == []


def test_full_grants_nothing(sent, other, arena):
    big = other.import_span(sent, sequence=T, epoch=E1)
    while other.usage().free_bytes >= 3 * 4096:
        other.import_span(sent, sequence=T, epoch=E1)
    with pytest.raises(Full):
        other.import_span(sent, sequence=T, epoch=E1)
    assert all(info.sealed_tokens == 12 for info in other.announce())
    assert big in {info.span for info in other.announce()}


def test_an_import_is_unreadable_until_complete_and_a_broken_one_leaves_nothing(sent, other):
    def breaking():
        yield from sent[:4]
        (info,) = other.announce()
        assert info.sealed_tokens == 0
        with pytest.raises(InvalidRequest):
            other.read(info.span, 0, 0, 1, sequence=T)
        with pytest.raises(InvalidRequest):
            other.export(info.span, 0, 1)
        raise OSError("the line broke")

    with pytest.raises(OSError, match="line broke"):
        other.import_span(breaking(), sequence=T, epoch=E1)
    assert other.announce() == [] and other.usage().free_bytes == other.usage().budget_bytes


@pytest.mark.parametrize("end", ["fence", "drop"])
def test_an_owner_that_is_fenced_or_gives_up_writes_nothing_more(sent, other, end):
    def interrupted():
        yield from sent[:4]
        if end == "fence":
            other.fence(T, E2)
        else:
            other.drop_sequence(T, epoch=E1)
        yield from sent[4:]

    with pytest.raises(Fenced if end == "fence" else NotFound):
        other.import_span(interrupted(), sequence=T, epoch=E1)
    assert other.announce() == [] and other.usage().free_bytes == other.usage().budget_bytes


def test_only_sealed_tokens_are_exported(store, layout, sealed):
    span = sealed(store, 7, layout, capacity_tokens=10)
    for first, last in [(0, 8), (-1, 3), (5, 4), (3, 3)]:
        with pytest.raises(InvalidRequest):
            store.export(span, first, last)


def test_a_span_being_exported_outlives_its_last_holder(store, arena, layout, sealed):
    span = sealed(store, 12, layout)
    expected = list(store.export(span, 0, 12))
    chunks = store.export(span, 0, 12)
    assert next(chunks) == expected[0]
    store.drop([span], sequence=S, epoch=E1)
    assert arena.free_bytes < arena.budget_bytes
    assert list(chunks) == expected[1:]
    assert arena.free_bytes == arena.budget_bytes
    with pytest.raises(NotFound):
        store.export(span, 0, 12)


def test_a_closed_export_frees_its_span(store, arena, layout, sealed):
    chunks = store.export(sealed(store, 12, layout), 0, 12)
    next(chunks)
    store.drop_sequence(S, epoch=E1)
    chunks.close()
    assert arena.free_bytes == arena.budget_bytes


def test_a_chunk_is_no_larger_than_a_block_however_long_the_span(store, layout, sealed):
    chunks = list(store.export(sealed(store, 60, layout), 0, 60))
    assert len(chunks) == 12 * 2
    assert max(len(chunk.payload) for chunk in chunks) == 2 * layout.layer_bytes
