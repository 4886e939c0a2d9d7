"""The CUDA runtime on stand-ins for PyTorch's streams, events and graphs, which keep what they were given.

PyTorch's streams are 32 of each priority, given out in turn, and so are the stand-ins'. Tests on a GPU
are those of the engine and the store; these hold what a GPU shows only now and then.
"""

import gc
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from farshore.kernels.runtime.cuda import CudaRuntime

DEVICE = torch.device("cuda", 0)
DEFAULT = ("default", 0)


class Cuda:
    """What was submitted, as (stream, what), in order. ``current``: the calling thread's stream."""

    def __init__(self):
        self.log = []
        self.current = DEFAULT
        self.capturing = None
        self.made = {0: count(), -1: count()}

    def submit(self, stream, what):
        assert stream != self.capturing or what in ("work", "begin", "end"), f"{what} became part of a graph"
        self.log.append((stream, what))

    def install(self, monkeypatch):
        cuda = self

        class Stream:
            def __init__(self, device, priority=0):
                self.name = priority, next(cuda.made[priority]) % 32

            def wait_event(self, event):
                cuda.submit(self.name, ("waits for", *event.place))

        class Event:
            def record(self, stream=None):
                name = cuda.current if stream is None else stream.name
                self.place = name, sum(where == name for where, _ in cuda.log)
                cuda.submit(name, "record")

        class CUDAGraph:
            def capture_begin(self, *, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                cuda.capturing = cuda.current
                cuda.submit(cuda.current, "begin")

            def capture_end(self):
                cuda.submit(cuda.current, "end")
                cuda.capturing = None

            def replay(self):
                cuda.submit(cuda.current, "replay")

        @contextmanager
        def stream(entered):
            before, cuda.current = cuda.current, entered.name
            try:
                yield
            finally:
                cuda.current = before

        @contextmanager
        def device(entered):
            yield

        for made in (Stream, Event, CUDAGraph, stream, device):
            monkeypatch.setattr(torch.cuda, made.__name__, made)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    made.install(monkeypatch)
    return made


def test_a_graph_is_captured_where_no_other_thread_submits(cuda):
    """With more streams than PyTorch has, others submit to the graph's stream while it is captured."""
    runtime = CudaRuntime(DEVICE)
    streams = [runtime.stream() for _ in range(40)]
    assert len({stream._stream.name for stream in streams}) == 32

    def work():
        cuda.submit(cuda.current, "work")
        if cuda.capturing:
            for other in streams:
                other.run(lambda: cuda.submit(cuda.current, "a copy of another thread"))

    for stream in streams[:3]:
        for _ in range(3):
            stream.replay("key", work)
    for stream in streams[:3]:
        of_stream = [what for where, what in cuda.log if where == stream._stream.name]
        assert [what for what in of_stream if what in ("work", "replay")] == ["work", "replay", "replay"]
        assert [what for where, what in cuda.log if where == stream._capturing.name] == [
            "begin",
            "work",
            "end",
        ]
    assert len({stream._capturing.name for stream in streams[:3]}) == 3


def test_a_forgotten_graph_is_captured_anew(cuda):
    stream = CudaRuntime(DEVICE).stream()

    def replayed():
        before = len(cuda.log)
        stream.replay("key", lambda: cuda.submit(cuda.current, "work"))
        return [what for _, what in cuda.log[before:]]

    runs = [["work"], ["begin", "work", "end", "replay"], ["replay"]]
    assert [replayed() for _ in range(3)] == runs
    stream.forget("another key")
    assert replayed() == ["replay"]
    stream.forget("key")
    assert [replayed() for _ in range(3)] == runs


def test_work_that_cannot_be_captured_ends_its_capture(cuda):
    stream = CudaRuntime(DEVICE).stream()
    stream.replay("key", lambda: None)
    with pytest.raises(ZeroDivisionError):
        stream.replay("key", lambda: 1 / 0)
    assert cuda.capturing is None and cuda.current == DEFAULT
    stream.replay("key", lambda: cuda.submit(cuda.current, "work"))
    assert cuda.log[-1] == (stream._stream.name, "replay")


def test_no_garbage_is_collected_while_a_graph_is_captured(cuda):
    """A graph of an ended engine would be destroyed meanwhile, which CUDA does not permit."""
    stream = CudaRuntime(DEVICE).stream()
    seen = []

    def work():
        seen.append((cuda.capturing is not None, gc.isenabled()))
        if len(seen) == 2:
            raise ZeroDivisionError

    stream.replay("key", work)
    with pytest.raises(ZeroDivisionError):
        stream.replay("key", work)
    assert gc.isenabled()
    stream.replay("key", work)
    assert seen == [(False, True), (True, False), (True, False)]
    assert gc.isenabled()
    gc.disable()
    try:
        stream.replay("another", lambda: None)
        stream.replay("another", lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_main_runs_behind_what_made_the_model(cuda):
    """Weights that are joined and tables of angles are computed on the default stream."""
    runtime = CudaRuntime(DEVICE)
    cuda.submit(DEFAULT, "weights")
    with runtime.entered():
        assert cuda.current == runtime.main._stream.name
    assert cuda.current == DEFAULT
    assert cuda.log == [
        (DEFAULT, "weights"),
        (DEFAULT, "record"),
        (runtime.main._stream.name, ("waits for", DEFAULT, 1)),
    ]
