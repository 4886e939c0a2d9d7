"""Where an arena's bytes lie, and when the machine pays for them.

:class:`HostPages` reserves address space at once. Pages are committed when they are granted, all in one call
(first touches inside a copy run at a half to a quarter of its speed: docs/decisions/007), and go back to the
system when more than ``spare_bytes`` of them lie free. Huge pages where they fit: what is granted is read
whole, again and again. :class:`DevicePages` is memory of an accelerator, taken once and kept.

For ``arena`` alone, which guards all but ``populate``. It must not know who holds what.
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
from farshore.kvstore.store.ranges import Ranges

HUGE_PAGE_BYTES = 2 << 20
HUGE_FROM_BYTES = 32 << 20
"""Smaller reservations keep to ordinary pages: a granted block would commit a large part of them."""

MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; not in Python's ``mmap``."""

# Not mmap.madvise: that keeps the interpreter's lock, and to commit a gigabyte takes up to a second.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages(Protocol):
    memory: Tensor
    """u8[bytes]"""

    @property
    def committed_bytes(self) -> int:
        """What of it the machine pays for, at most: granted memory, and free memory kept warm."""
        ...

    def holds(self, base: int, size: int) -> bool:
        """Whether all of a range is committed."""
        ...

    def mark(self, base: int, size: int) -> None:
        """Counts a range as committed, which is to be populated then."""
        ...

    def populate(self, base: int, size: int) -> None:
        """Touches a granted range. MemoryError where the machine has no more."""
        ...

    def trim(self, free: Sequence[tuple[int, int]], *, held_bytes: int) -> None:
        """Gives back what is too much, ``free`` being all ranges (start, size) that nobody holds."""
        ...


def pages(size_bytes: int, *, spare_bytes: int, device: torch.device) -> Pages:
    if device.type == "cpu":
        return HostPages(size_bytes, spare_bytes=spare_bytes)
    return DevicePages(size_bytes, device)


class HostPages:
    """Private memory of this process: its death gives everything back. InvalidRequest where the machine
    cannot reserve so much."""

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
        lead = -memory.data_ptr() % self._unit
        self.memory: Tensor = memory[lead : lead + size_bytes]
        self._committed = Ranges()
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise(0, size_bytes, mmap.MADV_HUGEPAGE)  # A kernel without them: ordinary pages, then.

    @property
    def committed_bytes(self) -> int:
        return self._committed.size

    def holds(self, base: int, size: int) -> bool:
        return self._committed.cover(base, base + size)

    def mark(self, base: int, size: int) -> None:
        # One touch commits a whole huge page.
        end = -(-(base + size) // self._unit) * self._unit
        self._committed.add(base // self._unit * self._unit, min(end, self.memory.numel()))

    def populate(self, base: int, size: int) -> None:
        error = self._advise(base, size, MADV_POPULATE_WRITE)
        if error == EINVAL:  # an older kernel, or none of Linux
            self.memory[base : base + size : mmap.PAGESIZE] = 0
        elif error:
            raise MemoryError(f"{size} bytes could not be committed: {os.strerror(error)}")

    def trim(self, free: Sequence[tuple[int, int]], *, held_bytes: int) -> None:
        """From the top down: the arena grants from the bottom up, so what stays warm is granted next."""
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
        """0, or the error's number."""
        return _madvise(self.memory.data_ptr() + base, size, advice) and ctypes.get_errno()


class DevicePages:
    """Memory of an accelerator: all of it is taken at once, since its drivers serialise on every later
    allocation, and nobody else could use it meanwhile."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        try:
            self.memory: Tensor = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without it
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
