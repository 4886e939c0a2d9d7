"""Bulk KV: every format and every way, the same bytes; pieces of bounded size; two threads at once."""

import socket
import threading

import pytest
import torch

from farshore.attention_offload.transport import bulk
from farshore.attention_offload.transport.bulk import BulkSocket
from farshore.attention_offload.transport.frames import Transport
from farshore.ids import SequenceId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey

DEADLINE_S = 60.0
A = SequenceId("a")
LATENT = AttentionSpec(4, 1, 1, 72, 64, scale=0.2, v_in_k=True)


def span_of(store, work, layout, tokens, name="a"):
    key = SpanKey(sequence=SequenceId(name), layer_class=0, first=0, group0=0, group1=layout.groups)
    return store.create(key, capacity_tokens=tokens, layout=layout, epoch=work.owner)


def rows(heads, tokens, dim, dtype, *, token_major):
    shape = (tokens, heads, dim) if token_major else (heads, tokens, dim)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(dim)).to(dtype)
    return values.transpose(0, 1) if token_major else values


@pytest.mark.parametrize("format", KVFormat)
@pytest.mark.parametrize("latent", [False, True], ids=["K and V", "V in K"])
@pytest.mark.parametrize("token_major", [False, True], ids=["heads first", "tokens first"])
def test_what_is_read_is_what_an_equal_local_store_gives(
    shard, start_shard, connect, work, format, latent, token_major, monkeypatch
):
    monkeypatch.setattr(bulk, "PIECE_BYTES", 1000)  # several pieces, none of whole blocks
    spec = LATENT if latent else work.spec
    layout = KVLayout.of(spec, layers=2, format=format)._replace(block_tokens=16)
    remote, local = connect(shard.address).store, start_shard().store
    dtype = torch.float32 if format.quantised else format.dtype
    k = rows(layout.k_heads, 45, layout.k_dim, dtype, token_major=token_major)
    v = (
        k[..., : layout.v_dim]
        if latent
        else rows(layout.v_heads, 45, layout.v_dim, dtype, token_major=token_major)
    )
    spans = [span_of(store, work, layout, 45) for store in (remote, local)]
    for store, span in zip((remote, local), spans, strict=True):
        for layer in range(2):
            store.write(span, layer, 0, k[:, :30], v[:, :30], sequence=A, epoch=work.owner)
            store.write(span, layer, 30, k[:, 30:], v[:, 30:], sequence=A, epoch=work.owner)
    digests = [
        store.seal(span, 45, sequence=A, epoch=work.owner)
        for store, span in zip((remote, local), spans, strict=True)
    ]
    assert digests[0] == digests[1]
    for first, last in ((0, 45), (7, 41), (16, 32), (44, 45), (3, 3)):
        for wanted in (None, torch.uint8):
            got, expected = (
                store.read(span, 1, first, last, sequence=A, dtype=wanted)
                for store, span in zip((remote, local), spans, strict=True)
            )
            for mine, theirs in zip(got, expected, strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.TCP])
def test_no_message_of_a_pull_is_longer_than_a_piece(shard, connect, work, transport, monkeypatch):
    """What bounds the memory of both ends, and the time that anything else waits for."""
    sizes = []
    receive = BulkSocket.receive

    def noted(self, **options):
        head = receive(self, **options)
        sizes.append(head.payload_bytes)
        return head

    monkeypatch.setattr(BulkSocket, "receive", noted)
    monkeypatch.setattr("farshore.attention_offload.shard.bulk_loop.PIECE_BYTES", 1000)
    store = connect(shard.address).store
    read = work.sealed_span(store, "a", 0, 200)
    sizes.clear()
    store.read(read.span, 0, 0, 200, sequence=A)
    assert sum(sizes) == 200 * work.layout.layer_token_bytes
    assert max(sizes) <= 1000


PROGRESS_S = 2.0


@pytest.mark.heavy
def test_a_transfer_is_late_when_it_stands_still_and_not_when_it_is_slow():
    """Eight bytes take longer than the deadline in all, and none of them does; then no more come."""
    near, far = socket.socketpair()
    wire = BulkSocket(near, deadline_s=PROGRESS_S)
    room = torch.zeros(9, dtype=torch.uint8)
    pause = threading.Event()

    def trickle():
        for i in range(8):
            far.sendall(bytes([i + 1]))
            pause.wait(PROGRESS_S / 5)

    with far:
        sender = threading.Thread(target=trickle)
        sender.start()
        with pytest.raises(TimeoutError):
            wire.receive_payload([room.data_ptr(), 9])
        sender.join(DEADLINE_S)
        assert room.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    wire.close()


@pytest.mark.parametrize("transport", [Transport.TCP])
def test_threads_take_turns(shard, connect, work, transport):
    """An engine's hand-offs run beside its prefill, on one store."""
    store = connect(shard.address).store
    read = work.sealed_span(store, "a", 0, 20)
    expected = store.read(read.span, 0, 0, 20, sequence=A)
    wrong = []

    def reader():
        for _ in range(20):
            got = store.read(read.span, 0, 0, 20, sequence=A)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                wrong.append(got)

    def writer():
        for i in range(10):
            work.sealed_span(store, f"w{i}", 0, 20)

    threads = [threading.Thread(target=it) for it in (reader, writer, reader)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not wrong and len(store.announce()) == 11


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.TCP])
def test_a_refusal_leaves_the_connection_in_use(shard, connect, work, transport):
    """The rest of a refused write is taken off the wire, however long it is."""
    store = connect(shard.address).store
    span = work.sealed_span(store, "a", 0, 20).span
    stream = store._bulk._connection
    for tokens in (1, 20, 20_000):
        with pytest.raises(Exception, match="write from 20"):
            store.write(span, 0, 0, *work.tokens(tokens), sequence=A, epoch=work.owner)
    assert store.read(span, 0, 0, 20, sequence=A)[0].shape[1] == 20
    assert store._bulk._connection is stream is not None
