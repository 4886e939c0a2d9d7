"""Bulk KV: equal bytes in every format and over every transport, bounded pieces, concurrent threads."""

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
def test_a_remote_store_reads_the_same_bytes_as_a_local_store(
    shard, start_shard, connect, work, format, latent, token_major, monkeypatch
):
    monkeypatch.setattr(
        bulk, "PIECE_BYTES", 1000
    )  # Gives several pieces, none of which is a whole number of blocks.
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
    """This limits the memory of both ends, and how long other work waits."""
    sizes = []
    receive = BulkSocket.receive

    def noted(self, **options):
        message = receive(self, **options)
        sizes.append(message.payload_bytes)
        return message

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
    """Eight bytes arrive, each within the deadline, in total after it. The ninth never arrives."""
    near, far = socket.socketpair()
    receiver = BulkSocket(near, deadline_s=PROGRESS_S)
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
            receiver.receive_payload([room.data_ptr(), 9])
        sender.join(DEADLINE_S)
        assert room.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    receiver.close()


@pytest.mark.parametrize("transport", [Transport.TCP])
def test_threads_share_a_connection(shard, connect, work, transport):
    """An engine's hand-offs and its prefill use one store concurrently."""
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

    threads = [threading.Thread(target=work_on) for work_on in (reader, writer, reader)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not wrong and len(store.announce()) == 11


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.TCP])
def test_a_refusal_leaves_the_connection_in_use(shard, connect, work, transport):
    """The shard reads the rest of a refused write, however long it is."""
    store = connect(shard.address).store
    span = work.sealed_span(store, "a", 0, 20).span
    stream = store._bulk._connection
    for tokens in (1, 20, 20_000):
        with pytest.raises(Exception, match="write from 20"):
            store.write(span, 0, 0, *work.tokens(tokens), sequence=A, epoch=work.owner)
    assert store.read(span, 0, 0, 20, sequence=A)[0].shape[1] == 20
    assert store._bulk._connection is stream is not None
