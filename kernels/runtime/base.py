"""The contract of a device runtime: streams, events, pinned buffers and graphs of one accelerator.

Everything that an engine or a shard does asynchronously on a device goes through this contract. So the same
code runs on CUDA (:mod:`.cuda`), at once on any device (:mod:`.immediate`), and, in tests, with its work
deferred and reordered at random (:mod:`.deferring`), which finds a missing event without a GPU. Called by the
engine, by shards and by the loading of weights. It must not know what the work computes.

The host submits work to streams; the work runs later. The work of one stream runs in the order in which it
was submitted. The order between two streams, and between a stream and the host, is that of events only::

    compute   ── project ──● ready ── attend ────────────────▶
    copies                 └─ wait(ready) ── download q ──● sent ─▶
    host                                                  └─ sent.wait() ── reads the pinned buffer
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], object]
"""Launches work on the current stream. It may run later, so it must not read what the host changes meanwhile:
bind views and numbers when it is submitted. Its result is ignored."""


class Event(Protocol):
    """A point in the work of a stream. Thread-safe."""

    def wait(self) -> None:
        """Blocks the calling thread until all work before the event has run. Raises the work's error."""


class PinnedBuffer(Protocol):
    """Host memory that a device copies from and to without the host's help.

    The host asks for the tensor each time that it uses it. It may read after it has waited for the event
    behind the last download, and write after it has waited for an event behind the last copy of either kind.
    """

    def read(self) -> Tensor:
        """The tensor on the host, for reading. The deferring runtime raises :class:`OrderError` unless the
        host has waited for the downloads into it."""

    def write(self) -> Tensor:
        """The tensor on the host, to be overwritten. The deferring runtime raises :class:`OrderError` unless
        the host has waited for all copies from and into it."""

    def first(self, count: int) -> "PinnedBuffer":
        """The first ``count`` entries of the first dimension. Shares the memory, and what is known of it."""


class Stream(Protocol):
    """Submits work in order. Work of two streams may run at the same time. One thread uses a stream at a
    time."""

    def run(self, work: Work) -> None:
        """Submits ``work``. Tensors that it uses must live until it has run: those that it allocates do, on
        this stream. Plain calls of PyTorch that make them are ordered with it only by an event, or in the
        thread that entered the runtime."""

    def replay(self, key: Hashable, work: Work) -> None:
        """Submits ``work`` as a graph: the first calls with ``key`` on this stream run ``work``; later calls
        repeat what these launched, on the same memory, without calling ``work``.

        So ``work`` must read and write tensors that stay where they are, and must not wait, copy from the
        host or depend on numbers that change."""

    def forget(self, key: Hashable) -> None:
        """Drops the graph of ``key``, if there is one, once it has run."""

    def upload(self, source: PinnedBuffer, target: Tensor) -> None:
        """Submits a copy from pinned memory to ``target``, of the same shape and dtype, on the device."""

    def download(self, source: Tensor, target: PinnedBuffer) -> None:
        """Submits a copy from ``source``, on the device, to pinned memory of the same shape and dtype."""

    def send(self, values: Tensor) -> Tensor:
        """Returns a new tensor on the device that this stream's later work sees with the ``values`` of a host
        tensor. The caller may change ``values`` at once. For small tensors: the host copies them once."""

    def record(self) -> Event:
        """Returns an event behind all work that was submitted so far."""

    def wait(self, event: Event) -> None:
        """Lets the stream's later work run after ``event``. Returns at once."""


class DeviceRuntime(Protocol):
    """Makes the streams and the pinned buffers of one device. Thread-safe."""

    @property
    def device(self) -> torch.device: ...

    @property
    def is_host(self) -> bool:
        """Whether the device is the host: nothing needs a copy to reach it, nor an event to be ordered."""

    @property
    def main(self) -> Stream:
        """The stream of the thread that entered :meth:`entered`. Calls of PyTorch that this thread makes
        outside of ``run`` are ordered with the stream's work after a :meth:`settle`."""

    def stream(self) -> Stream:
        """A new stream."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> PinnedBuffer:
        """New pinned memory, with undefined contents."""

    def pin(self, values: Tensor) -> PinnedBuffer:
        """New pinned memory with the values of a tensor, which may lie on a device if the work that computes
        them has run. Any thread may call this."""

    def entered(self) -> AbstractContextManager[object]:
        """Makes the device and ``main`` those of the calling thread meanwhile. The work of ``main`` runs
        after all plain calls of PyTorch that other threads have made."""

    def settle(self) -> None:
        """After it, plain calls of PyTorch by the thread of ``main`` see the results of the work on ``main``
        so far. Costs nothing on CUDA, which runs such calls on ``main`` too."""


class OrderError(AssertionError):
    """Memory was read or reused before the event that its order needs. Raised by the deferring runtime."""
