"""The memory of an arena: address space, and when the machine commits pages to it.

:class:`HostPages` reserves the address space at once. The pages of a grant are committed in one call, since
first touches inside a copy slow it down to a half or a quarter of its speed (docs/decisions/007). They go
back to the system when more than ``spare_bytes`` of them are free. Large arenas ask for huge pages, because
granted blocks are read completely, again and again. :class:`DevicePages` takes memory of an accelerator once
and keeps it.

Called by ``arena`` alone, which calls everything but ``populate`` under its lock. It must not know what the
memory is granted for.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from errno import EINVAL
from typing import Protocol

import torch
from torch import Tensor

from farshore.errors import InvalidRequest
from farshore.kernels.host import address
from farshore.kvstore.store.arena.ranges import Ranges

HUGE_PAGE_BYTES = 2 << 20
HUGE_FROM_BYTES = 32 << 20
"""Smaller reservations use ordinary pages: one block would commit a large share of their huge pages."""

MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later. Python's ``mmap`` lacks it."""

# Not mmap.madvise, which keeps the interpreter's lock: committing a gigabyte takes up to a second.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages(Protocol):
    """One range of memory, committed and given back in pages."""

    memory: Tensor
    """u8[bytes]"""

    @property
    def committed_bytes(self) -> int:
        """Upper bound of the memory that the machine has committed: grants, and free memory kept warm."""
        ...

    def holds(self, base: int, size: int) -> bool:
        """Whether all of ``[base, base + size)`` is committed."""
        ...

    def mark(self, base: int, size: int) -> None:
        """Counts a range as committed. The caller populates it next."""
        ...

    def populate(self, base: int, size: int) -> None:
        """Commits a granted range. MemoryError if the machine has no memory left. Called without a lock."""
        ...

    def trim(self, free: Sequence[tuple[int, int]], *, held_bytes: int) -> None:
        """Gives excess free memory back to the system. ``free``: all free ranges, as (start, size) in address
        order. ``held_bytes``: the size of all grants."""
        ...


def pages(size_bytes: int, *, spare_bytes: int, device: torch.device) -> Pages:
    """Memory of ``device``. InvalidRequest if it cannot be had."""
    if device.type == "cpu":
        return HostPages(size_bytes, spare_bytes=spare_bytes)
    return DevicePages(size_bytes, device)


class HostPages:
    """Private memory of this process, which the system takes back when the process ends. InvalidRequest if
    the machine cannot reserve that much."""

    def __init__(self, size_bytes: int, *, spare_bytes: int) -> None:
        huge = size_bytes >= HUGE_FROM_BYTES
        self._unit = HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
        self._spare_bytes = spare_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            mapped = mmap.mmap(-1, size_bytes + (HUGE_PAGE_BYTES if huge else 0), flags=flags)
        except OSError as error:
            raise InvalidRequest(f"this machine cannot reserve {size_bytes} bytes: {error}") from error
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        lead = -address(memory) % self._unit
        self.memory: Tensor = memory[lead : lead + size_bytes]
        self._committed = Ranges()
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise(0, size_bytes, mmap.MADV_HUGEPAGE)  # On failure the pages are ordinary ones.

    @property
    def committed_bytes(self) -> int:
        return self._committed.size

    def holds(self, base: int, size: int) -> bool:
        return self._committed.cover(base, base + size)

    def mark(self, base: int, size: int) -> None:
        # The first touch commits a whole huge page.
        end = -(-(base + size) // self._unit) * self._unit
        self._committed.add(base // self._unit * self._unit, min(end, self.memory.numel()))

    def populate(self, base: int, size: int) -> None:
        error = self._advise(base, size, MADV_POPULATE_WRITE)
        if error == EINVAL:  # a kernel without MADV_POPULATE_WRITE
            self.memory[base : base + size : mmap.PAGESIZE] = 0
        elif error:
            raise MemoryError(f"{size} bytes could not be committed: {os.strerror(error)}")

    def trim(self, free: Sequence[tuple[int, int]], *, held_bytes: int) -> None:
        """Goes from the top down. The arena grants from the bottom up, so the pages that stay warm are
        granted next."""
        excess = self._committed.size - held_bytes - self._spare_bytes
        for start, size in reversed(free):
            if excess <= 0:
                return
            end = start + size
            if end < self.memory.numel():
                end = end // self._unit * self._unit
            for a, b in reversed(self._committed.within(-(-start // self._unit) * self._unit, end)):
                a = max(a, (b - max(excess, 0)) // self._unit * self._unit)
                if a < b and not self._advise(a, b - a, mmap.MADV_DONTNEED):
                    self._committed.remove(a, b)
                    excess -= b - a

    def _advise(self, base: int, size: int, advice: int) -> int:
        """0, or the errno of the failure."""
        return _madvise(address(self.memory) + base, size, advice) and ctypes.get_errno()


class DevicePages:
    """Memory of an accelerator. All of it is taken at once and never given back: its driver serialises on
    every later allocation, and no other program could use the memory meanwhile. InvalidRequest if the device
    cannot give that much."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        try:
            self.memory: Tensor = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # AssertionError: PyTorch was built without the device
            raise InvalidRequest(f"{device} cannot give {size_bytes} bytes: {error}") from error

    @property
    def committed_bytes(self) -> int:
        return self.memory.numel()

    def holds(self, base: int, size: int) -> bool:
        return True

    def mark(self, base: int, size: int) -> None:
        pass

    def populate(self, base: int, size: int) -> None:
        pass

    def trim(self, free: Sequence[tuple[int, int]], *, held_bytes: int) -> None:
        pass
