"""The rules of the store's state machine about exports, imports and parity, between two stores."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import precondition, rule

from farshore.errors import Corrupt, Full
from farshore.kvstore.store import parity, transfer

from .state_models import GROUP, SEQUENCES, ParityGroup, sealed_rows, sequences, xor


class ExportRules:
    """Mixin of ``Stores`` in ``test_state_machine.py``, which sets the attributes and has the other
    methods."""

    groups: list[ParityGroup]

    @precondition(lambda self: self.sealed)
    @rule(data=st.data(), sequence=sequences)
    def export_and_import(self, data, sequence):
        model = data.draw(st.sampled_from(self.sealed))
        first = data.draw(st.integers(0, model.sealed - 1))
        last = data.draw(st.integers(first + 1, model.sealed))
        store = self.other(model.store)
        epoch = self.epoch(store, sequence)
        try:
            span = store.import_span(
                model.store.export(model.span, first, last), sequence=sequence, epoch=epoch
            )
        except Full:
            assert self.free_pages(store) < -(-(last - first) // model.layout.block_tokens)
            return
        rows = [{token - first: rows[token] for token in range(first, last)} for rows in model.rows]
        key = replace(model.key, sequence=sequence, first=model.key.first + first)
        self.keep(store, span, key, model.layout, last - first, rows, last - first)

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def a_flipped_bit_is_caught(self, data):
        model = data.draw(st.sampled_from(self.sealed))
        chunks = list(model.store.export(model.span, 0, model.sealed))
        number = data.draw(st.integers(0, len(chunks) - 1))
        field = data.draw(st.sampled_from(["header", "payload"]))
        damaged = bytearray(getattr(chunks[number], field))
        bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
        chunks[number] = replace(chunks[number], **{field: bytes(damaged)})
        store = self.other(model.store)
        with pytest.raises((Corrupt, Full), match=f"chunk {number}|do not fit"):
            store.import_span(chunks, sequence=SEQUENCES[0], epoch=self.epoch(store, SEQUENCES[0]))

    @precondition(lambda self: len(self.sealed) > 1)
    @rule(data=st.data(), which=st.integers(0, 1))
    def encode(self, data, which):
        lost = data.draw(st.sampled_from(self.sealed))
        others = [model for model in self.sealed if model is not lost and model.layout == lost.layout]
        if not others:
            return
        other = data.draw(st.sampled_from(others))
        store, tokens = self.stores[which], max(lost.sealed, other.sealed)
        members = {}
        for model in (lost, other):
            chunks = model.store.export(model.span, 0, model.sealed)
            digest = model.store.digest(model.span, model.sealed)
            members[model.span] = parity.Member(transfer.verified_images(chunks), digest)
        try:
            span = parity.encode(store, members, sequence=GROUP, epoch=self.epoch(store, GROUP))
        except Full:
            assert self.free_pages(store) < -(-tokens // lost.layout.block_tokens)
            return
        (info,) = [info for info in store.announce() if info.span == span]
        nothing = bytes(lost.layout.layer_token_bytes)
        rows = [
            {token: xor(a.get(token, nothing), b.get(token, nothing)) for token in range(tokens)}
            for a, b in zip(sealed_rows(lost), sealed_rows(other), strict=True)
        ]
        model = self.keep(store, span, info.key, lost.layout, tokens, rows, tokens, info.covers)
        self.groups.append(ParityGroup(model, lost, other, sealed_rows(lost), lost.sealed))

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), sequence=sequences, which=st.integers(0, 1))
    def rebuild(self, data, sequence, which):
        """Rebuilds the first span of a group, whether it is still there or not, and drops the parity."""
        group = data.draw(st.sampled_from(self.groups))
        self.groups.remove(group)
        lost, other = group.lost, group.other
        store = self.stores[which]
        if other.holders:
            tokens = group.parity.covers[1].tokens
            try:
                span = parity.rebuild(
                    store,
                    lost.span,
                    group.parity.covers,
                    parity=group.parity.store.chunk_images(group.parity.span, 0, group.parity.sealed),
                    survivors={other.span: other.store.chunk_images(other.span, 0, tokens)},
                    sequence=sequence,
                    epoch=self.epoch(store, sequence),
                )
            except Full:
                assert self.free_pages(store) < -(-group.tokens // group.parity.layout.block_tokens)
            else:
                key = replace(lost.key, sequence=sequence)
                self.keep(store, span, key, group.parity.layout, group.tokens, group.rows, group.tokens)
        group.parity.store.drop(
            [group.parity.span], sequence=GROUP, epoch=self.epoch(group.parity.store, GROUP)
        )
        group.parity.holders.discard(GROUP)
