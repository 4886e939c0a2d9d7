"""Tests of step plans and placement: a plan with a hole or an overlap is refused, and shares cover each
position once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.attention_offload.plan.placement import FreeTokens, place_groups, spread
from farshore.attention_offload.plan.step_plan import PositionRange, Read, StepPlan, split_rows
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
    plan.check({A: committed}, {A: PositionRange(tail_first, last)})


def read(first, last, g0=0, g1=GROUPS, rows=range(0, 1), origin=None):
    origin = first if origin is None else origin
    return Read(SpanId(f"s{first}.{g0}"), origin, first, last, g0, g1, rows, A)


@st.composite
def exact_covers(draw):
    """(tail, reads): reads on random workers that cover [0, tail) of all groups exactly once."""
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
    with pytest.raises(InvalidPlan, match=r"group \d: positions \d+\.\.\d+ are not read$"):
        check(plan_of(damaged), tail_first=tail)


@given(exact_covers(), st.data())
def test_an_overlap_is_refused(cover, data):
    """Positions that are read already, perhaps with some beyond, are reported as read twice, never as a
    hole."""
    tail, reads = cover
    _, victim = data.draw(st.sampled_from(reads))
    first = data.draw(st.integers(victim.first, victim.last - 1))
    last = data.draw(st.integers(first + 1, victim.last + 3))
    twice = ("w", victim._replace(first=first, last=last))
    with pytest.raises(InvalidPlan, match=r"group \d: positions \d+\.\.\d+ are read twice$"):
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
    reads = [("x", read(0, 50))]
    with pytest.raises(InvalidPlan, match="expected 99"):
        check(plan_of(reads), tail_first=50, committed=99, tail_last=101)
    with pytest.raises(InvalidPlan, match="outside the tail"):
        check(plan_of(reads), tail_first=50, tail_last=100)
    with pytest.raises(InvalidPlan, match="no epoch"):
        plan_of(reads).check({}, {})


def test_speculative_rows_follow_each_other():
    reads = [("x", read(0, 50, rows=range(0, 3)))]
    check(plan_of(reads, rows=3), tail_first=50)
    two_rows = [("x", read(0, 50, rows=range(0, 2)))]
    with pytest.raises(InvalidPlan, match="row 2"):
        check(plan_of(two_rows, rows=3), tail_first=50)


def test_shard_steps_come_in_span_order_with_their_own_rows_and_heads():
    plan = plan_of([("b", read(0, 20, 0, 2)), ("a", read(20, 50, 1, 2)), ("c", read(0, 50, 2, 3))])
    steps = plan.shard_steps(split_rows(1, 1))
    assert list(steps) == ["b", "c", "a"]
    assert (steps[WorkerId("a")].group0, steps[WorkerId("a")].group1) == (1, 2)
    assert steps[WorkerId("b")].positions == (100,)


def free_blocks(*blocks):
    """Workers w0, w1, ... with so many free blocks."""
    return [FreeTokens(WorkerId(f"w{i}"), count * BLOCK_TOKENS) for i, count in enumerate(blocks)]


free_workers = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda blocks: free_blocks(*blocks))


@given(free_workers, st.integers(1, 4), st.sampled_from(["range", "head", "both"]), st.integers(1, 9000))
def test_a_spread_covers_every_position_and_group_once_and_fits_the_workers(free, groups, shard_by, tokens):
    placements = place_groups(free, groups=groups, shard_by=shard_by)
    assert placements[0].group0 == 0 and placements[-1].group1 == groups
    try:
        shares = spread(placements, tokens=tokens, groups=groups)
    except Full:
        assert any(
            sum(
                worker.tokens * groups // (placement.group1 - placement.group0) // BLOCK_TOKENS
                for worker in placement.workers
            )
            * BLOCK_TOKENS
            < tokens
            for placement in placements
        )
        return
    for group in range(groups):
        ranges = [(share.first, share.last) for share in shares if share.group0 <= group < share.group1]
        assert ranges[0][0] == 0 and ranges[-1][1] == tokens
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert all(first % BLOCK_TOKENS == 0 for first, _ in ranges)
    for worker in free:
        used = sum(
            -(-(share.last - share.first) // BLOCK_TOKENS) * BLOCK_TOKENS * (share.group1 - share.group0)
            for share in shares
            if share.worker == worker.worker
        )
        assert used <= worker.tokens * groups


def sizes(tokens, free, *, shard_by="range"):
    """(worker, tokens) of each share, in position order."""
    shares = spread(place_groups(free, groups=3, shard_by=shard_by), tokens=tokens, groups=3)
    return [(share.worker, share.last - share.first) for share in shares]


@given(st.integers(1, 9000), st.integers(1, 9))
def test_a_share_is_a_block_or_more_and_shares_are_even(tokens, workers):
    shares = [size for _, size in sizes(tokens, free_blocks(*[100] * workers))]
    assert len(shares) == min(workers, max(1, tokens // BLOCK_TOKENS))
    assert min(shares) >= min(tokens, BLOCK_TOKENS)
    in_blocks = [-(-size // BLOCK_TOKENS) for size in shares]
    assert max(in_blocks) - min(in_blocks) <= 1


def test_a_short_sequence_goes_to_the_emptiest_workers():
    assert sizes(20, free_blocks(5, 9, 7)) == [("w1", 20)]
    assert sizes(20, free_blocks(9, 9, 9)) == [("w0", 20)]
    assert sizes(511, free_blocks(5, 9, 7)) == [("w1", 511)]
    assert sizes(600, free_blocks(5, 9, 7)) == [("w2", 256), ("w1", 344)]


def test_one_after_the_other_short_sequences_fill_the_workers_evenly():
    blocks = [9, 9, 9, 9]
    for _ in range(len(blocks) * 8):
        ((worker, _),) = sizes(37, free_blocks(*blocks))
        blocks[int(worker[1:])] -= 1
        assert max(blocks) - min(blocks) <= 1
    assert blocks == [1] * 4


def test_further_workers_are_used_only_if_the_emptiest_are_too_small():
    assert sizes(511, free_blocks(1, 1, 0)) == [("w1", 256), ("w0", 255)]
    assert sizes(1300, free_blocks(4, 1, 1)) == [("w2", 256), ("w1", 256), ("w0", 788)]
    assert sizes(9 * 256, free_blocks(10, 10, 1)) == [("w2", 256), ("w1", 4 * 256), ("w0", 4 * 256)]
    with pytest.raises(Full, match="600 tokens does not fit: its shards have room for 512"):
        sizes(600, free_blocks(1, 1, 0))


def test_head_groups_of_a_short_sequence_have_a_worker_each():
    assert sizes(20, free_blocks(9, 9, 9, 9), shard_by="head") == [("w0", 20), ("w1", 20), ("w2", 20)]
    both = sizes(20, free_blocks(9, 9, 9, 9, 9), shard_by="both")
    assert both == [("w0", 20), ("w1", 20), ("w2", 20)]
    both = sizes(600, free_blocks(9, 9, 9, 9, 9), shard_by="both")
    assert both == [("w3", 256), ("w0", 344), ("w4", 256), ("w1", 344), ("w2", 600)]


@given(st.integers(1, 70), st.integers(1, 9))
def test_rows_are_split_without_a_gap_and_evenly(rows, n):
    batches = split_rows(rows, n)
    assert [row for batch in batches for row in batch] == list(range(rows))
    assert len(batches) == min(rows, n)
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_micro_batches_of_a_shard_read_what_the_step_reads(data, rows, n):
    """Every (row, position) of the shard's reads is in exactly one micro-batch, numbered from its first."""
    row_ranges = st.tuples(st.integers(0, rows - 1), st.integers(1, 3))
    reads = []
    for index, (first, count) in enumerate(data.draw(st.lists(row_ranges, min_size=1, max_size=4))):
        span = read(index, index + 1, rows=range(first, min(first + count, rows)))
        reads.append(("x", span))
    (step,) = plan_of(reads, rows=rows).shard_steps(split_rows(rows, n)).values()
    assert len(step.micro_batches) == min(rows, n)
    seen = []
    for index, batch in enumerate(step.micro_batches):
        for cut in step.micro_batch_reads(0, index):
            seen += [(step.rows[batch[row]], cut.first) for row in cut.rows]
    assert sorted(seen) == sorted((row, span.first) for _, span in reads for row in span.rows)
