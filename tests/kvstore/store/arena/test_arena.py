"""The arena: grants, frees, and the memory that the machine commits."""

import ctypes
import errno
import mmap
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.errors import Full, InvalidRequest
from farshore.kvstore.store.arena import pages
from farshore.kvstore.store.arena.arena import Arena, Extent, stride_bytes

PAGE = mmap.PAGESIZE
MIB = 1 << 20
requests = st.tuples(st.integers(1, 9), st.integers(1, 3 * PAGE))


@settings(deadline=None)
@given(st.lists(st.one_of(requests, st.integers(0, 100)), max_size=60))
def test_free_and_granted_add_up_after_any_calls(steps):
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


def resident_bytes() -> int:
    """Resident memory of this process, by the system's count."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")


@needs_proc
def test_grants_are_committed_and_freed_memory_goes_back_except_for_the_spare_bytes():
    before = resident_bytes()
    arena = Arena(256 * MIB, spare_bytes=8 * MIB)
    assert resident_bytes() - before < 8 * MIB and arena.committed_bytes == 0
    extents = arena.allocate(32, 3 * MIB)  # 96 MiB, granted and not written
    assert 96 * MIB <= arena.committed_bytes <= 98 * MIB
    assert 80 * MIB < resident_bytes() - before < 112 * MIB
    arena.free(extents)
    assert 8 * MIB <= arena.committed_bytes <= 10 * MIB
    assert resident_bytes() - before < 24 * MIB
    arena.check_integrity()


def test_committed_memory_is_granted_next():
    arena = Arena(64 * MIB, spare_bytes=4 * MIB)
    low, high = arena.allocate(1, 8 * MIB)[0], arena.allocate(1, 8 * MIB)[0]
    arena.memory[: 16 * MIB] = 7
    arena.free([low])
    arena.free([high])
    assert arena.committed_bytes == 4 * MIB
    (again,) = arena.allocate(1, 4 * MIB)
    assert again.base == 0 and arena.memory[: 4 * MIB].all() and arena.committed_bytes == 4 * MIB
    (fresh,) = arena.allocate(1, 12 * MIB)
    assert not arena.memory[fresh.base : fresh.base + fresh.bytes].any()


@pytest.mark.parametrize("budget_bytes", [24 * PAGE, 33 * MIB + 5 * PAGE])
@settings(deadline=None)
@given(st.data())
def test_freed_memory_leaves_no_more_committed_than_the_spare_bytes(budget_bytes, data):
    """Exact for ordinary pages. A huge page also stays committed if a grant shares it."""
    spare_bytes = data.draw(st.sampled_from([0, 3 * PAGE, 5 * MIB]))
    arena = Arena(budget_bytes, spare_bytes=spare_bytes)
    held: list[list[Extent]] = []
    for size in data.draw(st.lists(st.integers(1, budget_bytes), max_size=12)):
        try:
            held.append(arena.allocate(1, size))
        except Full:
            arena.free(held.pop(size % len(held)))
            used = arena.budget_bytes - arena.free_bytes
            shared = 2 * (2 * MIB) * (len(held) + 1) if budget_bytes > MIB else 0
            assert arena.committed_bytes <= used + spare_bytes + shared
        arena.check_integrity()
        assert arena.committed_bytes <= arena.budget_bytes
    for extents in held:
        arena.free(extents)
    assert arena.committed_bytes <= spare_bytes + (2 * MIB if budget_bytes > MIB else 0)


@pytest.fixture
def populating_fails(monkeypatch):
    """populating_fails(errno): from now on the system fails to commit memory, with that errno."""
    madvise = pages._madvise

    def fail(number):
        def failing(address, size, advice):
            if advice != pages.MADV_POPULATE_WRITE:
                return madvise(address, size, advice)
            ctypes.set_errno(number)
            return -1

        monkeypatch.setattr(pages, "_madvise", failing)

    return fail


def test_a_machine_without_memory_left_is_full(populating_fails):
    arena = Arena(8 * PAGE)
    populating_fails(errno.ENOMEM)
    with pytest.raises(Full, match="machine has less"):
        arena.allocate(2, PAGE)
    assert arena.free_bytes == arena.budget_bytes
    arena.check_integrity()


@needs_proc
def test_older_kernels_touch_page_by_page(populating_fails):
    populating_fails(errno.EINVAL)
    arena = Arena(16 * MIB)
    before = resident_bytes()
    arena.allocate(1, 16 * MIB)
    assert resident_bytes() - before > 12 * MIB


def test_memory_of_a_device_that_is_not_there_is_refused():
    with pytest.raises(InvalidRequest, match="cuda:99 cannot give"):
        Arena(1 * MIB, device="cuda:99")


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
