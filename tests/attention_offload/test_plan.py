"""A plan with a hole or an overlap is never run."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.attention_offload.placement import Room, head_classes, spread
from farshore.attention_offload.plan import Read, StepPlan, Stretch, split_rows
from farshore.errors import Full, InvalidPlan
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS

GROUPS = 3
A = SequenceId("a")


def plan_of(reads, *, rows=1, position=100):
    by_worker = {}
    for worker, read in reads:
        by_worker.setdefault(WorkerId(worker), []).append(read)
    return StepPlan(
        step=1,
        groups=GROUPS,
        sequences=(A,) * rows,
        positions=tuple(range(position, position + rows)),
        epochs={A: Epoch(1)},
        reads=({w: tuple(r) for w, r in by_worker.items()},),
    )


def check(plan, *, tail_first, committed=100, tail_last=None):
    last = tail_last or committed + len(plan.sequences)
    plan.check({A: committed}, {A: Stretch(tail_first, last)})


def read(first, last, g0=0, g1=GROUPS, rows=range(0, 1), origin=None):
    origin = first if origin is None else origin
    return Read(SpanId(f"s{first}.{g0}"), origin, first, last, g0, g1, rows, A)


@st.composite
def exact_covers(draw):
    """Reads that tile [0, tail) x groups exactly, on random workers."""
    tail = draw(st.integers(1, 90))
    reads = []
    group_cuts = sorted({0, GROUPS, *draw(st.lists(st.integers(1, GROUPS - 1), max_size=2))})
    for g0, g1 in pairwise(group_cuts):
        cuts = sorted({0, tail, *draw(st.lists(st.integers(1, tail), max_size=4))})
        for first, last in pairwise(cuts):
            reads.append((draw(st.sampled_from("xyz")), read(first, last, g0, g1)))
    return tail, draw(st.permutations(reads))


@given(exact_covers())
def test_an_exact_cover_passes(cover):
    tail, reads = cover
    check(plan_of(reads), tail_first=tail)


@given(exact_covers(), st.data())
def test_a_hole_is_refused(cover, data):
    tail, reads = cover
    index = data.draw(st.integers(0, len(reads) - 1))
    worker, victim = reads[index]
    keep = data.draw(st.integers(victim.first, victim.last - 1))
    damaged = reads[:index] + reads[index + 1 :]
    if keep > victim.first:
        damaged.append((worker, victim._replace(last=keep)))
    with pytest.raises(InvalidPlan, match="nobody reads"):
        check(plan_of(damaged), tail_first=tail)


@given(exact_covers(), st.data())
def test_an_overlap_is_refused(cover, data):
    tail, reads = cover
    _, victim = data.draw(st.sampled_from(reads))
    first = data.draw(st.integers(victim.first, victim.last - 1))
    last = data.draw(st.integers(first + 1, victim.last))
    twice = ("w", victim._replace(first=first, last=last))
    with pytest.raises(InvalidPlan, match=r"read twice|in the tail too|nobody"):
        check(plan_of([*reads, twice]), tail_first=tail)


def test_a_read_into_the_tail_is_refused():
    with pytest.raises(InvalidPlan, match="in the tail too"):
        check(plan_of([("x", read(0, 51))]), tail_first=50)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (read(0, 50, 0, 4), "groups"),
        (read(0, 50, rows=range(0, 2)), "rows"),
        (read(10, 10), "empty"),
        (read(0, 50, origin=5), "empty"),
    ],
)
def test_a_malformed_read_is_refused(bad, match):
    with pytest.raises(InvalidPlan, match=match):
        check(plan_of([("x", bad)]), tail_first=50)


def test_rows_stand_at_the_committed_length():
    whole = [("x", read(0, 50))]
    with pytest.raises(InvalidPlan, match="expected 99"):
        check(plan_of(whole), tail_first=50, committed=99, tail_last=101)
    with pytest.raises(InvalidPlan, match="outside the tail"):
        check(plan_of(whole), tail_first=50, tail_last=100)
    with pytest.raises(InvalidPlan, match="no epoch"):
        plan_of(whole).check({}, {})


def test_speculative_rows_follow_each_other():
    reads = [("x", read(0, 50, rows=range(0, 3)))]
    check(plan_of(reads, rows=3), tail_first=50)
    one_row = [("x", read(0, 50, rows=range(0, 2)))]
    with pytest.raises(InvalidPlan, match="row 2"):
        check(plan_of(one_row, rows=3), tail_first=50)


def test_shard_steps_come_in_span_order_with_their_own_rows_and_heads():
    plan = plan_of([("b", read(0, 20, 0, 2)), ("a", read(20, 50, 1, 2)), ("c", read(0, 50, 2, 3))])
    steps = plan.shard_steps(split_rows(1, 1))
    assert list(steps) == ["b", "c", "a"]
    assert (steps[WorkerId("a")].group0, steps[WorkerId("a")].group1) == (1, 2)
    assert steps[WorkerId("b")].positions == (100,)


rooms = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(
    lambda blocks: [Room(WorkerId(f"w{i}"), n * BLOCK_TOKENS) for i, n in enumerate(blocks)]
)


@given(rooms, st.integers(1, 4), st.sampled_from(["range", "head", "both"]), st.integers(1, 9000))
def test_a_spread_covers_every_position_and_group_once_and_respects_room(rooms, groups, shard_by, tokens):
    classes = head_classes(rooms, groups=groups, shard_by=shard_by)
    assert classes[0].group0 == 0 and classes[-1].group1 == groups
    try:
        shares = spread(classes, tokens=tokens, groups=groups)
    except Full:
        assert any(
            sum(r.tokens * groups // (c.group1 - c.group0) for r in c.workers)
            < tokens + BLOCK_TOKENS * len(c.workers)
            for c in classes
        )
        return
    for group in range(groups):
        mine = sorted((s.first, s.last) for s in shares if s.group0 <= group < s.group1)
        assert mine[0][0] == 0 and mine[-1][1] == tokens
        assert all(a[1] == b[0] for a, b in pairwise(mine))
    for room in rooms:
        used = sum(
            -(-(s.last - s.first) // BLOCK_TOKENS) * BLOCK_TOKENS * (s.group1 - s.group0)
            for s in shares
            if s.worker == room.worker
        )
        assert used <= room.tokens * groups


def test_short_sequences_spread_over_every_worker():
    rooms = [Room(WorkerId(f"w{i}"), 10_000) for i in range(5)]
    shares = spread(head_classes(rooms, groups=3, shard_by="range"), tokens=37, groups=3)
    assert [s.last - s.first for s in shares] == [8, 8, 7, 7, 7]
    both = spread(head_classes(rooms, groups=3, shard_by="both"), tokens=37, groups=3)
    assert len({s.worker for s in both}) == 5
    assert len({(s.group0, s.group1) for s in both}) == 3


def test_long_sequences_are_cut_on_block_boundaries():
    rooms = [Room(WorkerId(f"w{i}"), 100_000) for i in range(3)]
    shares = spread(head_classes(rooms, groups=3, shard_by="range"), tokens=4001, groups=3)
    assert [s.first % BLOCK_TOKENS for s in shares] == [0, 0, 0]


@given(st.integers(1, 70), st.integers(1, 9))
def test_rows_are_split_without_a_gap_and_evenly(rows, n):
    parts = split_rows(rows, n)
    assert [row for part in parts for row in part] == list(range(rows))
    assert len(parts) == min(rows, n)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_micro_batches_of_a_shard_read_what_the_step_reads(data, rows, n):
    """Every (row, position) of the shard's reads is in exactly one micro-batch, numbered from its first."""
    stretches = st.tuples(st.integers(0, rows - 1), st.integers(1, 3))
    reads = []
    for index, (first, count) in enumerate(data.draw(st.lists(stretches, min_size=1, max_size=4))):
        span = read(index, index + 1, rows=range(first, min(first + count, rows)))
        reads.append(("x", span))
    (step,) = plan_of(reads, rows=rows).shard_steps(split_rows(rows, n)).values()
    assert len(step.micro_batches) == min(rows, n)
    seen = []
    for index, batch in enumerate(step.micro_batches):
        for part in step.micro_batch_reads(0, index):
            seen += [(step.rows[batch[row]], part.first) for row in part.rows]
    assert sorted(seen) == sorted((row, it.first) for _, it in reads for row in it.rows)
