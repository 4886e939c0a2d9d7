"""A shard whose store is on a device, on a runtime that runs its work late and in random order: every
transport gets the states that a shard in host memory gives.
"""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.shard.staged_frames import StagedFrame
from farshore.attention_offload.transport.frames import Transport, native
from farshore.errors import NotFound
from farshore.ids import SequenceId, WorkerId
from farshore.kernels.base import AttentionSpec
from farshore.kernels.formats import KVFormat
from farshore.kernels.host import address
from farshore.kernels.runtime.cuda import CudaRuntime
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.kernels.select import CPU_KERNELS
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import blocks
from farshore.kvstore.store.store import LocalStore

TRANSPORTS = [Transport.SHARED_MEMORY, Transport.TCP, Transport.GRPC]
HAS_CUDA = torch.cuda.is_available()


@pytest.fixture
def new_store(request, monkeypatch):
    """new_store(name, seed=...) -> a store on a device; without a seed, in host memory."""

    def make(name, *, seed=None):
        runtime, device = None, torch.device("cpu")
        if seed is not None:
            device = torch.device("cuda:0") if HAS_CUDA else device
            runtime = CudaRuntime(device) if HAS_CUDA else DeferringRuntime(seed=seed)
        return LocalStore(worker=WorkerId(name), arena=Arena(8 << 20, device=device), runtime=runtime)

    # As in a device's memory, PyTorch copies.
    monkeypatch.setattr(blocks, "native_for", lambda memory: None)
    return make


@pytest.fixture
def states(work):
    """states(client, store) -> the raw states of some steps: new and repeated reads, several rows."""

    def run(client, store):
        reads = [work.sealed_span(store, "a", 0, 40), work.sealed_span(store, "b", 0, 20)]
        second = reads[1]._replace(rows=range(1, 3))
        several = work.step([reads[0], second], positions=(100, 20, 30), number=2)
        steps = [work.step([reads[0]]), several, replace(several, step=3), work.step([reads[1]], number=4)]
        return [work.run(client, step) for step in steps]

    return run


def close(ours, theirs):
    """Whether raw states of float32 are equal up to rounding."""
    for pair in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            *(torch.tensor(raw, dtype=torch.uint8).view(torch.float32) for raw in pair)
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_reads_a_device(new_store, serve_store, reach, work, states, transport, seed):
    store = new_store("device", seed=seed)
    shard = serve_store(store, WorkerId("device"))
    client = reach(shard.address, transports=[transport])
    host = new_store("host")
    local = InProcessClient(WorkerId("host"), host, work.model)
    expected = states(local, host)
    ours = states(client, store)
    assert client.transport is transport
    for of_step, expected_of_step in zip(ours, expected, strict=True):
        close(of_step, expected_of_step)
    assert HAS_CUDA or ours == expected
    assert shard.service.identity().attended_bytes == local.identify().attended_bytes > 0


@pytest.mark.skipif(HAS_CUDA, reason="beside a GPU, triton compiles its kernels")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("format", [KVFormat.FLOAT32, KVFormat.BFLOAT16, KVFormat.INT8])
def test_triton_answers_frames(new_store, work, monkeypatch, format):
    """In the interpreter; states equal those of the native kernels up to rounding."""
    floats, layout = work.tokens, work.layout._replace(format=format)
    if format.quantised:
        work.tokens = lambda *args, **options: floats(*args, **options, format=KVFormat.FLOAT32)
    work.layout, work.model = layout, work.model._replace(layouts=(layout,))
    answers = []
    for name, seed in (("native", None), ("triton", 1)):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv(CPU_KERNELS, name)
        store = new_store(name, seed=seed)
        client = InProcessClient(WorkerId(name), store, work.model)
        reads = [work.sealed_span(store, "a", 0, 40), work.sealed_span(store, "b", 0, 20)]
        reads[1] = reads[1]._replace(rows=range(1, 3))
        answers.append(work.run(client, work.step(reads, positions=(100, 20, 30))))
    assert [kernels.__name__ for kernels in client._session._kernels] == ["farshore.kernels.gpu.ops"]
    close(*answers)


def test_engines_are_answered_at_the_same_time(new_store, serve_store, reach, work, states):
    """Each connection has a stream of its own, while others write to the same store."""
    store = new_store("device", seed=4)
    shard = serve_store(store, WorkerId("device"))
    read = work.sealed_span(store, "a", 0, 40)
    step = work.step([read])
    expected = work.run(reach(shard.address), step)

    def serve(number):
        client = reach(shard.address, transports=[TRANSPORTS[number % 3]], engine=f"engine {number}")
        for i in range(4):
            written = work.sealed_span(store, f"{number} {i}", 0, 20)
            assert work.run(client, replace(step, step=i + 2)) == expected
            assert store.digest(written.span, 20) == digest
        return True

    digest = store.digest(work.sealed_span(store, "b", 0, 20).span, 20)
    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(serve, range(3)))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_frame_on_a_dropped_span_is_refused(new_store, serve_store, reach, work, transport):
    store = new_store("device", seed=5)
    shard = serve_store(store, WorkerId("device"))
    client = reach(shard.address, transports=[transport])
    read = work.sealed_span(store, "a", 0, 40)
    work.run(client, work.step([read]))
    store.drop([read.span], sequence=SequenceId("a"), epoch=work.owner)
    with pytest.raises(NotFound):
        client.wait(client.send(0, 0, work.query()))


@pytest.mark.parametrize("bulk", TRANSPORTS)
def test_bulk_kv_of_a_device(new_store, serve_store, reach, work, bulk):
    """Written, pulled and imported over any connection, to and from a shard in host memory: equal bytes."""
    stores = new_store("device", seed=6), new_store("host")
    shards = [serve_store(store, store._worker) for store in stores]
    clients = [reach(shard.address, transports=[bulk]) for shard in shards]
    reads = [work.sealed_span(client.store, "a", 0, 40) for client in clients]
    pulled = [
        [x for layer in range(2) for x in client.store.read(read.span, layer, 3, 37, sequence=read.holder)]
        for client, read in zip(clients, reads, strict=True)
    ]
    assert all(map(torch.equal, *pulled))
    digests = [store.digest(read.span, 40) for store, read in zip(stores, reads, strict=True)]
    assert digests[0] == digests[1]
    for source, target in ((0, 1), (1, 0)):
        address, span, holder = shards[source].address, reads[source].span, reads[source].holder
        imported = clients[target].import_span(address, span, tokens=40, holder=holder, deadline_s=30.0)
        assert stores[target].digest(imported.span, 40) == digests[0]


def test_native_answers_are_checked():
    """Only a layer frame that was received can be answered."""
    near, far = socket.socketpair()
    wire = native().stream(near.detach(), 1.0, True, 0)
    with far, pytest.raises(RuntimeError, match="no layer frame waits"):
        native().question(wire, address(torch.empty(4, dtype=torch.uint8)), 4)
    with pytest.raises(RuntimeError, match="no layer frame waits"):
        native().answer(wire, 1, 4, 1, 4)
    with pytest.raises(RuntimeError, match="lse: the address is 0"):
        native().answer(wire, 0, 4, 1, 4)


def test_memory_of_frames_is_not_filled():
    """A fill would run on PyTorch's own stream, and might come after a frame in the connection's."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if result.device.type != "meta":
                calls.append(function)
            return result

    runtime = ImmediateRuntime(torch.device("cpu"), is_host=False)
    spec = AttentionSpec(4, 2, 2, 16, 8, scale=0.25)
    with Calls():
        frame = StagedFrame(runtime, runtime.stream(), spec, rows=3, heads=4, dtype=torch.bfloat16)
    assert {call.overloadpacket for call in calls} <= {torch.ops.aten.empty, torch.ops.aten.empty_like}
    assert len(calls) >= 6
    assert frame.fits(3, 4, torch.bfloat16) and not frame.fits(3, 2, torch.bfloat16)
