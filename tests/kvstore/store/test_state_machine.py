"""Two stores under any order of calls, compared with dictionaries of plain bytes.

A model of each span keeps what was written, token by token and layer by layer, which sequences hold the span,
and where its sealed mark is. After every step the stores must be consistent and every sealed byte must equal
the model's. The rules about exports and tails are in modules of their own.
"""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farshore.errors import Fenced, Full, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store import transfer
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import images
from farshore.kvstore.store.store import LocalStore

from .export_rules import ExportRules
from .state_models import (
    GROUP,
    MOST_TOKENS,
    SEQUENCES,
    ParityGroup,
    SpanModel,
    TailModel,
    by_token,
    counts,
    layouts,
    random_rows,
    seeds,
    sequences,
)
from .tail_rules import TailRules

PAGES = 24


class Stores(ExportRules, TailRules, RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.arenas = [Arena(PAGES * 4096, spare_bytes=2 * 4096) for _ in range(2)]
        self.stores = [
            LocalStore(worker=WorkerId(f"w{i}"), arena=arena) for i, arena in enumerate(self.arenas)
        ]
        self.models: list[SpanModel] = []
        self.tails: list[TailModel] = []
        self.groups: list[ParityGroup] = []
        self.epochs = [dict.fromkeys([*SEQUENCES, GROUP], 1) for _ in range(2)]

    def epoch(self, store: LocalStore, sequence: SequenceId) -> Epoch:
        return Epoch(self.epochs[self.stores.index(store)][sequence])

    def free_pages(self, store: LocalStore) -> int:
        return self.arenas[self.stores.index(store)].free_bytes // 4096

    def other(self, store: LocalStore) -> LocalStore:
        return self.stores[1 - self.stores.index(store)]

    @property
    def live(self) -> list[SpanModel]:
        return [model for model in self.models if model.holders]

    @property
    def sealed(self) -> list[SpanModel]:
        return [model for model in self.live if model.sealed and not model.covers]

    @property
    def growing(self) -> list[SpanModel]:
        """The spans that their own sequence may still write."""
        return [
            model
            for model in self.live
            if model.key.sequence in model.holders and model.sealed < model.capacity
        ]

    def keep(self, store, span, key, layout, capacity, rows, sealed=0, covers=()) -> SpanModel:
        model = SpanModel(store, span, key, layout, capacity, rows, {key.sequence}, sealed, covers)
        self.models.append(model)
        return model

    @rule(which=st.integers(0, 1), sequence=sequences, layout=layouts, capacity=counts)
    def create(self, which, sequence, layout, capacity):
        self.granted(which, sequence, layout, capacity)

    def granted(self, which, sequence, layout, capacity) -> SpanModel | None:
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
        """Makes sure that exports often have sealed tokens."""
        model = self.granted(which, sequence, layout, capacity)
        if model is not None:
            for layer in range(layout.layers):
                self.written(model, layer, 0, capacity, seed + layer)
            self.seal_at(model, capacity - capacity // 4)

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), layer=st.integers(0, 1), first=st.integers(0, MOST_TOKENS), seed=seeds)
    def write(self, data, layer, first, seed):
        model, tokens = data.draw(st.sampled_from(self.growing)), data.draw(counts)
        if model.sealed <= first <= first + tokens <= model.capacity:
            self.written(model, layer, first, tokens, seed)
            return
        with pytest.raises(InvalidRequest):
            self.written(model, layer, first, tokens, seed)

    def written(self, model, layer, first, tokens, seed):
        k, v = random_rows(model.layout, tokens, seed)
        sequence = model.key.sequence
        epoch = self.epoch(model.store, sequence)
        model.store.write(model.span, layer, first, k, v, sequence=sequence, epoch=epoch)
        model.rows[layer].update(enumerate(by_token(k, v), first))

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), tokens=st.integers(0, MOST_TOKENS))
    def seal(self, data, tokens):
        model = data.draw(st.sampled_from(self.growing))
        whole = all(token in rows for rows in model.rows for token in range(tokens))
        if whole and model.sealed <= tokens <= model.capacity:
            self.seal_at(model, tokens)
            return
        with pytest.raises(InvalidRequest):
            self.seal_at(model, tokens)

    def seal_at(self, model, tokens):
        sequence = model.key.sequence
        digest = model.store.seal(
            model.span, tokens, sequence=sequence, epoch=self.epoch(model.store, sequence)
        )
        if tokens > model.sealed:
            assert digest == transfer.digest(model.store.chunk_images(model.span, model.sealed, tokens))
        model.sealed = tokens

    @precondition(lambda self: self.live)
    @rule(data=st.data(), sequence=sequences)
    def fork(self, data, sequence):
        model = data.draw(st.sampled_from(self.live))
        before = self.free_pages(model.store)
        model.store.hold([model.span], sequence=sequence, epoch=self.epoch(model.store, sequence))
        model.holders.add(sequence)
        assert self.free_pages(model.store) == before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data):
        model = data.draw(st.sampled_from(self.live))
        sequence = data.draw(st.sampled_from([*SEQUENCES, *sorted(model.holders)]))
        model.store.drop([model.span], sequence=sequence, epoch=self.epoch(model.store, sequence))
        model.holders.discard(sequence)

    @rule(which=st.integers(0, 1), sequence=sequences)
    def drop_sequence(self, which, sequence):
        store = self.stores[which]
        store.drop_sequence(sequence, epoch=self.epoch(store, sequence))
        for model in self.models:
            if model.store is store:
                model.holders.discard(sequence)

    @precondition(lambda self: len(self.live) < len(self.models))
    @rule(data=st.data(), seed=seeds)
    def a_span_without_holds_is_gone(self, data, seed):
        model = data.draw(st.sampled_from([model for model in self.models if not model.holders]))
        sequence = model.key.sequence
        epoch = self.epoch(model.store, sequence)
        for call in (
            lambda: model.store.read(model.span, 0, 0, 0, sequence=sequence),
            lambda: model.store.look_up(model.span, holder=sequence),
            lambda: model.store.export(model.span, 0, 1),
            lambda: model.store.hold([model.span], sequence=sequence, epoch=epoch),
            lambda: model.store.write(
                model.span, 0, 0, *random_rows(model.layout, 1, seed), sequence=sequence, epoch=epoch
            ),
        ):
            with pytest.raises(NotFound):
                call()

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), seed=seeds)
    def an_old_epoch_writes_nothing(self, data, seed):
        model = data.draw(st.sampled_from(self.growing))
        sequence, which = model.key.sequence, self.stores.index(model.store)
        old = self.epoch(model.store, sequence)
        self.epochs[which][sequence] += 1
        model.store.fence(sequence, self.epoch(model.store, sequence))
        for call in (
            lambda: model.store.write(
                model.span, 0, model.sealed, *random_rows(model.layout, 1, seed), sequence=sequence, epoch=old
            ),
            lambda: model.store.seal(model.span, model.sealed, sequence=sequence, epoch=old),
            lambda: model.store.create(model.key, capacity_tokens=1, layout=model.layout, epoch=old),
            lambda: model.store.hold([model.span], sequence=sequence, epoch=old),
        ):
            with pytest.raises(Fenced):
                call()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), stranger=sequences, seed=seeds)
    def another_sequence_neither_writes_nor_seals(self, data, stranger, seed):
        """Even if it holds the span, and in its newest epoch."""
        model = data.draw(st.sampled_from(self.live))
        if stranger == model.key.sequence:
            return
        epoch = self.epoch(model.store, stranger)
        for call in (
            lambda: model.store.write(
                model.span,
                0,
                model.sealed,
                *random_rows(model.layout, 1, seed),
                sequence=stranger,
                epoch=epoch,
            ),
            lambda: model.store.seal(model.span, model.sealed, sequence=stranger, epoch=epoch),
        ):
            with pytest.raises(InvalidRequest if stranger in model.holders else NotFound):
                call()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reader=sequences)
    def only_holders_read(self, data, reader):
        model = data.draw(st.sampled_from([model for model in self.live if not model.covers] or self.live))
        if model.covers:
            return
        if reader in model.holders:
            assert model.store.look_up(model.span, holder=reader) == (model.key, model.layout)
            assert (
                model.store.read(model.span, 0, 0, model.sealed, sequence=reader)[0].shape[1] == model.sealed
            )
            return
        with pytest.raises(NotFound):
            model.store.look_up(model.span, holder=reader)
        with pytest.raises(NotFound):
            model.store.read(model.span, 0, 0, model.sealed, sequence=reader)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), sequence=sequences)
    def drop_all_but_some(self, data, sequence):
        """Like a beat that lists all spans that the sequence still holds."""
        held = [model for model in self.live if sequence in model.holders]
        kept = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        for store in self.stores:
            keep = {model.span for model in kept if model.store is store}
            store.drop_sequence(sequence, epoch=self.epoch(store, sequence), keep=keep)
        for model in held:
            if model not in kept:
                model.holders.discard(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def reading_beyond_the_mark_is_refused(self, data):
        model = data.draw(st.sampled_from(self.live))
        reader = data.draw(st.sampled_from(sorted(model.holders)))
        for read in (
            lambda last: model.store.segments(model.span, 0, last),
            lambda last: model.store.read(model.span, 0, 0, last, sequence=reader),
            lambda last: model.store.export(model.span, 0, last),
        ):
            with pytest.raises(InvalidRequest):
                read(model.sealed + 1)

    @invariant()
    def the_stores_are_consistent(self):
        for store, arena in zip(self.stores, self.arenas, strict=True):
            store.check_integrity()
            present = [model for model in self.live if model.store is store]
            announced = {info.span: info for info in store.announce()}
            assert announced.keys() == {model.span for model in present}
            for model in present:
                info = announced[model.span]
                assert (info.key, info.covers) == (model.key, model.covers)
                assert (info.sealed_tokens, info.capacity_tokens) == (model.sealed, model.capacity)
                assert info.holders == len(model.holders)
            usage = store.usage()
            tails = sum(model.tail.bytes for model in self.tails) if store is self.stores[0] else 0
            assert usage.granted_bytes == sum(info.bytes for info in announced.values())
            assert usage.granted_bytes + tails + usage.free_bytes == usage.budget_bytes
            assert usage.sealed_bytes == sum(model.sealed * model.layout.token_bytes for model in present)
            assert arena.committed_bytes <= usage.budget_bytes - usage.free_bytes + 2 * 4096

    @invariant()
    def every_sealed_byte_is_the_models(self):
        for model in self.live:
            for layer, rows in enumerate(model.rows):
                expected = [rows[token] for token in range(model.sealed)]
                assert self.stored(model, layer) == expected
        for model in self.tails:
            assert model.tail.end == model.end
            for layer, rows in enumerate(model.rows):
                stored = by_token(*model.tail.read(layer, model.start, model.end, dtype=torch.uint8))
                assert stored == [rows[token] for token in range(model.start, model.end)]

    def stored(self, model: SpanModel, layer: int) -> list[bytes]:
        if not model.covers:
            reader = min(model.holders)
            return by_token(
                *model.store.read(model.span, layer, 0, model.sealed, sequence=reader, dtype=torch.uint8)
            )
        # Parity can only be read by an export. Its blocks have the same layout as any others.
        found: list[bytes] = []
        for _, chunk, image in model.store.chunk_images(model.span, 0, model.sealed):
            shape = images.image_layout(model.layout, chunk)
            k, k_scales, v, v_scales = (field[layer] for field in images.image_fields(image, shape))
            found += by_token(torch.cat((k, k_scales), -1), torch.cat((v, v_scales), -1))
        return found


Stores.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStores = Stores.TestCase
