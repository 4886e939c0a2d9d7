import mmap
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import Full, InvalidRequest
from farshore.kvstore.arena import Arena, Extent, stride_bytes

PAGE = mmap.PAGESIZE
requests = st.tuples(st.integers(1, 9), st.integers(1, 3 * PAGE))


@given(st.lists(st.one_of(requests, st.integers(0, 100)), max_size=60))
def test_books_add_up_whatever_is_taken_and_given_back(steps):
    arena = Arena(40 * PAGE)
    held: list[list[Extent]] = []
    for step in steps:
        if isinstance(step, int):
            if held:
                arena.free(held.pop(step % len(held)))
        else:
            blocks, block_bytes = step
            before = arena.free_bytes
            try:
                extents = arena.allocate(blocks, block_bytes)
            except Full as full:
                assert full.free_bytes == before == arena.free_bytes
            else:
                held.append(extents)
                assert sum(e.blocks for e in extents) == blocks
                assert all(e.stride == stride_bytes(block_bytes) >= block_bytes for e in extents)
                assert all(e.base % PAGE == 0 for e in extents)
        arena.check_integrity()
        taken = sorted((e.base, e.base + e.bytes) for extents in held for e in extents)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        assert sum(end - start for start, end in taken) + arena.free_bytes == arena.budget_bytes
    for extents in held:
        arena.free(extents)
    arena.check_integrity()
    assert arena.allocate(40, PAGE) == [Extent(0, 40, PAGE)]


def test_a_run_is_contiguous_if_it_can_be_and_whole_blocks_otherwise():
    arena = Arena(10 * PAGE)
    singles = [arena.allocate(1, PAGE)[0] for _ in range(10)]
    arena.free([singles[0], *singles[2:5], *singles[6:8]])  # free pages: 0, 2-4, 6-7
    assert arena.allocate(3, PAGE) == [Extent(2 * PAGE, 3, PAGE)]
    assert arena.allocate(3, 1) == [Extent(6 * PAGE, 2, PAGE), Extent(0, 1, PAGE)]
    assert arena.free_bytes == 0


def test_space_that_no_whole_block_fits_into_is_full():
    arena = Arena(4 * PAGE)
    singles = [arena.allocate(1, PAGE)[0] for _ in range(4)]
    arena.free([singles[0], singles[2]])
    with pytest.raises(Full) as caught:
        arena.allocate(1, PAGE + 1)
    assert caught.value.free_bytes == 2 * PAGE


def test_an_extent_can_be_freed_in_parts():
    arena = Arena(4 * PAGE)
    (extent,) = arena.allocate(4, PAGE)
    arena.free([Extent(extent.base + PAGE, 2, PAGE)])
    arena.check_integrity()
    assert arena.free_bytes == 2 * PAGE


def test_freed_memory_reads_as_zeros():
    arena = Arena(2 * PAGE)
    extents = arena.allocate(2, PAGE)
    arena.memory.fill_(7)
    arena.free(extents)
    assert not arena.memory.any()


@pytest.mark.parametrize(
    "stray",
    [[Extent(0, 1, PAGE)] * 2, [Extent(0, 2, PAGE)], [Extent(0, 1, 2 * PAGE)], [Extent(PAGE, 1, PAGE)]],
)
def test_freeing_what_is_not_held_is_refused_and_changes_nothing(stray):
    arena = Arena(4 * PAGE)
    arena.allocate(1, PAGE)
    with pytest.raises(InvalidRequest):
        arena.free(stray)
    arena.check_integrity()
    assert arena.free_bytes == 3 * PAGE


def test_bad_sizes_are_refused():
    with pytest.raises(InvalidRequest):
        Arena(PAGE - 1)
    with pytest.raises(InvalidRequest, match="reserve"):
        Arena(1 << 62)
    arena = Arena(PAGE + 1)
    assert arena.budget_bytes == arena.memory.numel() == PAGE
    with pytest.raises(InvalidRequest):
        arena.allocate(0, PAGE)
    with pytest.raises(InvalidRequest):
        arena.allocate(1, 0)
