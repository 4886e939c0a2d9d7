"""Two stores under any order of calls, against dictionaries of plain bytes.

The model keeps of each span what was written, token by token and layer by layer, who holds it and where its
mark is. After every step the stores' own books must add up and every sealed byte be the model's.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farshore.errors import Corrupt, Fenced, Full, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import Covered, SpanKey
from farshore.kvstore.store import forms, images, parity, transfer
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.kvstore.store.tail import Tail

LAYOUTS = [
    KVLayout(2, 2, 3, 1, 8, 6, KVFormat.BFLOAT16, block_tokens=4),
    KVLayout(2, 1, 1, 1, 70, 3, KVFormat.INT4, block_tokens=4),
]
PAGES = 24
MOST_TOKENS = 11
SEQUENCES = [SequenceId(name) for name in "abc"]
GROUP = SequenceId("parity")

layouts = st.sampled_from(LAYOUTS)
sequences = st.sampled_from(SEQUENCES)
counts = st.integers(1, MOST_TOKENS)
seeds = st.integers(0, 2**31)


@dataclass(eq=False)
class Model:
    """One span as it has to be. ``rows[layer][token]``: its bytes in K and V of all heads."""

    store: LocalStore
    span: SpanId
    key: SpanKey
    layout: KVLayout
    capacity: int
    rows: list[dict[int, bytes]]
    holders: set[SequenceId]
    sealed: int = 0
    covers: tuple[Covered, ...] = ()


@dataclass(eq=False)
class TailModel:
    tail: Tail
    start: int
    rows: list[dict[int, bytes]]
    end: int


class Group(NamedTuple):
    """Two spans that parity was taken of, and what the first of them held then."""

    parity: Model
    lost: Model
    other: Model
    rows: list[dict[int, bytes]]
    tokens: int


def random_rows(layout: KVLayout, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v as stored: any bytes are."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(0, 256, (heads, tokens, size), dtype=torch.uint8, generator=generator)
        for heads, size in zip((layout.k_heads, layout.v_heads), forms.stored_bytes(layout), strict=True)
    )


def by_token(k: torch.Tensor, v: torch.Tensor) -> list[bytes]:
    """The bytes of each token, K's heads then V's."""
    return [k[:, i].numpy().tobytes() + v[:, i].numpy().tobytes() for i in range(k.shape[1])]


class Stores(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.arenas = [Arena(PAGES * 4096, spare_bytes=2 * 4096) for _ in range(2)]
        self.stores = [
            LocalStore(worker=WorkerId(f"w{i}"), arena=arena) for i, arena in enumerate(self.arenas)
        ]
        self.models: list[Model] = []
        self.tails: list[TailModel] = []
        self.groups: list[Group] = []
        self.epochs = [dict.fromkeys([*SEQUENCES, GROUP], 1) for _ in range(2)]

    def epoch(self, store: LocalStore, sequence: SequenceId) -> Epoch:
        return Epoch(self.epochs[self.stores.index(store)][sequence])

    def free_pages(self, store: LocalStore) -> int:
        return self.arenas[self.stores.index(store)].free_bytes // 4096

    def other(self, store: LocalStore) -> LocalStore:
        return self.stores[1 - self.stores.index(store)]

    @property
    def live(self) -> list[Model]:
        return [it for it in self.models if it.holders]

    @property
    def sealed(self) -> list[Model]:
        return [it for it in self.live if it.sealed and not it.covers]

    @property
    def growing(self) -> list[Model]:
        """Those that their own sequence may still write."""
        return [it for it in self.live if it.key.sequence in it.holders and it.sealed < it.capacity]

    def keep(self, store, span, key, layout, capacity, rows, sealed=0, covers=()) -> Model:
        model = Model(store, span, key, layout, capacity, rows, {key.sequence}, sealed, covers)
        self.models.append(model)
        return model

    # Spans

    @rule(which=st.integers(0, 1), sequence=sequences, layout=layouts, capacity=counts)
    def create(self, which, sequence, layout, capacity):
        self.granted(which, sequence, layout, capacity)

    def granted(self, which, sequence, layout, capacity) -> Model | None:
        store = self.stores[which]
        key = SpanKey(sequence=sequence, layer_class=0, first=3, group0=0, group1=layout.groups)
        blocks, free = -(-capacity // layout.block_tokens), self.free_pages(store)
        try:
            span = store.create(
                key, capacity_tokens=capacity, layout=layout, epoch=self.epoch(store, sequence)
            )
        except Full as full:
            assert free < blocks and full.free_bytes == free * 4096
            return None
        assert blocks <= free
        return self.keep(store, span, key, layout, capacity, [{} for _ in range(layout.layers)])

    @rule(which=st.integers(0, 1), sequence=sequences, layout=layouts, capacity=counts, seed=seeds)
    def create_and_fill(self, which, sequence, layout, capacity, seed):
        """So that there is often something to export."""
        it = self.granted(which, sequence, layout, capacity)
        if it is not None:
            for layer in range(layout.layers):
                self.written(it, layer, 0, capacity, seed + layer)
            self.seal_at(it, capacity - capacity // 4)

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), layer=st.integers(0, 1), first=st.integers(0, MOST_TOKENS), seed=seeds)
    def write(self, data, layer, first, seed):
        it, tokens = data.draw(st.sampled_from(self.growing)), data.draw(counts)
        if it.sealed <= first <= first + tokens <= it.capacity:
            self.written(it, layer, first, tokens, seed)
            return
        with pytest.raises(InvalidRequest):
            self.written(it, layer, first, tokens, seed)

    def written(self, it, layer, first, tokens, seed):
        k, v = random_rows(it.layout, tokens, seed)
        sequence = it.key.sequence
        epoch = self.epoch(it.store, sequence)
        it.store.write(it.span, layer, first, k, v, sequence=sequence, epoch=epoch)
        it.rows[layer].update(enumerate(by_token(k, v), first))

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), tokens=st.integers(0, MOST_TOKENS))
    def seal(self, data, tokens):
        it = data.draw(st.sampled_from(self.growing))
        whole = all(token in rows for rows in it.rows for token in range(tokens))
        if whole and it.sealed <= tokens <= it.capacity:
            self.seal_at(it, tokens)
            return
        with pytest.raises(InvalidRequest):
            self.seal_at(it, tokens)

    def seal_at(self, it, tokens):
        sequence = it.key.sequence
        digest = it.store.seal(it.span, tokens, sequence=sequence, epoch=self.epoch(it.store, sequence))
        if tokens > it.sealed:
            assert digest == transfer.digest(it.store.pieces(it.span, it.sealed, tokens))
        it.sealed = tokens

    @precondition(lambda self: self.live)
    @rule(data=st.data(), sequence=sequences)
    def fork(self, data, sequence):
        it = data.draw(st.sampled_from(self.live))
        before = self.free_pages(it.store)
        it.store.hold([it.span], sequence=sequence, epoch=self.epoch(it.store, sequence))
        it.holders.add(sequence)
        assert self.free_pages(it.store) == before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data):
        it = data.draw(st.sampled_from(self.live))
        sequence = data.draw(st.sampled_from([*SEQUENCES, *sorted(it.holders)]))
        it.store.drop([it.span], sequence=sequence, epoch=self.epoch(it.store, sequence))
        it.holders.discard(sequence)

    @rule(which=st.integers(0, 1), sequence=sequences)
    def drop_sequence(self, which, sequence):
        store = self.stores[which]
        store.drop_sequence(sequence, epoch=self.epoch(store, sequence))
        for it in self.models:
            if it.store is store:
                it.holders.discard(sequence)

    @precondition(lambda self: len(self.live) < len(self.models))
    @rule(data=st.data(), seed=seeds)
    def what_nobody_holds_is_gone(self, data, seed):
        it = data.draw(st.sampled_from([it for it in self.models if not it.holders]))
        sequence = it.key.sequence
        epoch = self.epoch(it.store, sequence)
        for call in (
            lambda: it.store.read(it.span, 0, 0, 0, sequence=sequence),
            lambda: it.store.look_up(it.span, holder=sequence),
            lambda: it.store.export(it.span, 0, 1),
            lambda: it.store.hold([it.span], sequence=sequence, epoch=epoch),
            lambda: it.store.write(
                it.span, 0, 0, *random_rows(it.layout, 1, seed), sequence=sequence, epoch=epoch
            ),
        ):
            with pytest.raises(NotFound):
                call()

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), seed=seeds)
    def an_old_epoch_writes_nothing(self, data, seed):
        it = data.draw(st.sampled_from(self.growing))
        sequence, which = it.key.sequence, self.stores.index(it.store)
        old = self.epoch(it.store, sequence)
        self.epochs[which][sequence] += 1
        it.store.fence(sequence, self.epoch(it.store, sequence))
        for call in (
            lambda: it.store.write(
                it.span, 0, it.sealed, *random_rows(it.layout, 1, seed), sequence=sequence, epoch=old
            ),
            lambda: it.store.seal(it.span, it.sealed, sequence=sequence, epoch=old),
            lambda: it.store.create(it.key, capacity_tokens=1, layout=it.layout, epoch=old),
            lambda: it.store.hold([it.span], sequence=sequence, epoch=old),
        ):
            with pytest.raises(Fenced):
                call()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), stranger=sequences, seed=seeds)
    def another_sequence_neither_writes_nor_seals(self, data, stranger, seed):
        """Not even one that holds the span, in the newest epoch there is."""
        it = data.draw(st.sampled_from(self.live))
        if stranger == it.key.sequence:
            return
        epoch = self.epoch(it.store, stranger)
        for call in (
            lambda: it.store.write(
                it.span, 0, it.sealed, *random_rows(it.layout, 1, seed), sequence=stranger, epoch=epoch
            ),
            lambda: it.store.seal(it.span, it.sealed, sequence=stranger, epoch=epoch),
        ):
            with pytest.raises(InvalidRequest if stranger in it.holders else NotFound):
                call()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reader=sequences)
    def only_holders_read(self, data, reader):
        it = data.draw(st.sampled_from([it for it in self.live if not it.covers] or self.live))
        if it.covers:
            return
        if reader in it.holders:
            assert it.store.look_up(it.span, holder=reader) == (it.key, it.layout)
            assert it.store.read(it.span, 0, 0, it.sealed, sequence=reader)[0].shape[1] == it.sealed
            return
        with pytest.raises(NotFound):
            it.store.look_up(it.span, holder=reader)
        with pytest.raises(NotFound):
            it.store.read(it.span, 0, 0, it.sealed, sequence=reader)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), sequence=sequences)
    def drop_all_but_some(self, data, sequence):
        """What a complete beat does."""
        held = [it for it in self.live if sequence in it.holders]
        kept = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        for store in self.stores:
            keep = {it.span for it in kept if it.store is store}
            store.drop_sequence(sequence, epoch=self.epoch(store, sequence), keep=keep)
        for it in held:
            if it not in kept:
                it.holders.discard(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def reading_beyond_the_mark_is_refused(self, data):
        it = data.draw(st.sampled_from(self.live))
        reader = data.draw(st.sampled_from(sorted(it.holders)))
        for read in (
            lambda last: it.store.segments(it.span, 0, last),
            lambda last: it.store.read(it.span, 0, 0, last, sequence=reader),
            lambda last: it.store.export(it.span, 0, last),
        ):
            with pytest.raises(InvalidRequest):
                read(it.sealed + 1)

    # Export, import, parity

    @precondition(lambda self: self.sealed)
    @rule(data=st.data(), sequence=sequences)
    def export_and_import(self, data, sequence):
        it = data.draw(st.sampled_from(self.sealed))
        first = data.draw(st.integers(0, it.sealed - 1))
        last = data.draw(st.integers(first + 1, it.sealed))
        store = self.other(it.store)
        epoch = self.epoch(store, sequence)
        try:
            span = store.import_span(it.store.export(it.span, first, last), sequence=sequence, epoch=epoch)
        except Full:
            assert self.free_pages(store) < -(-(last - first) // it.layout.block_tokens)
            return
        rows = [{token - first: rows[token] for token in range(first, last)} for rows in it.rows]
        key = replace(it.key, sequence=sequence, first=it.key.first + first)
        self.keep(store, span, key, it.layout, last - first, rows, last - first)

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def a_flipped_bit_is_caught(self, data):
        it = data.draw(st.sampled_from(self.sealed))
        chunks = list(it.store.export(it.span, 0, it.sealed))
        at = data.draw(st.integers(0, len(chunks) - 1))
        where = data.draw(st.sampled_from(["header", "payload"]))
        damaged = bytearray(getattr(chunks[at], where))
        bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
        chunks[at] = replace(chunks[at], **{where: bytes(damaged)})
        store = self.other(it.store)
        with pytest.raises((Corrupt, Full), match=f"chunk {at}|do not fit"):
            store.import_span(chunks, sequence=SEQUENCES[0], epoch=self.epoch(store, SEQUENCES[0]))

    @precondition(lambda self: len(self.sealed) > 1)
    @rule(data=st.data(), which=st.integers(0, 1))
    def encode(self, data, which):
        lost = data.draw(st.sampled_from(self.sealed))
        others = [it for it in self.sealed if it is not lost and it.layout == lost.layout]
        if not others:
            return
        other = data.draw(st.sampled_from(others))
        store, tokens = self.stores[which], max(lost.sealed, other.sealed)
        sent = {
            it.span: parity.Member(
                transfer.verified(it.store.export(it.span, 0, it.sealed)), it.store.digest(it.span, it.sealed)
            )
            for it in (lost, other)
        }
        try:
            span = parity.encode(store, sent, sequence=GROUP, epoch=self.epoch(store, GROUP))
        except Full:
            assert self.free_pages(store) < -(-tokens // lost.layout.block_tokens)
            return
        (info,) = [info for info in store.announce() if info.span == span]
        nothing = bytes(lost.layout.layer_token_bytes)
        rows = [
            {t: xor(mine.get(t, nothing), theirs.get(t, nothing)) for t in range(tokens)}
            for mine, theirs in zip(sealed_rows(lost), sealed_rows(other), strict=True)
        ]
        it = self.keep(store, span, info.key, lost.layout, tokens, rows, tokens, info.covers)
        self.groups.append(Group(it, lost, other, sealed_rows(lost), lost.sealed))

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), sequence=sequences, which=st.integers(0, 1))
    def rebuild(self, data, sequence, which):
        """The first of the two, whether it is there or not; and gives the parity back."""
        group = data.draw(st.sampled_from(self.groups))
        self.groups.remove(group)
        it, lost, other = group.parity, group.lost, group.other
        store = self.stores[which]
        if other.holders:
            tokens = it.covers[1].tokens
            try:
                span = parity.rebuild(
                    store,
                    lost.span,
                    it.covers,
                    parity=it.store.pieces(it.span, 0, it.sealed),
                    survivors={other.span: other.store.pieces(other.span, 0, tokens)},
                    sequence=sequence,
                    epoch=self.epoch(store, sequence),
                )
            except Full:
                assert self.free_pages(store) < -(-group.tokens // it.layout.block_tokens)
            else:
                key = replace(lost.key, sequence=sequence)
                self.keep(store, span, key, it.layout, group.tokens, group.rows, group.tokens)
        it.store.drop([it.span], sequence=GROUP, epoch=self.epoch(it.store, GROUP))
        it.holders.discard(GROUP)

    # Tails

    @rule(start=st.integers(0, 5), layout=layouts)
    def tail(self, start, layout):
        tail = Tail(arena=self.arenas[0], layout=layout, start=start)
        self.tails.append(TailModel(tail, start, [{} for _ in range(layout.layers)], start))

    @precondition(lambda self: self.tails)
    @rule(data=st.data(), tokens=counts, seed=seeds)
    def append(self, data, tokens, seed):
        it = data.draw(st.sampled_from(self.tails))
        try:
            it.tail.reserve(it.end + tokens)
        except Full:
            return
        for layer in range(it.tail.layout.layers):
            k, v = random_rows(it.tail.layout, tokens, seed + layer)
            it.tail.append(layer, it.end, k, v)
            it.rows[layer].update(enumerate(by_token(k, v), it.end))
        it.end += tokens
        it.tail.advance(it.end)

    @precondition(lambda self: self.tails)
    @rule(data=st.data())
    def truncate(self, data):
        it = data.draw(st.sampled_from(self.tails))
        it.end = data.draw(st.integers(it.start, it.end))
        it.tail.truncate(it.end)

    @precondition(lambda self: self.tails)
    @rule(data=st.data())
    def fork_tail(self, data):
        it = data.draw(st.sampled_from(self.tails))
        try:
            copy = it.tail.fork()
        except Full:
            return
        self.tails.append(TailModel(copy, it.start, [dict(rows) for rows in it.rows], it.end))

    @precondition(lambda self: self.tails)
    @rule(data=st.data())
    def free_tail(self, data):
        it = data.draw(st.sampled_from(self.tails))
        it.tail.free()
        self.tails.remove(it)

    # What always holds

    @invariant()
    def books_add_up(self):
        for store, arena in zip(self.stores, self.arenas, strict=True):
            store.check_integrity()
            present = [it for it in self.live if it.store is store]
            announced = {info.span: info for info in store.announce()}
            assert announced.keys() == {it.span for it in present}
            for it in present:
                info = announced[it.span]
                assert (info.key, info.covers) == (it.key, it.covers)
                assert (info.sealed_tokens, info.capacity_tokens) == (it.sealed, it.capacity)
                assert info.holders == len(it.holders)
            usage = store.usage()
            tails = sum(it.tail.bytes for it in self.tails) if store is self.stores[0] else 0
            assert usage.granted_bytes == sum(info.bytes for info in announced.values())
            assert usage.granted_bytes + tails + usage.free_bytes == usage.budget_bytes
            assert usage.sealed_bytes == sum(it.sealed * it.layout.token_bytes for it in present)
            assert usage.budget_bytes - usage.free_bytes <= arena.committed_bytes
            assert arena.committed_bytes <= usage.budget_bytes - usage.free_bytes + 2 * 4096

    @invariant()
    def every_sealed_byte_is_the_models(self):
        for it in self.live:
            for layer, rows in enumerate(it.rows):
                expected = [rows[token] for token in range(it.sealed)]
                assert self.stored(it, layer) == expected
        for it in self.tails:
            assert it.tail.end == it.end
            for layer, rows in enumerate(it.rows):
                stored = by_token(*it.tail.read(layer, it.start, it.end, dtype=torch.uint8))
                assert stored == [rows[token] for token in range(it.start, it.end)]

    def stored(self, it: Model, layer: int) -> list[bytes]:
        if not it.covers:
            reader = min(it.holders)
            return by_token(*it.store.read(it.span, layer, 0, it.sealed, sequence=reader, dtype=torch.uint8))
        # Parity is read through its export alone; its blocks look like any others.
        found: list[bytes] = []
        for piece in it.store.pieces(it.span, 0, it.sealed):
            shape = images.part_layout(it.layout, piece.part)
            k, k_scales, v, v_scales = (f[layer] for f in images.fields(piece.image, shape))
            found += by_token(torch.cat((k, k_scales), -1), torch.cat((v, v_scales), -1))
        return found


def sealed_rows(it: Model) -> list[dict[int, bytes]]:
    return [{token: rows[token] for token in range(it.sealed)} for rows in it.rows]


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


Stores.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStores = Stores.TestCase
