"""Fixed memory on the device for the plan of one micro-batch's attention to local KV.

A graph of a whole step holds attention's launches, which read the plan's tables: so these must lie at the
same addresses in every step. Called by ``micro_batch`` and, through the kernels' contract, by the kernels. It
must not know what the tables say.
"""

from collections.abc import Hashable

import torch
from torch import Tensor

from farshore.kernels.runtime.base import DeviceRuntime, PinnedBuffer, Stream

_LEAST_BYTES = 1 << 14


class DevicePlanRoom:
    """Implements :class:`~farshore.kernels.host.PlanRoom`. The work of the last step must have run when a
    plan is taken: it reads the last plan, and memory that the room gives up when it grows."""

    def __init__(self, runtime: DeviceRuntime, stream: Stream) -> None:
        """``stream``: that of the work that reads the plan."""
        self._runtime = runtime
        self._stream = stream
        self._on_host: PinnedBuffer = runtime.pinned(0, dtype=torch.uint8)
        self._tables = torch.empty(0, dtype=torch.uint8, device=runtime.device)
        self._scratch = torch.empty(0, device=runtime.device)
        self.shape: Hashable | None = None
        """Everything that the plan's launches depend on, with the place of the memory; None if no plan was
        taken: no graph can hold these kernels."""

    def take(self, tables: Tensor, *, scratch: int, shape: Hashable) -> tuple[Tensor, Tensor]:
        size = tables.numel()
        if size > self._tables.numel():
            capacity = max(_LEAST_BYTES, 1 << (size - 1).bit_length())
            self._on_host = self._runtime.pinned(capacity, dtype=torch.uint8)
            self._tables = torch.empty(capacity, dtype=torch.uint8, device=self._runtime.device)
        if scratch > self._scratch.numel():
            self._scratch = torch.empty(1 << (scratch - 1).bit_length(), device=self._runtime.device)
        on_host, on_device = self._on_host.first(size), self._tables[:size]
        on_host.write().copy_(tables)
        self._stream.upload(on_host, on_device)
        # Memory only grows, so its size names it.
        self.shape = shape, self._tables.numel(), self._scratch.numel()
        return on_device, self._scratch[:scratch]
