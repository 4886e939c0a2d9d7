"""Native connections prove the cluster token at both ends, and strangers keep no engine out."""

import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.shard import frame_loop
from farshore.attention_offload.shard.frame_loop import FrameListener
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.transport import handshake
from farshore.attention_offload.transport.frames import REMOTE, Transport, native
from farshore.cluster_token import ClusterToken
from farshore.errors import Unauthenticated
from farshore.ids import SequenceId

DEADLINE_S = 60.0
NATIVE = (Transport.SHARED_MEMORY, Transport.TCP)
OFFER = bytes(range(handshake.OFFER_BYTES))

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")


@pytest.fixture
def tokens(tmp_path):
    """Two tokens."""
    return [ClusterToken.make(tmp_path / name) for name in ("ours", "another")]


@pytest.fixture
def trusting(start_shard, tokens):
    """trusting(worker) -> a shard whose callers must prove the first token."""

    class Trusting(AttentionService):
        def __init__(self, worker, store):
            super().__init__(worker, store, token=tokens[0])

    return lambda worker="shard": start_shard(worker=worker, service=Trusting)


def handshaken(engine_token, shard_token, *, offers=(OFFER,)):
    """(the engine's error or None, the shard's offer or its error) of a handshake over a pair of sockets."""
    near, far = socket.socketpair()
    ends = {}

    def serve():
        with far:
            try:
                ends["shard"] = handshake.check_as_shard(
                    far, shard_token, offered=offers.__contains__, deadline_s=DEADLINE_S
                )
                far.sendall(handshake.WELCOME)
            except OSError as error:
                ends["shard"] = error

    thread = threading.Thread(target=serve)
    thread.start()
    with near:
        try:
            handshake.prove_as_engine(near, OFFER, engine_token, deadline_s=DEADLINE_S)
        except (OSError, Unauthenticated) as error:
            ends["engine"] = error
    thread.join(DEADLINE_S)
    return ends.get("engine"), ends["shard"]


def test_equal_tokens_and_none_agree(tokens):
    for token in (tokens[0], None):
        assert handshaken(token, token) == (None, OFFER)


@pytest.mark.parametrize(("engine", "shard"), [(0, 1), (0, None), (None, 0)])
def test_an_engine_finds_out_a_shard_with_another_token(tokens, engine, shard):
    """And proves nothing to it."""
    engine, shard = (None if which is None else tokens[which] for which in (engine, shard))
    told, served = handshaken(engine, shard)
    assert isinstance(told, Unauthenticated) and "copy one token file" in str(told)
    assert isinstance(served, OSError)


def test_an_offer_that_was_not_made_is_refused(tokens):
    told, served = handshaken(tokens[0], tokens[0], offers=())
    assert isinstance(told, ConnectionError) and isinstance(served, ConnectionError)


def test_a_proof_sent_back_is_no_proof(tokens):
    """A stranger with the offer, but without the token, returns what the shard sent; or as a shard, what the
    engine sent."""
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(DEADLINE_S)
        near.sendall(OFFER + bytes(32))
        results = []

        def serve():
            try:
                handshake.check_as_shard(far, tokens[0], offered=lambda _: True, deadline_s=DEADLINE_S)
            except OSError as error:
                results.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        answer = near.recv(64, socket.MSG_WAITALL)
        near.sendall(answer[32:])
        thread.join(DEADLINE_S)
        assert "another cluster token" in str(results[0])
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(DEADLINE_S)
        far.sendall(bytes(64))
        with pytest.raises(Unauthenticated):
            handshake.prove_as_engine(near, OFFER, tokens[0], deadline_s=DEADLINE_S)
        sent = far.recv(1000)
        assert len(sent) == 48, "an engine proves nothing to a shard that has not"


def test_a_handshake_that_drips_ends_at_its_deadline(tokens):
    """Each byte is in time, and all of them would take minutes."""
    near, far = socket.socketpair()
    ended = threading.Event()

    def drip():
        while not ended.wait(0.02):
            near.sendall(b"x")

    thread = threading.Thread(target=drip)
    with near, far:
        thread.start()
        with pytest.raises(TimeoutError):
            handshake.check_as_shard(far, tokens[0], offered=lambda _: True, deadline_s=0.2)
        ended.set()
        thread.join(DEADLINE_S)


def test_the_user_of_a_unix_socket_is_known(monkeypatch):
    near, far = socket.socketpair()
    with near, far, socket.socket() as tcp:
        assert handshake.is_own_user(near) and handshake.is_own_user(tcp)
        monkeypatch.setattr(handshake.os, "geteuid", lambda: 4_000_000)
        assert not handshake.is_own_user(near) and handshake.is_own_user(tcp)
        with pytest.raises(Unauthenticated, match="another user"):
            handshake.prove_as_engine(near, OFFER, None, deadline_s=DEADLINE_S)


# -- a shard and its engines -------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", REMOTE)
def test_an_engine_with_the_token_is_served_over_every_transport(trusting, reach, work, tokens, transport):
    shard = trusting()
    client = reach(shard.address, transports=(transport,), token=tokens[0])
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    local = InProcessClient(shard.worker, shard.store, work.model)
    assert work.run(client, step) == work.run(local, step)
    assert client.transport is client.bulk_transport is transport
    second = client.second_connection()
    second.connect()
    assert second.transport is transport


@pytest.mark.parametrize("which", [None, 1])
@pytest.mark.parametrize("transports", [REMOTE, *((one,) for one in REMOTE)], ids=str)
def test_an_engine_without_the_token_is_refused(trusting, reach, tokens, which, transports):
    client = reach(trusting().address, transports=transports, token=which and tokens[which])
    for call in (client.connect, client.identify, client.store.announce):
        with pytest.raises(Unauthenticated, match="token"):
            call()


def test_a_shard_copies_from_another_with_the_token(trusting, reach, work, tokens):
    source, target = trusting("source"), trusting("target")
    from_source, from_target = (reach(shard.address, token=tokens[0]) for shard in (source, target))
    read = work.sealed_span(from_source.store, "a", 0, 20)
    imported = from_target.import_span(
        source.address, read.span, tokens=20, holder=SequenceId("a"), deadline_s=DEADLINE_S
    )
    assert target.store.digest(imported.span, 20) == source.store.digest(read.span, 20)


def test_another_process_at_the_shards_address_is_found_out(start_shard, reach, tokens, monkeypatch):
    """It answers over gRPC, and offers sockets; an engine gives it no frame."""
    imposter = start_shard()
    for transports in (REMOTE, NATIVE):
        with pytest.raises(Unauthenticated, match="does not prove this cluster's token"):
            reach(imposter.address, transports=transports, token=tokens[0]).connect()


def strange(listener, *, unix):
    connection = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    connection.settimeout(DEADLINE_S)
    connection.connect(f"\0{listener.unix_name}" if unix else listener.tcp_address)
    return connection


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "TCP"])
@pytest.mark.parametrize("sent", [b"", b"x" * 7, b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100])
def test_strangers_keep_no_engine_out_and_stall_no_frame(trusting, reach, work, tokens, unix, sent):
    """More of them than the listener has places for, at both of the shard's ports."""
    shard = trusting()
    transport = Transport.SHARED_MEMORY if unix else Transport.TCP
    client = reach(shard.address, transports=(transport,), token=tokens[0])
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    threads = threading.active_count()
    with ExitStack() as stack:
        for count in range(3 * frame_loop.MAX_UNPROVEN):
            stack.enter_context(strange(shard.service.listener, unix=unix)).sendall(sent)
            if count % frame_loop.MAX_UNPROVEN == 0:
                host, _, port = shard.address.rpartition(":")
                stack.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
                assert work.run(client, step) == expected
        newcomer = reach(shard.address, transports=(transport,), token=tokens[0])
        newcomer.connect()
        assert work.run(newcomer, step) == expected == work.run(client, step)
        assert client.transport is newcomer.transport is transport
        until_s = time.monotonic() + DEADLINE_S
        while threading.active_count() > threads + frame_loop.MAX_UNPROVEN + 2:
            assert time.monotonic() < until_s, "a thread for each stranger"


def test_a_stranger_is_disconnected_in_time(tokens, monkeypatch):
    monkeypatch.setattr(frame_loop, "HANDSHAKE_DEADLINE_S", 0.1)
    listener = FrameListener("127.0.0.1", token=tokens[0])
    try:
        for unix in (True, False):
            with strange(listener, unix=unix) as connection:
                assert connection.recv(1) == b""
    finally:
        listener.close()


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "TCP"])
def test_a_listener_outlives_a_thread_that_cannot_start(tokens, monkeypatch, unix):
    """More connections than the table holds, so that one that stayed there would be noticed."""
    monkeypatch.setattr(frame_loop, "ACCEPT_RETRY_S", 0.0)
    monkeypatch.setattr(frame_loop, "MAX_CONNECTIONS", 0)
    monkeypatch.setattr(frame_loop, "MAX_UNPROVEN", 1)
    monkeypatch.setattr(frame_loop, "HANDSHAKE_DEADLINE_S", 0.1)
    listener = FrameListener("127.0.0.1", token=tokens[0])
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "frames":
            raise RuntimeError("can't start new thread")
        start(thread)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            for _ in range(3):
                with strange(listener, unix=unix) as connection, suppress(ConnectionError):
                    assert connection.recv(1) == b""
        served = threading.Event()
        monkeypatch.setattr(listener, "_admit", lambda connection: lambda *_: served.set())
        with strange(listener, unix=unix):
            assert served.wait(DEADLINE_S)
    finally:
        listener.close()


def test_an_offer_is_taken_once_and_by_an_engine_only(tokens):
    """A stranger who saw it on the network can neither use it nor use it up."""
    served = []
    listener = FrameListener("127.0.0.1", token=tokens[0])
    try:
        offer = listener.expect(lambda connection, unix: served.append(unix), tcp=True).token
        with strange(listener, unix=False) as connection, pytest.raises(Unauthenticated):
            handshake.prove_as_engine(connection, offer, tokens[1], deadline_s=DEADLINE_S)
        with strange(listener, unix=True) as connection:
            handshake.prove_as_engine(connection, offer, tokens[0], deadline_s=DEADLINE_S)
        with strange(listener, unix=True) as connection, pytest.raises(ConnectionError):
            handshake.prove_as_engine(connection, offer, tokens[0], deadline_s=DEADLINE_S)
    finally:
        listener.close()
    assert served == [True]
