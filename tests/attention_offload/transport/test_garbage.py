"""Both ends' parsers receive arbitrary bytes, from hypothesis, over real sockets.

The connection must end with an error that names the fault, the store must stay intact, and the next
connection must work.
"""

import os
import secrets
import socket
import struct
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.attention_offload import codec
from farshore.attention_offload.transport.bulk import BulkConnection, BulkKind
from farshore.attention_offload.transport.frames import Sent, Transport, native
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.errors import FarshoreError, Internal, InvalidRequest, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

DEADLINE_S = 60.0
HEADER = struct.Struct("<IHBBI")
BULK_HEADER = struct.Struct("<B3xIQ")
LAYER, BEGIN, FAILURE, WAKE, REPEAT = range(5)
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_all(connection):
    """All bytes until the other end closes, which it must do long before the deadline."""
    data = b""
    try:
        while received := connection.recv(1 << 16):
            data += received
    except ConnectionResetError:
        pass
    return data


def header(kind, count, *, step=1, layer=0, micro_batch=0):
    return HEADER.pack(step, layer, micro_batch, kind, count)


def failure_in(data):
    """The last frame, which must be a FAILURE."""
    while data:
        _, _, _, kind, count = HEADER.unpack_from(data)
        payload, data = data[12 : 12 + count], data[12 + count :]
        if kind == FAILURE:
            assert not data
            return pb.Failure.FromString(payload)
    raise AssertionError("no failure")


# -- the shard's end, hot frames ---------------------------------------------------------------------------

NUMBERS = st.integers(0, 2**32 - 1)
FRAMES = st.tuples(
    NUMBERS | st.just(1),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 5),
    st.sampled_from([0, 1, 191, 192, 193, 2**32 - 1]) | NUMBERS,
)


@pytest.mark.parametrize("unix", [False, True], ids=["TCP", "shared memory"])
@FUZZ
@given(
    begun=st.booleans(),
    frames=st.lists(st.tuples(FRAMES, st.binary(max_size=200)), max_size=4),
    tail=st.binary(max_size=40),
)
def test_a_shard_survives_frames_of_all_kinds(target, unix, begun, frames, tail):
    """Frames are well-formed, truncated, reordered, oversized, or malformed."""
    with target.frames(unix) as connection:
        data = b""
        if begun and not unix:
            step = codec.step_to_pb(target.step).SerializeToString()
            data = header(BEGIN, len(step)) + step
        for (step, layer, micro_batch, kind, count), payload in frames:
            data += HEADER.pack(step, layer, micro_batch, kind, count) + payload
        try:
            connection.sendall(data + tail)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The shard has closed the connection already.
        read_all(connection)
    target.check(unix)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (header(9, 0), "garbage: a frame of kind 9"),
        (header(FAILURE, 3) + b"abc", "garbage"),
        (header(WAKE, 0), "garbage: a wake-up"),
        (header(BEGIN, 2**32 - 1), "oversized: a frame of 4294967295 bytes, kind 1, where 16777216"),
        (header(LAYER, 192), "oversized: a frame of 192 bytes, kind 0, where 0"),
        (header(BEGIN, 100) + b"x", "truncated"),
        (header(REPEAT, 0, step=7), "step 7 repeats the step before it, but there was none"),
        (header(REPEAT, 1) + b"x", "oversized: a frame of 1 bytes, kind 4, where 0"),
        (header(BEGIN, 3) + b"\xff\xff\xff", "rror"),
    ],
    ids=[
        "kind",
        "failure",
        "wake",
        "oversized",
        "layer before a step",
        "truncated",
        "repeat without a step",
        "repeat with a payload",
        "not a step",
    ],
)
def test_a_shard_says_what_was_wrong(target, data, error):
    with target.frames(unix=False) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert error in failure_in(read_all(connection)).message
    target.check(unix=False)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (header(LAYER, 192, step=2) + bytes(192), "frame of step 2, but step 1 is under way"),
        (header(LAYER, 192, layer=2) + bytes(192), "layer 2 of a model of 2"),
        (header(LAYER, 192, micro_batch=1) + bytes(192), "micro-batch 1 of a step of 1"),
        (header(LAYER, 191) + bytes(191), "q of 191 bytes, expected 192"),
    ],
    ids=["step", "layer", "micro-batch", "bytes"],
)
def test_a_frame_out_of_order_is_refused_by_name(target, frame, error):
    step = codec.step_to_pb(target.step).SerializeToString()
    with target.frames(unix=False) as connection:
        connection.sendall(header(BEGIN, len(step)) + step + frame)
        failure = failure_in(read_all(connection))
        assert error in failure.message
        assert isinstance(codec.error_from_pb(failure, peer="shard"), InvalidRequest)


def test_a_step_without_sealed_shared_memory_is_refused(target, tmp_path):
    """A descriptor of a folder, one of unsealed memory, and none."""
    step = codec.step_to_pb(target.step).SerializeToString()
    for descriptors in ([os.open(tmp_path, os.O_RDONLY)], [os.memfd_create("unsealed")], []):
        with target.frames(unix=True) as connection:
            socket.send_fds(connection, [header(BEGIN, len(step)) + step], descriptors)
            connection.shutdown(socket.SHUT_WR)
            assert "memory" in failure_in(read_all(connection)).message
        for descriptor in descriptors:
            os.close(descriptor)
    target.check(unix=True)


def test_a_connection_without_a_valid_token_is_closed(target):
    for token in (b"", b"short", secrets.token_bytes(16)):
        with socket.create_connection(target.listener.tcp_address, timeout=DEADLINE_S) as connection:
            connection.sendall(token)
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
    target.check(unix=False)


# -- the engine's end, hot frames --------------------------------------------------------------------------


@FUZZ
@given(
    answers=st.lists(st.tuples(FRAMES, st.binary(max_size=250)), min_size=1, max_size=3),
    tail=st.binary(max_size=40),
)
def test_an_engine_survives_answers_of_all_kinds(work, answers, tail):
    """A faulty shard causes an error, never a wrong state or an endless wait."""
    near, far = socket.socketpair()
    stream = NativeConnection(near, Transport.TCP, "shard", work.model, work.dtype)
    with far:
        stream.begin(work.step([], positions=(100,)), DEADLINE_S)
        sent = Sent(1, 0, 0, 1, 6)
        stream.send(sent, work.query())
        data = tail
        for (step, layer, micro_batch, kind, count), payload in answers:
            data = HEADER.pack(step, layer, micro_batch, kind, count) + payload + data
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        out = State(torch.full((1, 6, work.spec.v_dim), 7.0), torch.full((1, 6), 7.0))
        try:
            stream.wait(sent, out, 5.0)
        except FarshoreError as error:
            assert (out.o == 7).all() and (out.lse == 7).all(), "a refused answer must not change the output"
            # The error is the shard's own if it sent a FAILURE, else a TransportError.
            said = any(frame[3] == FAILURE for frame, _ in answers)
            assert isinstance(error, TransportError) or said
        else:
            assert data.startswith(header(LAYER, 168)), "a state out of nothing"
    stream.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (header(LAYER, 168, step=2) + bytes(168), "an answer to step 2, .* due is step 1"),
        (header(LAYER, 168, layer=1) + bytes(168), "layer 1, .* due is step 1, layer 0"),
        (header(LAYER, 100) + bytes(100), "100 bytes; due is .* 168 bytes"),
        (header(LAYER, 2**31), "oversized"),
        (header(LAYER, 168) + bytes(20), "truncated"),
        (b"", "closed the connection"),
        (header(FAILURE, 3) + b"\xff\xff\xff", "garbage: a failure that is no message"),
        (header(FAILURE, 3) + b"\x12\x01\xff", "garbage: a failure that is no message"),
        (header(FAILURE, 2) + b"\x08\x01", ""),
        (header(WAKE, 0), "a wake-up where no memory is shared"),
        (header(BEGIN, 0), "due is step 1"),
        (header(9, 0), "a frame of kind 9"),
    ],
    ids=[
        "step",
        "layer",
        "bytes",
        "oversized",
        "truncated",
        "nothing",
        "failure",
        "utf-8",
        "cancelled",
        "wake",
        "begin",
        "kind",
    ],
)
def test_an_engine_says_what_was_wrong(work, answer, error):
    with pytest.raises(TransportError, match=f"shard:1: .*{error}"):
        wait_for(work, answer)


@pytest.mark.parametrize(
    ("message", "says"),
    [(b"\x08\xe7\x07", "UNKNOWN"), (b"", "OK")],
    ids=["unknown code", "empty failure"],
)
def test_a_failure_with_a_meaningless_code_is_an_internal_error(work, message, says):
    """The message and the connection are intact, so a retry would fail again (decision 013)."""
    with pytest.raises(Internal, match=f"shard:1: {says}"):
        wait_for(work, header(FAILURE, len(message)) + message)


def wait_for(work, answer):
    """Waits as an engine whose shard sends ``answer`` for the first frame."""
    near, far = socket.socketpair()
    stream = NativeConnection(near, Transport.TCP, "shard:1", work.model, work.dtype)
    try:
        with far:
            stream.begin(work.step([]), DEADLINE_S)
            sent = Sent(1, 0, 0, 1, 6)
            stream.send(sent, work.query())
            far.sendall(answer)
            far.shutdown(socket.SHUT_WR)
            out = State(torch.empty(1, 6, work.spec.v_dim), torch.empty(1, 6))
            stream.wait(sent, out, DEADLINE_S)
    finally:
        stream.close()


# -- bulk KV -----------------------------------------------------------------------------------------------


@FUZZ
@given(
    kind=st.integers(0, 7),
    message=st.binary(max_size=60) | st.just(None),
    counts=st.tuples(st.sampled_from([0, 5, 2**32 - 1]) | NUMBERS, st.sampled_from([0, 64, 2**64 - 1]))
    | st.none(),
    payload=st.binary(max_size=300),
    fields=st.fixed_dictionaries(
        {
            "layer": st.integers(0, 3),
            "first_token": st.integers(0, 40),
            "tokens": st.integers(0, 2**32 - 1) | st.integers(0, 4),
        }
    ),
    pieces=st.integers(0, 2**32 - 1) | st.integers(0, 3),
)
def test_a_shard_survives_bulk_messages_of_all_kinds(target, kind, message, counts, payload, fields, pieces):
    if message is None:
        write = pb.WriteRequest(span_id=target.read.span, epoch=2, **fields)
        message = pb.BulkWrite(write=write, piece_tokens=pieces).SerializeToString()
    counts = counts or (len(message), len(payload))
    with target.bulk() as connection:
        try:
            connection.sendall(BULK_HEADER.pack(kind, *counts) + message + payload)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        read_all(connection)
    assert target.fingerprint() == target.digest
    target.store.check_integrity()


@FUZZ
@given(
    kind=st.integers(0, 7),
    counts=st.tuples(st.sampled_from([0, 4, 2**32 - 1]), st.sampled_from([0, 56, 112, 2**63])),
    payload=st.binary(max_size=400),
)
def test_an_engine_survives_bulk_answers_of_all_kinds(work, kind, counts, payload):
    near, far = socket.socketpair()
    stream = BulkConnection(near, "shard", deadline_s=DEADLINE_S)
    k, v = torch.empty(3, 2, 32, dtype=torch.uint8), torch.empty(3, 2, 24, dtype=torch.uint8)
    with far:
        far.sendall(BULK_HEADER.pack(kind, *counts) + payload)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(FarshoreError) as caught:
            stream.read(pb.ReadRequest(span_id="x", end_token=2), k, v)
    assert isinstance(caught.value, TransportError) or kind == BulkKind.FAILED
    stream.close()


def test_bulk_garbage_is_answered_with_what_was_wrong(target):
    for data, error in (
        (BULK_HEADER.pack(9, 0, 0), "garbage: a bulk message of kind 9"),
        (BULK_HEADER.pack(BulkKind.WRITE, 2**20, 0), "oversized"),
        (BULK_HEADER.pack(BulkKind.DONE, 0, 0), "garbage: DONE"),
    ):
        with target.bulk() as connection:
            connection.sendall(data)
            answer = read_all(connection)
        assert answer[0] == BulkKind.FAILED and error in pb.Failure.FromString(answer[16:]).message


def test_a_listener_that_closes_ends_its_connections(target):
    with target.frames(unix=False) as connection:
        threads = [thread for thread in threading.enumerate() if thread.name == "frames"]
        assert threads
        target.listener.close()
        read_all(connection)
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
