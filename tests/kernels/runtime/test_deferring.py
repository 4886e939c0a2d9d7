"""The deferring runtime: ordered programs give what they give at once, and a missing event is found."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.kernels.runtime.base import OrderError
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime

SIZE = 4
STREAMS, TENSORS, BUFFERS = 3, 3, 2


class Program:
    """Runs random operations, each ordered by events behind all that it conflicts with. ``forgotten``: the
    number of the wait that is left out, among those that concern a pinned buffer."""

    def __init__(self, runtime, forgotten=None):
        self.runtime = runtime
        self.streams = [runtime.stream() for _ in range(STREAMS)]
        self.tensors = [torch.full((SIZE,), float(i)) for i in range(TENSORS)]
        self.buffers = [runtime.pinned(SIZE, dtype=torch.float32) for _ in range(BUFFERS)]
        for i, buffer in enumerate(self.buffers):
            buffer.write().fill_(10.0 + i)
        self.last_write = {}
        self.last_reads = {}
        self.waits = 0
        self.forgotten = forgotten

    def order(self, stream, reads, writes):
        """Waits for what the accesses conflict with; returns a function that records them. ``stream``: None
        for the host."""
        before = [(name, self.last_write.get(name)) for name in dict.fromkeys(reads + writes)]
        before += [(name, event) for name in writes for event in self.last_reads.get(name, ())]
        for name, found in before:
            if found is None or found[0] == stream:
                continue
            if name[0] == "buffer":
                self.waits += 1
                if self.waits - 1 == self.forgotten:
                    continue
            if stream is None:
                found[1].wait()
            else:
                self.streams[stream].wait(found[1])

        def done():
            if stream is None:
                return
            event = stream, self.streams[stream].record()
            for name in reads:
                self.last_reads.setdefault(name, []).append(event)
            for name in writes:
                self.last_write[name] = event
                self.last_reads[name] = []

        return done

    def compute(self, stream, source, target):
        done = self.order(stream, [("tensor", source)], [("tensor", target)])
        a, b = self.tensors[source], self.tensors[target]
        self.streams[stream].run(lambda: b.mul_(0.5).add_(a))
        done()

    def upload(self, stream, buffer, target):
        done = self.order(stream, [("buffer", buffer)], [("tensor", target)])
        self.streams[stream].upload(self.buffers[buffer], self.tensors[target])
        done()

    def download(self, stream, source, buffer):
        done = self.order(stream, [("tensor", source)], [("buffer", buffer)])
        self.streams[stream].download(self.tensors[source], self.buffers[buffer])
        done()

    def host(self, buffer):
        self.order(None, [("buffer", buffer)], [("buffer", buffer)])
        self.buffers[buffer].write().copy_(self.buffers[buffer].read() + 1)

    def run(self, operations):
        for name, *arguments in operations:
            getattr(self, name)(*arguments)
        for stream in self.streams:
            stream.record().wait()
        return [tensor.tolist() for tensor in self.tensors] + [b.read().tolist() for b in self.buffers]


streams, tensors, buffers = (st.integers(0, n - 1) for n in (STREAMS, TENSORS, BUFFERS))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), streams, tensors, tensors),
        st.tuples(st.just("upload"), streams, buffers, tensors),
        st.tuples(st.just("download"), streams, tensors, buffers),
        st.tuples(st.just("host"), buffers),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.integers(0, 1000))
def test_an_ordered_program_gives_what_it_gives_at_once(operations, seed):
    assert Program(DeferringRuntime(seed=seed)).run(operations) == Program(ImmediateRuntime()).run(operations)


FAULTS = [
    [("upload", 0, 0, 0), ("host", 0)],
    [("download", 0, 0, 0), ("host", 0)],
    [("download", 0, 0, 0), ("upload", 1, 0, 1)],
    [("download", 0, 0, 0), ("download", 1, 1, 0)],
    [("upload", 0, 0, 0), ("download", 1, 1, 0)],
]


@pytest.mark.parametrize("operations", FAULTS)
@pytest.mark.parametrize("seed", range(8))
def test_a_missing_wait_for_a_pinned_buffer_raises(operations, seed):
    """Whether or not chance lets the copy run in time."""
    assert Program(DeferringRuntime(seed=seed)).run(operations)
    with pytest.raises(OrderError, match="wait for an event"):
        Program(DeferringRuntime(seed=seed), forgotten=0).run(operations)


def test_a_missing_wait_between_streams_gives_other_results():
    found = set()
    for seed in range(20):
        runtime = DeferringRuntime(seed=seed)
        first, second, x = runtime.stream(), runtime.stream(), torch.zeros(1)
        first.run(lambda x=x: x.add_(1))
        second.run(lambda x=x: x.mul_(10))
        for stream in (first, second):
            stream.record().wait()
        found.add(x.item())
    assert found == {1.0, 10.0}


def test_work_waits_until_the_host_does():
    late = 0
    for seed in range(20):
        runtime = DeferringRuntime(seed=seed)
        x = torch.zeros(1)
        runtime.main.run(lambda x=x: x.add_(1))
        event = runtime.main.record()
        late += x.item() == 0.0
        event.wait()
        assert x.item() == 1.0
    assert late


def test_a_graph_repeats_what_it_recorded_on_the_same_memory():
    """A number that changes shows: CUDA would keep the first one, too."""
    runtime = DeferringRuntime(seed=0)
    x, total, calls = torch.ones(3), torch.zeros(3), []

    def work():
        calls.append(len(calls))
        total.add_(torch.nn.functional.linear(x, torch.eye(3) * 2) * (1 + len(calls)))

    for step in range(4):
        x.fill_(float(step + 1))
        runtime.main.replay("work", work)
        runtime.settle()
    assert calls == [0, 1]
    assert total.tolist() == [2 * 2 * 1.0 + 3 * 2 * 2.0 + 3 * 2 * 3.0 + 3 * 2 * 4.0] * 3


def test_a_graph_is_forgotten_behind_its_last_run():
    runtime = DeferringRuntime(seed=0)
    calls = []
    for _ in range(2):
        for _ in range(3):
            runtime.main.replay("work", lambda: calls.append(1))
        runtime.main.forget("work")
    runtime.settle()
    assert len(calls) == 4


def test_a_tensor_may_change_after_it_was_sent():
    for seed in range(10):
        runtime = DeferringRuntime(seed=seed)
        values = torch.arange(3)
        sent = runtime.main.send(values)
        values.zero_()
        runtime.settle()
        assert sent.tolist() == [0, 1, 2]


def test_an_error_of_work_is_raised_by_the_wait_behind_it():
    runtime = DeferringRuntime(seed=0)
    other = runtime.stream()
    runtime.main.run(lambda: torch.zeros(2) @ torch.zeros(3))
    other.wait(runtime.main.record())
    behind = other.record()
    with pytest.raises(RuntimeError, match="size"):
        behind.wait()
    other.run(lambda: None)
    other.record().wait()


def test_another_thread_may_wait():
    runtime = DeferringRuntime(seed=0)
    buffer = runtime.pinned(1, dtype=torch.float32)
    runtime.main.download(torch.full((1,), 7.0), buffer)
    event, read = runtime.main.record(), []
    thread = threading.Thread(target=lambda: read.append((event.wait(), buffer.read().item())))
    thread.start()
    thread.join()
    assert read == [(None, 7.0)]
