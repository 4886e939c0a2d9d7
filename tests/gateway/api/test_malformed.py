"""Bytes that are no calls, at each layer: the gateway refuses them and goes on."""

import errno
import random
import socket
import struct

import grpc
import httpx2
import pytest

from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api

SERVICES = (
    api.DESCRIPTOR.services_by_name["InferenceService"],
    admin.DESCRIPTOR.services_by_name["AdminService"],
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ALREADY_EXISTS,
}
DRAWS = [pytest.param(150, id="some"), pytest.param(5_000, id="many", marks=pytest.mark.soak)]
VALID = {
    "Generate": api.GenerateRequest(
        chat=api.Chat(messages=[api.Message(role="user", content="Hello")], tools=["{}"]),
        sampling=api.Sampling(max_tokens=3, stop=["a", "b"], logit_bias={5: 1.0}, seed=1 << 60),
        request_id="some id",
        resume_from=1,
    ),
    "Tokenize": api.TokenizeRequest(model="smollm2", text="Hello there, reader"),
    "Detokenize": api.DetokenizeRequest(ids=[5, 600, 7000]),
    "GetModel": api.GetModelRequest(name="smollm2"),
    "ListModels": api.ListModelsRequest(),
    "Cancel": api.CancelRequest(request_id="some id"),
    "BatchGenerate": api.BatchGenerateRequest(
        requests=[
            api.GenerateRequest(text="Hello", sampling=api.Sampling(max_tokens=3)),
            api.GenerateRequest(tokens=api.TokenIds(ids=[5, 600, 7000]), request_id="another id"),
        ]
    ),
    "ClusterStatus": admin.ClusterStatusRequest(),
    "Scale": admin.ScaleRequest(dense_workers=1, attention_workers=300),
    "Drain": admin.DrainRequest(worker_id="attention-0", timeout_s=1.5),
    "Down": admin.DownRequest(),
    "WatchEvents": admin.WatchEventsRequest(since=3),
}
FOLLOWED_S = 1.0
"""Damage may ask for the events to come, which have no end."""


def test_every_method_has_a_message_to_damage():
    assert set(VALID) == {method.name for service in SERVICES for method in service.methods}


def assert_answers(farshore):
    """A well-formed call is answered."""
    farshore.engine.auto = (5, 6, 7)
    events = list(farshore.generate("Hello"))
    assert events[-1].finished.usage.completion_tokens == 3


def damaged(raw, draw):
    """``raw``, with bytes changed, left out, repeated or added."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(raw))
        match draw.randrange(4):
            case 0:
                raw = raw[:at] + draw.randbytes(1) + raw[at + 1 :]
            case 1:
                raw = raw[:at]
            case 2:
                raw = raw[:at] + raw[at:] * 2
            case 3:
                raw = raw[:at] + draw.randbytes(draw.randint(1, 12)) + raw[at:]
    return raw


def call(channel, method, raw):
    """The status of a call with these bytes."""
    (service,) = [one for one in SERVICES if method in one.methods_by_name]
    path = f"/{service.full_name}/{method}"
    followed = method == "WatchEvents"
    try:
        if service.methods_by_name[method].server_streaming:
            list(channel.unary_stream(path)(raw, timeout=FOLLOWED_S if followed else 30))
        else:
            channel.unary_unary(path)(raw, timeout=30)
    except grpc.RpcError as error:
        if not (followed and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("draws", DRAWS)
def test_messages_that_are_no_protobuf(farshore, draws):
    farshore.engine.auto = (5,)
    draw = random.Random(20)
    for number in range(draws):
        method = draw.choice(list(VALID))
        raw = damaged(VALID[method].SerializeToString(), draw)
        code, details = call(farshore.channel, method, raw)
        assert code in REFUSALS | {grpc.StatusCode.OK}, (number, method, raw, code, details)
    assert_answers(farshore)


@pytest.mark.parametrize("method", ["Scale", "WatchEvents"])
def test_an_operators_call_that_is_none_is_not_the_controllers_fault(farshore, method):
    code, details = call(farshore.channel, method, b"\xff")
    assert code is grpc.StatusCode.INVALID_ARGUMENT and f"no {method}Request" in details
    assert not farshore.engine.operations


def frame(draw):
    """One HTTP/2 frame that is wrong in some way, or comes at the wrong time."""
    body = draw.randbytes(draw.choice([0, 1, 4, 5, 6, 8, 9, 64, 500]))
    length = len(body) if draw.random() < 0.7 else draw.randrange(1 << 24)
    kind = draw.choice([*range(10), 0x63])
    stream = draw.choice([0, 1, 2, 3, 5, 0x7FFFFFFF, 0xFFFFFFFF])
    return struct.pack(">I", length)[1:] + struct.pack(">BBI", kind, draw.randrange(256), stream) + body


def send(address, raw):
    """Sends bytes on a connection of its own and cuts it."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(raw)
        except (BrokenPipeError, ConnectionResetError):
            return  # The gateway has hung up.


@pytest.mark.parametrize("draws", DRAWS)
def test_frames_that_are_no_http_2(farshore, draws):
    draw = random.Random(21)
    for _ in range(draws):
        begin = draw.choice([b"", PREFACE, PREFACE + SETTINGS])
        send(farshore.address, begin + b"".join(frame(draw) for _ in range(draw.randint(1, 8))))
    assert_answers(farshore)


HTTP_1 = [
    b"\0\0\0\0\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET http://[::1/health HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /%zz%00%ff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /v1/models/%ff%fe%2f..%2f HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, identity\r\n\r\n{}",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json; charset=\xff\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n bad fold\r\nNo colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
    PREFACE + SETTINGS,
]


def answer_of(address, raw):
    """The first line of the answer to these bytes; b"" if the gateway hangs up."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").readline()
        except OSError as error:
            # ENOTCONN: shutdown() after the gateway has hung up.
            if isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN:
                return b""
            raise


def test_bytes_that_are_no_http_1(start):
    made = start(http="127.0.0.1:0")
    address = made.gateway.http_address
    for raw in HTTP_1:
        assert b" 5" not in answer_of(address, raw)[:13], raw
    assert httpx2.get(f"http://{address}/health").status_code == 200


@pytest.mark.parametrize("draws", DRAWS)
def test_damaged_http_1(start, draws):
    made = start(http="127.0.0.1:0")
    address, draw = made.gateway.http_address, random.Random(22)
    body = b'{"prompt": "Hello", "model": "smollm2"}'
    whole = (
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    for number in range(draws):
        raw = damaged(whole % len(body) + body, draw)
        assert b" 5" not in answer_of(address, raw)[:13], (number, raw)
    assert httpx2.get(f"http://{address}/health").status_code == 200
