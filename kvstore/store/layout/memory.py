"""Copies tokens between an arena and tensors: at once in host memory, by streams on a device.

A device copies to and from pinned memory, in a stream that the call has to itself, and a call waits for its
own copies only. When it returns, they are done: so whatever reads the tokens afterwards, in any stream, sees
them, and whatever the call read from may be freed. No call waits for the device. All memory that a call needs
there is allocated in its stream: PyTorch reuses freed memory in the order of the stream that it came from.

Called by ``store``, which knows which tokens may be written and read. It must not know spans.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from farshore.kernels.base import KVLayout
from farshore.kernels.host import HOST, address
from farshore.kernels.runtime.base import DeviceRuntime, Event, PinnedBuffer, Stream
from farshore.kernels.runtime.cuda import CudaRuntime
from farshore.kvstore.store.layout import blocks, images
from farshore.kvstore.store.layout.blocks import Bases
from farshore.kvstore.store.layout.images import ChunkRange


class KVMemory(Protocol):
    """The tokens of blocks in one memory. ``bases``: byte offsets of a range's blocks. Thread-safe."""

    @property
    def runtime(self) -> DeviceRuntime | None:
        """Of the memory's device; None for host memory."""

    def write(self, layout: KVLayout, bases: Bases, *, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        """As :func:`blocks.copy_in`. k and v may lie on the host, or on the memory's device if the work that
        computes them has run."""

    def write_image(self, layout: KVLayout, bases: Bases, chunk: ChunkRange, image: Tensor) -> None:
        """As :func:`images.write_image`, from an image on the host."""

    def read(
        self, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Copies of one layer's tokens, on the memory's device, as :func:`blocks.copy_out`. Work of a stream
        that uses them must have run before they are freed."""

    def images(
        self, layout: KVLayout, bases: Bases, chunks: Iterator[ChunkRange], *, offset: int
    ) -> Iterator[tuple[ChunkRange, Tensor]]:
        """Images on the host, as :func:`images.read_image`; each is valid until the next one is taken."""

    def runs(
        self, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int
    ) -> tuple[list[int], object]:
        """The tokens as stored, K before V, in host memory: a flat list of (address, bytes), and what keeps
        this memory alive."""


def kv_memory(memory: Tensor, runtime: DeviceRuntime | None = None) -> KVMemory:
    """The tokens in ``memory``, u8[bytes]. ``runtime``: of its device; None: a new one for a GPU, and none
    for host memory."""
    if runtime is None and memory.device == HOST:
        return HostMemory(memory)
    return DeviceMemory(memory, runtime or CudaRuntime(memory.device))


class HostMemory:
    """An arena in host memory. The memory itself is given out where no copy is needed."""

    runtime = None

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def write(self, layout: KVLayout, bases: Bases, *, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        blocks.copy_in(self._memory, layout, bases, layer=layer, first=first, k=k, v=v)

    def write_image(self, layout: KVLayout, bases: Bases, chunk: ChunkRange, image: Tensor) -> None:
        images.write_image(self._memory, layout, bases, chunk, image)

    def read(
        self, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        layers = range(layer, layer + 1)
        k, v = blocks.copy_out(
            self._memory, layout, bases, layers=layers, first=first, last=last, dtype=dtype
        )
        return k[0], v[0]

    def images(
        self, layout: KVLayout, bases: Bases, chunks: Iterator[ChunkRange], *, offset: int
    ) -> Iterator[tuple[ChunkRange, Tensor]]:
        for chunk in chunks:
            yield chunk, images.read_image(self._memory, layout, bases, chunk, offset=offset)

    def runs(
        self, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int
    ) -> tuple[list[int], object]:
        if layout.format.quantised:  # Scales are not adjacent to their rows.
            return _runs_of(self.read(layout, bases, layer=layer, first=first, last=last, dtype=torch.uint8))
        memory = self._memory
        return blocks.runs(memory, layout, bases, layer=layer, first=first, last=last), memory


class DeviceMemory:
    """An arena on a device."""

    def __init__(self, memory: Tensor, runtime: DeviceRuntime) -> None:
        self._memory = memory
        self.runtime: DeviceRuntime = runtime
        self._idle: deque[Stream] = deque()

    def write(self, layout: KVLayout, bases: Bases, *, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        with self._stream() as stream:
            there = [stream.send(x) if x.device == HOST else x for x in (k, v)]
            stream.run(
                partial(
                    blocks.copy_in,
                    self._memory,
                    layout,
                    bases,
                    layer=layer,
                    first=first,
                    k=there[0],
                    v=there[1],
                )
            )
            stream.record().wait()

    def write_image(self, layout: KVLayout, bases: Bases, chunk: ChunkRange, image: Tensor) -> None:
        with self._stream() as stream:
            there = stream.send(image)
            stream.run(partial(images.write_image, self._memory, layout, bases, chunk, there))
            stream.record().wait()

    def read(
        self, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        copied: list[Tensor] = []

        def copy() -> None:
            layers = range(layer, layer + 1)
            copied.extend(
                blocks.copy_out(
                    self._memory, layout, bases, layers=layers, first=first, last=last, dtype=dtype
                )
            )

        with self._stream() as stream:
            stream.run(copy)
            stream.record().wait()
        k, v = copied
        return k[0], v[0]

    def images(
        self, layout: KVLayout, bases: Bases, chunks: Iterator[ChunkRange], *, offset: int
    ) -> Iterator[tuple[ChunkRange, Tensor]]:
        """Downloads one image while the one before it is used."""
        under_way: deque[tuple[ChunkRange, Event, PinnedBuffer, Tensor]] = deque()
        with self._stream() as stream:
            for chunk in chunks:
                there = self._image(stream, layout, bases, chunk, offset)
                buffer = self.runtime.pinned(there.numel(), dtype=torch.uint8)
                stream.download(there, buffer)
                under_way.append((chunk, stream.record(), buffer, there))
                if len(under_way) > 1:
                    yield _arrived(*under_way.popleft())
            while under_way:
                yield _arrived(*under_way.popleft())

    def runs(
        self, layout: KVLayout, bases: Bases, *, layer: int, first: int, last: int
    ) -> tuple[list[int], object]:
        there = self.read(layout, bases, layer=layer, first=first, last=last, dtype=torch.uint8)
        with self._stream() as stream:
            buffers = [self.runtime.pinned(*x.shape, dtype=x.dtype) for x in there]
            for x, buffer in zip(there, buffers, strict=True):
                stream.download(x, buffer)
            stream.record().wait()
        return _runs_of([buffer.read() for buffer in buffers])

    def _image(
        self, stream: Stream, layout: KVLayout, bases: Bases, chunk: ChunkRange, offset: int
    ) -> Tensor:
        """The image on the device, for later work of the stream."""
        whole = images.whole_block(self._memory, layout, bases, chunk, offset)
        if whole is not None:
            return whole
        made: list[Tensor] = []
        read = partial(images.read_image, self._memory, layout, bases, chunk, offset=offset)
        stream.run(lambda: made.append(read()))
        stream.record().wait()
        return made[0]

    @contextmanager
    def _stream(self) -> Iterator[Stream]:
        """A stream that no other call uses meanwhile. There are as many as there were calls at a time."""
        try:
            stream = self._idle.popleft()
        except IndexError:
            stream = self.runtime.stream()
        try:
            yield stream
        finally:
            self._idle.append(stream)


def _arrived(
    chunk: ChunkRange, event: Event, buffer: PinnedBuffer, source: Tensor
) -> tuple[ChunkRange, Tensor]:
    """``source`` is kept until the event."""
    event.wait()
    return chunk, buffer.read()


def _runs_of(kv: Sequence[Tensor]) -> tuple[list[int], object]:
    return [number for x in kv for number in (address(x), x.nbytes)], kv
