"""The device runtime of a CUDA device. Chosen by :func:`farshore.kernels.select.device_runtime`.

Nothing here waits for the whole device. PyTorch has 32 streams of each priority on a device, and gives them
out in turn, so two streams of this module may be one of CUDA's. That costs overlap and is no error, except
while a graph is captured: what another thread submits to the stream would become part of the graph. So graphs
are captured on streams of the high priority, which nothing else uses. The mode is ``thread_local``: other
threads copy KV meanwhile, and calls that a capture does not allow are theirs to make.
"""

import gc
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from farshore.kernels.host import HOST
from farshore.kernels.runtime.base import Event, PinnedBuffer, Work
from farshore.kernels.runtime.immediate import HostBuffer


def finish_calls(device: torch.device) -> None:
    """Blocks until PyTorch's calls of this thread on a CUDA ``device`` have run. Returns at once for the
    CPU, and for fake tensors."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Keeps Python from collecting garbage, in all threads. The capture of a graph needs it: an earlier
    engine's graphs lie in cycles, and destroying one while another is captured makes the capture invalid."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaRuntime:
    """Implements :class:`~farshore.kernels.runtime.base.DeviceRuntime`."""

    is_host = False

    def __init__(self, device: torch.device) -> None:
        """``device`` must name its number: ``cuda:0``."""
        self.device = device
        self.main = CudaStream(device)

    def stream(self) -> "CudaStream":
        return CudaStream(self.device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> HostBuffer:
        return HostBuffer(torch.empty(shape, dtype=dtype, device=HOST, pin_memory=True))

    def pin(self, values: Tensor) -> HostBuffer:
        return HostBuffer(_pinned(values))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A model was made on PyTorch's default stream, for which PyTorch's other streams do not wait."""
        with torch.cuda.device(self.device):
            made = torch.cuda.Event()
            made.record()
            self.main.wait(CudaEvent(made))
            with self.main.current():
                yield

    def settle(self) -> None:
        """The thread's calls run on ``main``."""


class CudaEvent:
    """A CUDA event that was recorded. A thread that waits for it spins: frames wait for microseconds."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


_CAPTURING_PRIORITY = -1


class CudaStream:
    """A stream with its graphs, which share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._capturing: torch.cuda.Stream | None = None
        """Where its graphs are captured. Not shared with other streams' graphs, which run at the same time:
        cuBLAS has a scratch for each stream that it was called on, captured or not."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        """None: the key's work has run once, so that libraries have chosen algorithms and scratch."""
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def run(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def replay(self, key: Hashable, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            if key not in self._graphs:
                work()
                self._graphs[key] = None
                return
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = self._captured(work)
            graph.replay()

    def forget(self, key: Hashable) -> None:
        """CUDA frees a graph that is still running when it ends."""
        self._graphs.pop(key, None)

    def upload(self, source: PinnedBuffer, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source.read(), non_blocking=True)

    def download(self, source: Tensor, target: PinnedBuffer) -> None:
        with torch.cuda.stream(self._stream):
            target.write().copy_(source, non_blocking=True)

    def send(self, values: Tensor) -> Tensor:
        """PyTorch keeps the pinned copy until the transfer is over."""
        with torch.cuda.stream(self._stream):
            return _pinned(values).to(self._device, non_blocking=True)

    def record(self) -> CudaEvent:
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent), "the event is of another runtime"
        self._stream.wait_event(event.event)

    def _captured(self, work: Work) -> torch.cuda.CUDAGraph:
        """Captures ``work``, which does not run meanwhile. ``torch.cuda.graph`` would also wait for the whole
        device."""
        if self._capturing is None:
            self._capturing = torch.cuda.Stream(self._device, priority=_CAPTURING_PRIORITY)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._capturing), collection_paused():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph


def _pinned(values: Tensor) -> Tensor:
    """A contiguous copy in pinned memory; the copy of a view with gaps would not be asynchronous."""
    return torch.empty(values.shape, dtype=values.dtype, device=HOST, pin_memory=True).copy_(values)
