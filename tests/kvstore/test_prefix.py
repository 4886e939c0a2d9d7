"""Prefixes: sealed blocks are found by their tokens, held by their finders, and never confused with
others."""

import pytest
import torch

from farshore.errors import Full, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.kvstore.base import SpanKey
from farshore.kvstore.prefix import PrefixBlock, chain

E1, E2 = Epoch(1), Epoch(2)
BLOCK = 5
"""Tokens in a block of these tests. A store takes blocks of any size; only ``chain`` makes them of 256."""


def blocks(tokens, *, fingerprint=b"model"):
    """A chain of short blocks, in which every name depends on all tokens before it."""
    cuts = range(0, len(tokens) - BLOCK + 1, BLOCK)
    contents = [tuple(tokens[first : first + BLOCK]) for first in cuts]
    names = [repr((fingerprint, contents[: i + 1])).encode() for i in range(len(contents))]
    return [
        PrefixBlock(name, content, first) for name, content, first in zip(names, contents, cuts, strict=True)
    ]


class Writer:
    """Writes random KV of prompts to a store, and finds it."""

    def __init__(self, store, layout, tokens):
        self.store, self.layout, self.tokens = store, layout, tokens

    def span(self, sequence, prompt, first, last, *, group0=0, group1=2, named=None):
        """A sealed span with positions [first, last). Its blocks have the names of the prompt's chain."""
        layout = self.layout.of_groups(group1 - group0)
        key = SpanKey(sequence=SequenceId(sequence), layer_class=0, first=first, group0=group0, group1=group1)
        span = self.store.create(key, capacity_tokens=last - first, layout=layout, epoch=E1)
        for layer in range(layout.layers):
            self.store.write(
                span, layer, 0, *self.tokens(layout, last - first), sequence=key.sequence, epoch=E1
            )
        named = blocks(prompt) if named is None else named
        self.store.seal(span, last - first, sequence=key.sequence, epoch=E1, blocks=named)
        return span

    def find(self, prompt, *, sequence="finder", layer_class=0, epoch=E1, **fingerprint):
        found = self.store.hold_prefix(
            blocks(prompt, **fingerprint),
            layer_class=layer_class,
            sequence=SequenceId(sequence),
            epoch=epoch,
        ).slices
        return [(match.span, match.first, match.last) for match in found]

    def end(self, sequence, epoch=E1):
        self.store.drop_sequence(SequenceId(sequence), epoch=epoch)

    def holders(self):
        return {info.span: info.holders for info in self.store.announce()}


@pytest.fixture
def writer(store, layout, tokens):
    return Writer(store, layout, tokens)


# -- the chain ---------------------------------------------------------------------------------------------


def test_a_chain_names_whole_blocks_by_everything_before_them():
    tokens = list(range(3 * BLOCK_TOKENS + 7))
    named = chain(tokens, fingerprint=b"m")
    assert [(b.first, b.last, len(b.hash)) for b in named] == [(i * 256, i * 256 + 256, 32) for i in range(3)]
    assert [t for b in named for t in b.tokens] == tokens[: 3 * BLOCK_TOKENS]
    assert chain(tokens[:-8], fingerprint=b"m") == named[:2]
    assert chain(tokens[:255], fingerprint=b"m") == []
    other = {b.hash for b in chain(tokens, fingerprint=b"n")}
    changed = chain([7, *tokens[1:]], fingerprint=b"m")
    assert not other & {b.hash for b in named}
    assert changed[1].tokens == named[1].tokens and changed[1].hash != named[1].hash
    assert len({b.hash for b in chain([3] * 1024, fingerprint=b"m")}) == 4


@pytest.mark.parametrize("token", [-1, 2**32, 0.5])
def test_a_token_id_out_of_range_has_no_chain(token):
    with pytest.raises(InvalidRequest, match="token ids"):
        chain([token] * BLOCK_TOKENS, fingerprint=b"")


# -- finding -----------------------------------------------------------------------------------------------


def test_named_blocks_are_found_and_read(store, layout, writer):
    prompt = list(range(23))
    span = writer.span("a", prompt, 0, 23)
    (found,) = store.hold_prefix(
        blocks([*prompt[:12], 99, *prompt]), layer_class=0, sequence=SequenceId("b"), epoch=E1
    ).slices
    assert (found.span, found.first, found.last, found.layout) == (span, 0, 10, layout)
    assert found.key.sequence == "a"
    assert store.read(span, 0, 0, 10, sequence=SequenceId("b"))[0].shape[1] == 10


def test_other_tokens_another_model_or_another_class_are_misses(writer):
    prompt = list(range(20))
    span = writer.span("a", prompt, 0, 20)
    assert writer.find([*prompt[:4], 99, *prompt[5:]]) == []
    assert writer.find(prompt, fingerprint=b"tenant") == []
    assert writer.find(prompt, layer_class=1) == []
    assert writer.find([]) == []
    assert writer.holders() == {span: 1}


def test_a_name_with_other_tokens_ends_the_search(store, writer):
    """As after a hash collision: the following names are computed from tokens that are not the finder's."""
    a, b = list(range(20)), list(range(100, 120))
    span = writer.span("a", a, 0, 20)
    pairs = zip(blocks(a), blocks(b), strict=True)
    forged = [PrefixBlock(mine.hash, other.tokens, mine.first) for mine, other in pairs]
    mixed = [blocks(a)[0], forged[1], *blocks(a)[2:]]
    found = store.hold_prefix(mixed, layer_class=0, sequence=SequenceId("b"), epoch=E1).slices
    assert [(match.span, match.first, match.last) for match in found] == [(span, 0, 5)]
    shifted = [block._replace(first=block.first + BLOCK) for block in blocks(a)]
    assert store.hold_prefix(shifted, layer_class=0, sequence=SequenceId("c"), epoch=E1).slices == []
    # A span with the same names and other tokens does not take the names over.
    writer.span("b", b, 0, 20, named=forged)
    assert writer.find(a) == [(span, 0, 20)]
    store.check_integrity()


def test_a_block_has_one_name_in_a_span(store, writer):
    """Otherwise names would take unbounded memory: a caller can give the same tokens any number of hashes."""
    prompt = list(range(20))
    span = writer.span("a", prompt, 0, 20)
    again = blocks(prompt)
    store.seal(span, 20, sequence=SequenceId("a"), epoch=E1, blocks=again)
    for i in range(3):
        other = [block._replace(hash=bytes([i]) * 32) for block in again]
        with pytest.raises(InvalidRequest, match="has another name already"):
            store.seal(span, 20, sequence=SequenceId("a"), epoch=E1, blocks=other)
        assert store.hold_prefix(other, layer_class=0, sequence=SequenceId("b"), epoch=E1).slices == []
    assert writer.find(prompt) == [(span, 0, 20)]
    store.check_integrity()


def test_only_blocks_wholly_sealed_inside_the_span_are_named(store, layout, tokens, writer):
    prompt = list(range(40))
    key = SpanKey(sequence=SequenceId("a"), layer_class=0, first=7, group0=0, group1=2)
    span = store.create(key, capacity_tokens=27, layout=layout, epoch=E1)
    for layer in range(layout.layers):
        store.write(span, layer, 0, *tokens(layout, 27), sequence=key.sequence, epoch=E1)
    store.seal(span, 12, sequence=key.sequence, epoch=E1, blocks=blocks(prompt))
    assert writer.find(prompt) == [(span, 10, 15)]
    for _ in range(2):
        store.seal(span, 24, sequence=key.sequence, epoch=E1, blocks=blocks(prompt)[3:])
        assert writer.find(prompt) == [(span, 10, 30)]
    store.check_integrity()


def test_a_store_answers_for_what_it_holds_gaps_and_head_groups_included(writer):
    prompt = list(range(40))
    left = writer.span("a", prompt, 0, 10, group0=0, group1=1)
    right = writer.span("a", prompt, 0, 15, group0=1, group1=2)
    later = writer.span("b", prompt, 30, 40)
    assert sorted(writer.find(prompt)) == [(left, 0, 10), (right, 0, 15), (later, 30, 40)]


def test_of_two_copies_one_is_found_and_one_is_kept(store, writer):
    prompt = list(range(30))
    short, long = writer.span("a", prompt, 0, 20), writer.span("b", prompt, 0, 30)
    assert writer.find(prompt) == [(short, 0, 20), (long, 20, 30)]
    writer.end("finder")
    writer.end("a")  # the other span has all of its names
    assert writer.holders() == {long: 1}
    writer.end("b")
    assert writer.find(prompt) == [(long, 0, 30)]


# -- holding and evicting ----------------------------------------------------------------------------------


def test_a_finder_keeps_a_slice_when_its_owner_goes_and_it_is_cache_after_both(store, arena, writer):
    prompt = list(range(20))
    span = writer.span("a", prompt, 0, 20)
    for _ in range(2):  # a repeated call is the same hold
        assert writer.find(prompt) == [(span, 0, 20)]
    writer.end("a")
    assert writer.holders() == {span: 1} and store.usage().cached_bytes == 0
    store.drop([span], sequence=SequenceId("finder"), epoch=E1)
    usage = store.usage()
    assert writer.holders() == {span: 0} and usage.cached_bytes == usage.granted_bytes == 4 * 4096
    assert usage.available_bytes == arena.budget_bytes
    assert writer.find(prompt) == [(span, 0, 20)]
    assert store.usage().cached_bytes == 0


def test_a_dead_finders_holds_are_given_back_by_its_successor(store, writer):
    prompt = list(range(20))
    span = writer.span("a", prompt, 0, 20)
    writer.find(prompt, epoch=E1)
    store.fence(SequenceId("finder"), E2)
    assert writer.find(prompt[:10], epoch=E2) == [(span, 0, 10)]
    writer.end("finder", E1)
    assert writer.holders() == {span: 2}
    writer.end("finder", E2)
    assert writer.holders() == {span: 1}


def test_memory_comes_from_the_longest_unheld_cache_the_end_of_a_prefix_first(store, layout, arena, writer):
    """The arena has 64 blocks, which four spans of 16 fill."""
    prompts = [list(range(i * 1000, i * 1000 + 160)) for i in range(3)]
    a0, a1 = writer.span("a", prompts[0], 0, 80), writer.span("a", prompts[0], 80, 160)
    b = writer.span("b", prompts[1], 0, 80)
    c = writer.span("c", prompts[2], 0, 80)
    for sequence in "abc":
        writer.end(sequence)
    assert arena.free_bytes == 0 and store.usage().available_bytes == arena.budget_bytes
    writer.find(prompts[1], sequence="x")
    writer.end("x")  # b was held last
    key = SpanKey(sequence=SequenceId("new"), layer_class=0, first=0, group0=0, group1=2)
    for gone in (a1, a0, c, b):
        store.create(key, capacity_tokens=80, layout=layout, epoch=E1)
        assert gone not in writer.holders()
        store.check_integrity()
    assert writer.find(prompts[0]) == writer.find(prompts[1]) == writer.find(prompts[2]) == []


def test_held_spans_are_never_evicted_and_a_refusal_evicts_nothing(store, layout, arena, writer):
    used = writer.span("a", list(range(160)), 0, 160)
    idle = writer.span("b", list(range(1000, 1080)), 0, 80)
    writer.end("b")
    key = SpanKey(sequence=SequenceId("new"), layer_class=0, first=0, group0=0, group1=2)
    with pytest.raises(Full) as caught:
        store.create(key, capacity_tokens=165, layout=layout, epoch=E1)
    assert caught.value.free_bytes == 32 * 4096
    assert writer.holders() == {used: 1, idle: 0}
    store.create(key, capacity_tokens=160, layout=layout, epoch=E1)
    assert idle not in writer.holders()


def test_a_tail_in_the_same_arena_gets_the_memory_of_cache(store, arena, layout, writer):
    writer.span("a", list(range(160)), 0, 160)
    writer.end("a")
    extents = arena.allocate(64, layout.block_bytes)
    assert store.announce() == []
    arena.free(extents)


def test_cache_that_is_being_read_is_not_evicted(store, arena, layout, writer, monkeypatch):
    from farshore.kvstore.store.layout import blocks as store_blocks

    span = writer.span("a", list(range(160)), 0, 160)
    copy_out = store_blocks.copy_out

    def refused_meanwhile(*args, **kwargs):
        writer.end("a")
        with pytest.raises(Full):
            arena.allocate(33, layout.block_bytes)
        return copy_out(*args, **kwargs)

    monkeypatch.setattr(store_blocks, "copy_out", refused_meanwhile)
    assert store.read(span, 0, 0, 160, sequence=SequenceId("a"))[0].shape[1] == 160
    arena.free(arena.allocate(33, layout.block_bytes))
    with pytest.raises(NotFound):
        store.read(span, 0, 0, 1, sequence=SequenceId("a"))


def test_a_cached_span_can_be_held_by_its_id(store, writer, layout):
    span = writer.span("a", list(range(20)), 0, 20)
    writer.end("a")
    store.hold([span], sequence=SequenceId("b"), epoch=E1)
    assert store.usage().cached_bytes == 0
    assert torch.isfinite(store.read(span, 2, 0, 20, sequence=SequenceId("b"))[1].float()).all()
