"""Tile lists: each row's tokens are read exactly once, in lists that were just cut and in advanced ones."""

from math import gcd
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.kernels.base import AttentionSpec, Segments, WorkList
from farshore.kernels.gpu.work import Heads, flatten

NARROW_M, WIDE_M, BLOCK_N, PROCESSORS = 4, 8, 4, 3
HEADS = [(1, 1, 1), (2, 2, 2), (2, 2, 12), (2, 4, 1)]
"""(K heads, V heads, query heads that share both)"""


class Tail(NamedTuple):
    """One sequence's KV behind the shared prefix, and its rows of each step."""

    rows: int
    full: list[int]
    """Tokens of the segments before the last one."""
    newest: int
    """Tokens of the last segment."""


class Step:
    """The arguments of ``flatten`` for some tails behind a prefix of ``prefix`` tokens."""

    def __init__(self, prefix, tails, *, heads, window):
        k_heads, v_heads, shared = heads
        groups = gcd(k_heads, v_heads)
        pairs = groups * (k_heads // groups) * (v_heads // groups)
        self.spec = AttentionSpec(pairs * shared, k_heads, v_heads, 8, 8, 1.0, window_tokens=window)
        self.heads = Heads.of(self.spec, wide_m=WIDE_M)
        self.pairs = pairs
        total = sum(tail.rows for tail in tails)
        segments, work, positions, row = [(0, 8, 0, prefix, 0, 0, groups)], [(0, total, 0, 0, groups)], [], 0
        for tail in tails:
            first = prefix
            for count in [*tail.full, tail.newest]:
                work.append((row, tail.rows, len(segments), 0, groups))
                segments.append((0, 8, 0, count, first, 0, groups))
                first += count
            positions += range(first - tail.rows, first)
            row += tail.rows
        self.work, self.segments = WorkList.of(work), Segments.of(segments)
        self.positions = torch.tensor(positions)

    def flatten(self):
        return flatten(
            self.work,
            self.segments,
            self.spec,
            self.heads,
            self.positions,
            group0=0,
            group1=self.spec.groups,
            narrow_m=NARROW_M,
            wide_m=WIDE_M,
            block_n=BLOCK_N,
            processors=PROCESSORS,
        )

    def expected(self):
        """For each row: the tokens that it sees, as (segment, token)."""
        tokens = [[] for _ in self.positions]
        for row, rows, segment, _, _ in zip(*(field.tolist() for field in self.work), strict=True):
            for each in range(row, row + rows):
                every = range(int(self.segments.count[segment]))
                tokens[each] += [(segment, token) for token in every if self.sees(each, segment, token)]
        return [sorted(each) for each in tokens]

    def sees(self, row, segment, token):
        distance = int(self.positions[row]) - int(self.segments.position[segment]) - token
        return 0 <= distance < (self.spec.window_tokens or 1 << 30)

    def check(self, listed):
        """Every list of a row has the row's tokens, each once, and no tile reads beyond a segment."""
        tiles, expected = listed.tiles.tolist(), self.expected()
        of_slot = {}
        for number, (row, rows, segment, pair, head0, start, stop, slot) in enumerate(tiles):
            assert 0 <= start <= stop <= int(self.segments.count[segment])
            assert rows * self.heads.tile_heads <= (NARROW_M if number < listed.narrow else WIDE_M)
            for nth in range(rows):
                place = row + nth, pair, head0 // self.heads.tile_heads
                of_slot[slot + nth * self.heads.tile_heads] = place, segment, range(start, stop)
        lists = listed.starts.tolist()
        for row, tokens in enumerate(expected):
            for pair in range(self.pairs):
                for head_tile in range(self.heads.head_tiles):
                    j = (row * self.pairs + pair) * self.heads.head_tiles + head_tile
                    found = []
                    for slot in listed.slots[lists[j] : lists[j + 1]].tolist():
                        place, segment, covered = of_slot[slot]
                        assert place == (row, pair, head_tile)
                        found += [(segment, token) for token in covered if self.sees(row, segment, token)]
                    assert sorted(found) == tokens


tails = st.builds(
    Tail,
    rows=st.integers(1, 5),
    full=st.lists(st.integers(1, 20), max_size=2),
    newest=st.integers(1, 12),
)


@settings(max_examples=60, deadline=None)
@given(
    prefix=st.integers(5, 60),
    tails=st.lists(tails, min_size=1, max_size=3),
    heads=st.sampled_from(HEADS),
    window=st.none() | st.integers(1, 50),
    padded=st.booleans(),
    growths=st.lists(st.lists(st.integers(-3, 5), min_size=3, max_size=3), max_size=12),
)
def test_every_token_is_read_once(prefix, tails, heads, window, padded, growths):
    """As a tail's newest segment grows, and shrinks when guesses were wrong."""
    listed = None
    for growth in ([0, 0, 0], *growths):
        tails = [
            tail._replace(newest=max(tail.newest + more, 1))
            for tail, more in zip(tails, growth, strict=False)
        ]
        step = Step(prefix, tails, heads=heads, window=window)
        if listed is None or not listed.advance(step.segments, step.positions, step.spec):
            listed = step.flatten()
            if padded:
                listed = listed.padded(step.heads, narrow_m=NARROW_M, wide_m=WIDE_M)
        surplus = listed.tiles[:, 1] == 0
        assert not listed.tiles[surplus].any()
        kept = listed._replace(tiles=listed.tiles[~surplus], narrow=int((~surplus)[: listed.narrow].sum()))
        step.check(kept)


def advances(tokens, *, window=None, rows=1, full=()):
    """The numbers of tokens, in order, at which a list had to be cut anew."""
    listed, cuts = None, []
    for newest in tokens:
        step = Step(40, [Tail(rows, list(full), newest)], heads=(1, 1, 1), window=window)
        if listed is None or not listed.advance(step.segments, step.positions, step.spec):
            listed = step.flatten()
            cuts.append(newest)
    return cuts


def test_a_list_is_cut_anew_when_a_tile_would_be_the_longest():
    """Tiles have 4 tokens, the least, of 41 tokens in all, and 8 of 61."""
    assert advances(range(1, 13)) == [1, 5, 9]
    assert advances(range(21, 29)) == [21, 25]


def test_a_list_is_cut_anew_when_a_tile_would_become_empty():
    assert advances([6, 7, 6, 5, 4, 3]) == [6, 4]


def test_a_list_is_cut_anew_when_a_window_leaves_a_segment():
    """A window of 6 tokens sees none of the prefix when 6 are behind it. Otherwise its beginning moves."""
    assert advances(range(2, 10), window=6) == [2, 5, 6, 9]


@pytest.mark.parametrize("rows", [1, 3])
def test_an_advanced_list_changes_its_borders_only(rows):
    before, after = (Step(40, [Tail(rows, [7], n)], heads=(2, 2, 2), window=None) for n in (1, 3))
    listed, cut = before.flatten(), before.flatten()
    assert listed.advance(after.segments, after.positions, after.spec)
    changed = (listed.tiles != cut.tiles).nonzero()
    assert set(changed[1].tolist()) == {6}
    assert (listed.tiles[changed] - cut.tiles[changed] == 2).all()
    after.check(listed)
