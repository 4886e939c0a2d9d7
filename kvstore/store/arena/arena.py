"""The memory of KV: one mapping with a hard budget, granted in blocks.

All KV of a worker lies in one buffer, which kernels index by byte offset. The budget cannot be exceeded,
since there is no other memory. Called by the store and by tails. It must not know what a block holds.

Address space is reserved at once. Granted memory is committed with the grant, or by :meth:`Arena.commit`
before the first write, so that no copy waits for page faults. Freed memory goes back to the system except for
a spare share: see ``pages``. A granted block may contain the bytes of its last owner, so its new owner must
write a block before it reads it.
"""

import mmap
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from farshore.errors import Full, InvalidRequest
from farshore.kvstore.store.arena.pages import pages

SPARE_SHARE = 8
"""By default, 1/8 of the budget may be free and committed."""


class Extent(NamedTuple):
    """A run of ``blocks`` adjacent blocks, ``stride`` bytes from each to the next."""

    base: int
    """Byte offset in the arena's memory; a page multiple."""
    blocks: int
    stride: int

    @property
    def bytes(self) -> int:
        """Memory of the run, including the padding of its blocks."""
        return self.blocks * self.stride

    @property
    def block_bases(self) -> range:
        """Byte offset of each block."""
        return range(self.base, self.base + self.bytes, self.stride)


def stride_bytes(block_bytes: int) -> int:
    """Bytes that one block takes in an arena: ``block_bytes`` rounded up to whole pages."""
    return -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Arena:
    """First-fit allocator of page-aligned blocks. Thread-safe.

    ``budget_bytes`` is rounded down to whole pages. Less than one page, or more than the machine can reserve,
    is InvalidRequest. ``spare_bytes`` is how much freed memory stays committed, to be granted again at once
    (None: an eighth of the budget). It is kept in whole pages, huge ones in a large arena, so it may be a
    little more. ``device``: the memory's device. An accelerator's memory is never given back.
    """

    def __init__(
        self, budget_bytes: int, *, spare_bytes: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.budget_bytes = budget_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if self.budget_bytes <= 0:
            raise InvalidRequest(f"an arena needs at least {mmap.PAGESIZE} bytes, not {budget_bytes}")
        if spare_bytes is None:
            spare_bytes = self.budget_bytes // SPARE_SHARE
        self._pages = pages(self.budget_bytes, spare_bytes=spare_bytes, device=torch.device(device))
        self.memory: Tensor = self._pages.memory
        """u8[budget_bytes]."""
        self._lock = threading.Lock()
        # Free ranges in address order, as parallel lists. No two are adjacent.
        self._free_starts = [0]
        self._free_sizes = [self.budget_bytes]
        self._held: dict[int, int] = {}  # base of each held block -> its stride
        self._reclaim: Callable[[int], int] = lambda missing_bytes: 0

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that are not granted."""
        with self._lock:
            return sum(self._free_sizes)

    @property
    def committed_bytes(self) -> int:
        """Upper bound of the memory that the machine has committed: grants, the rest of their huge pages, and
        spare memory."""
        with self._lock:
            return self._pages.committed_bytes

    def on_full(self, reclaim: Callable[[int], int]) -> None:
        """Sets the function that is called before a grant is refused. ``reclaim(missing_bytes)`` frees that
        much cache or more, or nothing if it has less. It returns how many bytes of cache it had. It is called
        without the arena's lock."""
        self._reclaim = reclaim

    def allocate(self, blocks: int, block_bytes: int, *, commit: bool = True) -> list[Extent]:
        """Grants ``blocks`` blocks: one run if a free range is long enough, otherwise several runs.

        Raises Full, and grants nothing, if they do not fit or if the machine has no memory left.
        InvalidRequest for less than one block. ``commit``: commit the memory now, which takes a second or
        more for some GiB. False: the caller calls :meth:`commit` before it writes.
        """
        if blocks < 1 or block_bytes < 1:
            raise InvalidRequest(
                f"cannot allocate {blocks} blocks of {block_bytes} bytes: give at least 1 each"
            )
        stride = stride_bytes(block_bytes)
        extents = self._grant(blocks, stride)
        try:
            if commit:
                self.commit(extents)
        except Full:
            self.free(extents)
            raise
        return extents

    def commit(self, extents: Iterable[Extent]) -> None:
        """Commits granted memory. Full if the machine has no memory left."""
        with self._lock:
            cold = [extent for extent in extents if not self._pages.holds(extent.base, extent.bytes)]
            for extent in cold:
                self._pages.mark(extent.base, extent.bytes)
        try:
            for extent in cold:  # Without the lock: other calls need not wait.
                self._pages.populate(extent.base, extent.bytes)
        except MemoryError as error:
            raise Full(f"the machine has less than the budget: {error}", free_bytes=0) from error

    def free(self, extents: Iterable[Extent]) -> None:
        """Frees blocks; an extent may be freed piece by piece. InvalidRequest, and nothing is freed, if any
        of the blocks is not granted."""
        extents = list(extents)
        bases = [base for extent in extents for base in extent.block_bases]
        with self._lock:
            stray = [e for e in extents for base in e.block_bases if self._held.get(base) != e.stride]
            if stray or len(set(bases)) != len(bases):
                raise InvalidRequest(f"freed blocks that are not held, or held twice: {stray or extents}")
            for base in bases:
                del self._held[base]
            for extent in extents:
                self._insert_free(extent.base, extent.bytes)
            free = list(zip(self._free_starts, self._free_sizes, strict=True))
            self._pages.trim(free, held_bytes=self.budget_bytes - sum(self._free_sizes))

    def holds(self, base: int, stride: int) -> bool:
        """Whether a block of ``stride`` bytes at ``base`` is granted."""
        with self._lock:
            return self._held.get(base) == stride

    def is_committed(self, base: int, size: int) -> bool:
        """Whether all of ``[base, base + size)`` is committed."""
        with self._lock:
            return self._pages.holds(base, size)

    def check_integrity(self) -> None:
        """AssertionError unless free and granted ranges cover the budget exactly once, and no two free ranges
        are adjacent."""
        with self._lock:
            free = list(zip(self._free_starts, self._free_sizes, strict=True))
            held = list(self._held.items())
        end = 0
        for start, size in sorted(free + held):
            assert start == end, f"{'hole' if start > end else 'overlap'} between {end} and {start}"
            assert size > 0 and size % mmap.PAGESIZE == 0, f"range of {size} bytes at {start}"
            end += size
        assert end == self.budget_bytes, f"free + held = {end}, total = {self.budget_bytes}"
        ends = {start + size for start, size in free}
        assert not ends & {start for start, _ in free}, "free ranges touch"

    def _grant(self, blocks: int, stride: int) -> list[Extent]:
        """Evicts cache if needed."""
        while True:
            try:
                with self._lock:
                    extents = [Extent(start, count, stride) for start, count in self._choose(blocks, stride)]
                    for extent in extents:
                        self._take(extent)
                    return extents
            except Full as full:
                # Free ranges shorter than a block count as free but cannot be granted: ask for one block
                # more.
                missing_bytes = max(blocks * stride - full.free_bytes, stride)
                reclaimable_bytes = self._reclaim(missing_bytes)
                if reclaimable_bytes < missing_bytes:
                    full.free_bytes += reclaimable_bytes
                    raise

    def _choose(self, blocks: int, stride: int) -> list[tuple[int, int]]:
        """(start, blocks) of the runs to grant. Full if there are too few blocks."""
        for start, size in zip(self._free_starts, self._free_sizes, strict=True):
            if size >= blocks * stride:
                return [(start, blocks)]
        # The longest ranges first, since each run becomes a segment for kernels.
        runs, missing = [], blocks
        by_size = sorted(zip(self._free_sizes, self._free_starts, strict=True), reverse=True)
        for size, start in by_size:
            count = min(missing, size // stride)
            if not count:
                break
            runs.append((start, count))
            missing -= count
        if missing:
            free = sum(self._free_sizes)
            raise Full(
                f"{blocks} blocks of {stride} bytes do not fit into {free} free bytes of {self.budget_bytes}",
                free_bytes=free,
            )
        return runs

    def _take(self, extent: Extent) -> None:
        """Cuts an extent off the beginning of a free range."""
        i = bisect_left(self._free_starts, extent.base)
        assert self._free_starts[i] == extent.base and self._free_sizes[i] >= extent.bytes
        self._free_starts[i] += extent.bytes
        self._free_sizes[i] -= extent.bytes
        if not self._free_sizes[i]:
            del self._free_starts[i], self._free_sizes[i]
        self._held.update((base, extent.stride) for base in extent.block_bases)

    def _insert_free(self, start: int, size: int) -> None:
        """Inserts a free range and merges it with adjacent ones."""
        starts, sizes = self._free_starts, self._free_sizes
        i = bisect_left(starts, start)
        if i < len(starts) and start + size == starts[i]:
            size += sizes[i]
            del starts[i], sizes[i]
        if i and starts[i - 1] + sizes[i - 1] == start:
            sizes[i - 1] += size
        else:
            starts.insert(i, start)
            sizes.insert(i, size)
