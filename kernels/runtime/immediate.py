"""A device runtime without asynchrony: all work has run when it was submitted.

For the CPU, whose memory the host reads as it is; and for PyTorch's fake tensors on any device, where
streams, events and pinned memory do not work. Called by the engine and by tests. It must not know CUDA.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from farshore.kernels.host import HOST
from farshore.kernels.runtime.base import Event, PinnedBuffer, Work


class ImmediateRuntime:
    """Implements :class:`~farshore.kernels.runtime.base.DeviceRuntime`."""

    def __init__(self, device: torch.device = HOST, *, is_host: bool | None = None) -> None:
        """``is_host``: None if it follows from the device. Tests give False for the CPU, to run there what
        runs on a GPU."""
        self.device = device
        self.is_host = device == HOST if is_host is None else is_host
        self.main = ImmediateStream(device)

    def stream(self) -> "ImmediateStream":
        return ImmediateStream(self.device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> "HostBuffer":
        return HostBuffer(torch.empty(shape, dtype=dtype, device=HOST))

    def pin(self, values: Tensor) -> "HostBuffer":
        return HostBuffer(values)

    @contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def settle(self) -> None:
        """Nothing is under way."""


class HostBuffer:
    """Host memory, pinned or not, whose order nothing checks."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read(self) -> Tensor:
        return self._tensor

    def write(self) -> Tensor:
        return self._tensor

    def first(self, count: int) -> "HostBuffer":
        return HostBuffer(self._tensor[:count])


class ImmediateStream:
    """Runs work when it is submitted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, work: Work) -> None:
        work()

    def replay(self, key: Hashable, work: Work) -> None:
        work()

    def forget(self, key: Hashable) -> None:
        """There are no graphs."""

    def upload(self, source: PinnedBuffer, target: Tensor) -> None:
        target.copy_(source.read())

    def download(self, source: Tensor, target: PinnedBuffer) -> None:
        target.write().copy_(source)

    def send(self, values: Tensor) -> Tensor:
        return values.clone() if values.device == self._device else values.to(self._device)

    def record(self) -> Event:
        return _Passed()

    def wait(self, event: Event) -> None:
        pass


class _Passed:
    """An event that has passed when it is recorded."""

    def wait(self) -> None:
        pass
