"""A device runtime on CPU memory that runs work late and in random order, and checks the order of buffers.

Tests run engines and shards on it to find ordering faults without a GPU. Work waits until the host waits for
an event behind it, or until chance lets it run; streams overtake each other wherever no event orders them. So
a missing event gives wrong results. Where it concerns a pinned buffer it raises OrderError, whatever chance
does: the runtime knows what happens before what, by a vector clock for each stream and one for the host, all
of whose threads count as one. It must not know CUDA.
"""

import random
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farshore.kernels.host import HOST
from farshore.kernels.runtime.base import Event, OrderError, PinnedBuffer, Work
from farshore.kernels.runtime.recorded import RecordedWork

EAGERNESS = 0.3
"""The probability that a call lets some work run at once, as a fast device would."""

Clock = dict[int, int]
"""Stream -> the number of its entries that are known to have run before."""


class DeferringRuntime:
    """Implements :class:`~farshore.kernels.runtime.base.DeviceRuntime`. Chance follows from ``seed``."""

    device = HOST
    is_host = False

    def __init__(self, *, seed: int) -> None:
        self.lock = threading.RLock()
        """Guards everything, and is held while work runs: no two threads run work."""
        self.host: Clock = {}
        self._random = random.Random(seed)
        self._streams: list[DeferringStream] = []
        self.main = self.stream()

    def stream(self) -> "DeferringStream":
        with self.lock:
            self._streams.append(DeferringStream(self, len(self._streams)))
            return self._streams[-1]

    def pinned(self, *shape: int, dtype: torch.dtype) -> "CheckedBuffer":
        return CheckedBuffer(self, _undefined(torch.empty(shape, dtype=dtype, device=HOST)), _Accesses())

    def pin(self, values: Tensor) -> "CheckedBuffer":
        return CheckedBuffer(self, values.clone(), _Accesses())

    @contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def settle(self) -> None:
        self.main.record().wait()

    def run_some(self) -> None:
        """Lets some work run, or none."""
        while self._random.random() < EAGERNESS and self._run_one():
            pass

    def run_until(self, event: "DeferredEvent") -> None:
        while not event.passed:
            assert self._run_one(), "events wait for events behind them"

    def _run_one(self) -> bool:
        """Runs the next entry of a random stream. Returns False if no stream can go on."""
        ready = [stream for stream in self._streams if stream.is_ready]
        if ready:
            self._random.choice(ready).run_next()
        return bool(ready)


@dataclass(slots=True, eq=False)
class DeferredEvent:
    """An event, and everything that happened before it."""

    runtime: DeferringRuntime
    before: Clock
    passed: bool = False
    error: Exception | None = None
    """The first error of the stream's work since its last event."""

    def wait(self) -> None:
        with self.runtime.lock:
            self.runtime.run_until(self)
            _advance(self.runtime.host, self.before)
            self.runtime.run_some()
            if self.error is not None:
                raise self.error


class DeferringStream:
    """A queue of entries: work to run, and events to wait for. Made by :class:`DeferringRuntime`."""

    def __init__(self, runtime: DeferringRuntime, number: int) -> None:
        self._runtime = runtime
        self._number = number
        self._clock: Clock = {}
        self._entries: deque[Work | DeferredEvent] = deque()
        self._graphs: dict[Hashable, RecordedWork | None] = {}
        self._error: Exception | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is an entry, and not one that waits for an event that has not passed."""
        return bool(self._entries) and getattr(self._entries[0], "passed", True)

    def run_next(self) -> None:
        """Runs the first entry. The caller holds the runtime's lock."""
        entry = self._entries.popleft()
        if isinstance(entry, DeferredEvent):
            self._error = self._error or entry.error
            return
        try:
            with torch.inference_mode():
                entry()
        except Exception as error:  # raised by the next wait for an event behind it
            self._error = self._error or error

    def run(self, work: Work) -> None:
        with self._runtime.lock:
            self._submit(work)

    def replay(self, key: Hashable, work: Work) -> None:
        with self._runtime.lock:
            self._submit(lambda: self._replay(key, work))

    def forget(self, key: Hashable) -> None:
        with self._runtime.lock:
            self._submit(lambda: self._graphs.pop(key, None))

    def upload(self, source: PinnedBuffer, target: Tensor) -> None:
        assert isinstance(source, CheckedBuffer), "the buffer is of another runtime"
        with self._runtime.lock:
            time = self._submit(lambda: _copy(source.tensor, target))
            source.accesses.read_by(self._number, time, self._clock)

    def download(self, source: Tensor, target: PinnedBuffer) -> None:
        assert isinstance(target, CheckedBuffer), "the buffer is of another runtime"
        with self._runtime.lock:
            time = self._submit(lambda: _copy(source, target.tensor))
            target.accesses.written_by(self._number, time, self._clock)

    def send(self, values: Tensor) -> Tensor:
        sent, target = values.clone(), _undefined(torch.empty_like(values))
        with self._runtime.lock:
            self._submit(lambda: _copy(sent, target))
        return target

    def record(self) -> DeferredEvent:
        with self._runtime.lock:
            event = DeferredEvent(self._runtime, {})
            self._submit(lambda: self._pass(event))
            event.before = dict(self._clock)
            return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, DeferredEvent), "the event is of another runtime"
        with self._runtime.lock:
            self._entries.append(event)
            _advance(self._clock, event.before)

    def _submit(self, entry: Work) -> int:
        """Appends an entry, and lets some work run. Returns the entry's number in this stream."""
        _advance(self._clock, self._runtime.host)
        time = self._clock[self._number] = self._clock.get(self._number, 0) + 1
        self._runtime.run_some()
        self._entries.append(entry)
        return time

    def _pass(self, event: DeferredEvent) -> None:
        event.error, self._error = self._error, None
        event.passed = True

    def _replay(self, key: Hashable, work: Work) -> None:
        """As on CUDA, the first run is a plain one and the second is recorded."""
        if key not in self._graphs:
            self._graphs[key] = None
            work()
            return
        graph = self._graphs[key]
        if graph is None:
            self._graphs[key] = RecordedWork(work)
        else:
            graph.repeat()


@dataclass(slots=True, eq=False)
class _Accesses:
    """The last copies from and into a buffer, as numbers of entries by stream."""

    reads: Clock = field(default_factory=dict)
    writes: Clock = field(default_factory=dict)

    def read_by(self, stream: int, time: int, clock: Clock) -> None:
        self.check(clock, reads=False, access=f"stream {stream} reads")
        self.reads[stream] = time

    def written_by(self, stream: int, time: int, clock: Clock) -> None:
        self.check(clock, reads=True, access=f"stream {stream} overwrites")
        self.writes[stream] = time

    def check(self, clock: Clock, *, reads: bool, access: str) -> None:
        """OrderError unless all downloads, and with ``reads`` all uploads, are before ``clock``."""
        for copies, kind in ((self.writes, "download into"), (self.reads if reads else {}, "upload from")):
            for stream, time in copies.items():
                if clock.get(stream, 0) < time:
                    raise OrderError(
                        f"{access} a pinned buffer before the {kind} it, entry {time} of stream {stream}:"
                        " wait for an event behind that entry"
                    )


class CheckedBuffer:
    """Pinned memory, with the order of the accesses to it."""

    def __init__(self, runtime: DeferringRuntime, tensor: Tensor, accesses: _Accesses) -> None:
        self._runtime = runtime
        self.tensor = tensor
        self.accesses = accesses

    def read(self) -> Tensor:
        with self._runtime.lock:
            self.accesses.check(self._runtime.host, reads=False, access="the host reads")
        return self.tensor

    def write(self) -> Tensor:
        with self._runtime.lock:
            self.accesses.check(self._runtime.host, reads=True, access="the host overwrites")
        return self.tensor

    def first(self, count: int) -> "CheckedBuffer":
        return CheckedBuffer(self._runtime, self.tensor[:count], self.accesses)


def _advance(clock: Clock, other: Clock) -> None:
    """Adds to ``clock`` what ``other`` knows."""
    for stream, time in other.items():
        clock[stream] = max(time, clock.get(stream, 0))


def _copy(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ValueError(
            f"a copy of {source.dtype} {tuple(source.shape)} to {target.dtype} {tuple(target.shape)}"
        )
    target.copy_(source)


def _undefined(tensor: Tensor) -> Tensor:
    """Fills a new tensor with values that spoil a result, but name no address outside of memory."""
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
