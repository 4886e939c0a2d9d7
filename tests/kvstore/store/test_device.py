"""The store in an accelerator's memory: on a runtime that runs the copies late and in random order, and on a
GPU where there is one. A copy that is not waited for gives wrong bytes, or raises OrderError.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.formats import KVFormat
from farshore.kernels.runtime.cuda import CudaRuntime
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kvstore.base import SpanKey
from farshore.kvstore.store import parity
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.layout import blocks
from farshore.kvstore.store.store import LocalStore

S, EPOCH = SequenceId("s"), Epoch(1)
TOKENS = 13


@pytest.fixture(params=["deferred 1", "deferred 2", "cuda"])
def new_store(request, monkeypatch):
    """new_store(kind) -> a new store, in host memory for "host" and on a device for "device"."""
    cuda = request.param == "cuda"
    if cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # As in a device's memory, PyTorch copies.
    monkeypatch.setattr(blocks, "native_for", lambda memory: None)
    stores = []

    def make(kind):
        runtime = None
        device = torch.device("cpu")
        if kind == "device":
            device = torch.device("cuda:0") if cuda else device
            runtime = CudaRuntime(device) if cuda else DeferringRuntime(seed=int(request.param[-1]))
        name = WorkerId(f"{kind}{len(stores)}")
        stores.append(LocalStore(worker=name, arena=Arena(64 * 4096, device=device), runtime=runtime))
        return stores[-1]

    yield make
    for store in stores:
        store.check_integrity()


@pytest.fixture
def written(tokens):
    """written(store, layout, seed) -> a span of 13 sealed tokens, written in pieces across blocks."""
    kept = {}

    def write(store, layout, name="s"):
        floats = layout._replace(format=KVFormat.FLOAT32) if layout.format.quantised else layout
        key = SpanKey(sequence=SequenceId(name), layer_class=0, first=0, group0=0, group1=layout.groups)
        span = store.create(key, capacity_tokens=TOKENS, layout=layout, epoch=EPOCH)
        for layer in range(layout.layers):
            k, v = kept.setdefault((name, layer), tokens(floats, TOKENS))
            for first, last in ((0, 4), (4, 5), (5, TOKENS)):
                of_piece = k[:, first:last], v[:, first:last]
                store.write(span, layer, first, *of_piece, sequence=key.sequence, epoch=EPOCH)
                if store.runtime is not None:
                    store._kv._idle.clear()  # As if other calls used the streams: no order comes from them.
        store.seal(span, TOKENS, sequence=key.sequence, epoch=EPOCH)
        return span

    return write


def same(ours, theirs):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def exported(store, span):
    return [(bytes(c.header), bytes(c.payload), c.checksum) for c in store.export(span, 0, TOKENS)]


def test_a_device_stores_the_bytes_that_a_host_stores(new_store, any_layout, written, content):
    device, host = new_store("device"), new_store("host")
    ours, theirs = written(device, any_layout), written(host, any_layout)
    assert device.digest(ours, TOKENS) == host.digest(theirs, TOKENS)
    assert device.digest(ours, 9) == host.digest(theirs, 9)
    for first, last in ((0, TOKENS), (3, 11), (12, TOKENS), (5, 5)):
        assert same(content(device, ours, first, last), content(host, theirs, first, last))
    elements = [store.read(span, 1, 2, 9, sequence=S) for store, span in ((device, ours), (host, theirs))]
    assert same(*elements) and elements[0][0].device == device.memory.device
    assert exported(device, ours) == exported(host, theirs)


@pytest.mark.parametrize("kinds", [("device", "host"), ("host", "device"), ("device", "device")])
def test_spans_move_between_memories(new_store, any_layout, written, content, kinds):
    source, target = map(new_store, kinds)
    span = written(source, any_layout)
    there = target.import_span(source.export(span, 0, TOKENS), sequence=SequenceId("t"), epoch=EPOCH)
    assert target.digest(there, TOKENS) == source.digest(span, TOKENS)
    ours = content(target, there, 0, TOKENS, sequence="t")
    assert same(ours, content(source, span, 0, TOKENS))


def test_what_was_written_or_imported_is_in_memory(new_store, layout, written, gather):
    """Kernels read it in streams of their own, without waiting for the store's."""
    host, target = new_store("host"), new_store("device")
    theirs = written(host, layout)
    spans = [written(target, layout)]
    spans.append(target.import_span(host.export(theirs, 0, TOKENS), sequence=SequenceId("t"), epoch=EPOCH))
    for span in spans:
        in_memory = [
            gather(store.memory.cpu(), layout, store.segments(of_store, 0, TOKENS), layer)
            for store, of_store in ((target, span), (host, theirs))
            for layer in range(layout.layers)
        ]
        for ours, expected in zip(in_memory[: layout.layers], in_memory[layout.layers :], strict=True):
            assert same(ours, expected)


def test_parity_on_a_host_rebuilds_a_span_on_a_device(new_store, any_layout, written, content):
    device, host = new_store("device"), new_store("host")
    lost, kept = (written(device, any_layout, name) for name in ("s", "k"))
    members = {
        span: parity.Member(device.chunk_images(span, 0, TOKENS), device.digest(span, TOKENS))
        for span in (lost, kept)
    }
    group = parity.encode(host, members, sequence=SequenceId("g"), epoch=EPOCH)
    (info,) = [info for info in host.announce() if info.span == group]
    rebuilt = parity.rebuild(
        device,
        lost,
        info.covers,
        parity=host.chunk_images(group, 0, TOKENS),
        survivors={kept: device.chunk_images(kept, 0, TOKENS)},
        sequence=SequenceId("r"),
        epoch=EPOCH,
    )
    ours = content(device, rebuilt, 0, TOKENS, sequence="r")
    assert same(ours, content(device, lost, 0, TOKENS))


def test_runs_of_a_device_are_the_stored_bytes_in_host_memory(new_store, any_layout, written):
    device = new_store("device")
    span = written(device, any_layout)
    with device.stored_runs(span, 1, 3, 11, sequence=S) as runs:
        sent = b"".join(map(ctypes.string_at, runs[::2], runs[1::2]))
    stored = device.read(span, 1, 3, 11, sequence=S, dtype=torch.uint8)
    assert sent == b"".join(x.cpu().numpy().tobytes() for x in stored)


def test_threads_write_and_read_at_the_same_time(new_store, layout, written, content):
    device, host = new_store("device"), new_store("host")
    names = [f"s{i}" for i in range(6)]
    expected = {name: content(host, written(host, layout, name), 0, TOKENS, sequence=name) for name in names}

    def run(name):
        span = written(device, layout, name)
        return all(same(content(device, span, 0, TOKENS, sequence=name), expected[name]) for _ in range(3))

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(run, names))


def test_an_abandoned_export_disturbs_no_other_copy(new_store, layout, written):
    device = new_store("device")
    span = written(device, layout)
    complete = exported(device, span)
    for taken in range(1, 3):
        chunks = device.export(span, 0, TOKENS)
        for _ in range(taken):
            next(chunks)
        chunks.close()
        assert exported(device, span) == complete
