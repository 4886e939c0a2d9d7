"""The translation of errors to status codes and back, for all errors and all codes."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import errors, rpc
from farshore.text import MOST_CHARS

from ..waiting import until

CODE = grpc.StatusCode

RAISED = {
    errors.InvalidRequest("x"): CODE.INVALID_ARGUMENT,
    errors.ModelError("x"): CODE.INVALID_ARGUMENT,
    errors.AlreadyExists("x"): CODE.ALREADY_EXISTS,
    errors.ResumeMismatch("x"): CODE.INVALID_ARGUMENT,
    errors.PortInUse("x"): CODE.INVALID_ARGUMENT,
    errors.NotFound("x"): CODE.NOT_FOUND,
    errors.Full("x", free_bytes=7): CODE.RESOURCE_EXHAUSTED,
    errors.Overloaded("x"): CODE.RESOURCE_EXHAUSTED,
    errors.Corrupt("x"): CODE.DATA_LOSS,
    errors.Fenced("x"): CODE.ABORTED,
    errors.InvalidPlan("x"): CODE.FAILED_PRECONDITION,
    errors.Cancelled("x"): CODE.CANCELLED,
    errors.DeadlineExceeded("x"): CODE.DEADLINE_EXCEEDED,
    errors.TransportError("x"): CODE.UNAVAILABLE,
    errors.Late("x", shards=["s"]): CODE.UNAVAILABLE,
    errors.Lost("x", shards=["s"]): CODE.UNAVAILABLE,
    errors.Unauthenticated("x"): CODE.UNAUTHENTICATED,
    errors.Internal("x"): CODE.INTERNAL,
    errors.StartupError("x"): CODE.INTERNAL,
    errors.ProcessEnded("x"): CODE.INTERNAL,
    ValueError("x"): CODE.INTERNAL,
    RecursionError("x"): CODE.INTERNAL,
}

RECEIVED = {
    CODE.OK: errors.Internal,
    CODE.CANCELLED: errors.Cancelled,
    CODE.UNKNOWN: errors.Internal,
    CODE.INVALID_ARGUMENT: errors.InvalidRequest,
    CODE.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    CODE.NOT_FOUND: errors.NotFound,
    CODE.ALREADY_EXISTS: errors.AlreadyExists,
    CODE.PERMISSION_DENIED: errors.InvalidRequest,
    CODE.RESOURCE_EXHAUSTED: errors.Overloaded,
    CODE.FAILED_PRECONDITION: errors.InvalidPlan,
    CODE.ABORTED: errors.Fenced,
    CODE.OUT_OF_RANGE: errors.InvalidRequest,
    CODE.UNIMPLEMENTED: errors.Internal,
    CODE.INTERNAL: errors.Internal,
    CODE.UNAVAILABLE: errors.TransportError,
    CODE.DATA_LOSS: errors.Corrupt,
    CODE.UNAUTHENTICATED: errors.Unauthenticated,
}


class Failed(grpc.RpcError):
    """A call that ended with a status."""

    def __init__(self, code, details, trailing=()):
        super().__init__()
        self._code, self._details, self._trailing = code, details, trailing

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return self._trailing


def kinds(kind):
    """The class and all its subclasses."""
    return {kind}.union(*map(kinds, kind.__subclasses__()))


def test_both_tables_are_complete():
    assert RECEIVED.keys() == set(CODE)
    concrete = {kind for kind in kinds(errors.FarshoreError) if not kind.__name__.startswith("_")}
    assert concrete - {type(error) for error in RAISED} == {errors.FarshoreError}


@pytest.mark.parametrize(("error", "code"), RAISED.items(), ids=lambda arg: getattr(arg, "name", repr(arg)))
def test_the_code_of_a_raised_error(error, code):
    assert rpc.status_of(error)[0] == code


@pytest.mark.parametrize(("code", "kind"), RECEIVED.items(), ids=lambda arg: getattr(arg, "name", ""))
def test_the_error_for_a_received_code(code, kind):
    error = rpc.error_of(Failed(code, "why"), peer="shard:1")
    assert type(error) is kind and "why" in str(error)
    if kind is errors.Internal:
        assert f"shard:1: {code.name}" in str(error) and not error.retryable


def test_a_message_that_is_too_large_is_not_retryable():
    def method(request, context):
        return request

    handlers = {"echo": grpc.unary_unary_rpc_method_handler(method)}
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, options=[("grpc.max_receive_message_length", 1000)])
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("x", handlers)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/x/echo")(bytes(2000), timeout=60)
        server.stop(None).wait()
    error = rpc.error_of(caught.value, peer="p")
    assert type(error) is errors.InvalidRequest and "2000" in str(error)


def test_a_write_that_failed_because_the_call_ended_is_retryable():
    """Recognised by gRPC's message, which the next test compares with the installed gRPC."""
    error = rpc.error_of(Failed(CODE.INTERNAL, "Internal error from Core"), peer="shard:1")
    assert type(error) is errors.TransportError and "shard:1" in str(error)


def test_the_message_of_the_installed_grpc():
    async def status():
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            call = channel.stream_stream("/no/such")()
            call._cython_call.set_internal_error("Failed grpc_call_start_batch")
            return await call.code(), await call.details()

    assert asyncio.run(status()) == (CODE.INTERNAL, rpc.FROM_CORE)


def test_the_retryable_codes():
    retryable = {code for code in CODE if rpc.error_of(Failed(code, "x"), peer="p").retryable}
    assert retryable == {CODE.UNAVAILABLE, CODE.UNAUTHENTICATED, CODE.RESOURCE_EXHAUSTED, CODE.DATA_LOSS}


@pytest.mark.parametrize(
    "error",
    [error for error in RAISED if isinstance(error, errors.FarshoreError)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_way_to_the_caller(error):
    """It arrives as its class or a base class. StartupError and ProcessEnded arrive as Internal."""
    code, message, trailing = rpc.status_of(error)
    arrived = rpc.error_of(Failed(code, message, trailing), peer="p")
    if isinstance(error, errors.StartupError | errors.ProcessEnded):
        assert type(arrived) is errors.Internal
    else:
        assert isinstance(error, type(arrived)) and arrived.retryable == error.retryable
    assert getattr(arrived, "free_bytes", None) == getattr(error, "free_bytes", None)


@pytest.mark.parametrize("free_bytes", ["", "-1", "many", b"12"])
def test_a_trailer_that_is_no_number_is_ignored(free_bytes):
    failed = Failed(CODE.RESOURCE_EXHAUSTED, "x", (("farshore-free-bytes", free_bytes),))
    assert type(rpc.error_of(failed, peer="p")) is errors.Overloaded


@pytest.mark.parametrize("error", [KeyError("k" * 10_000_000), errors.NotFound("n" * 10_000_000)])
def test_a_message_fits_into_a_trailer(error):
    code, message, _ = rpc.status_of(error)
    assert len(message) < rpc.MOST_MESSAGE + 50 and "characters)" in message
    assert len(str(rpc.error_of(Failed(code, "m" * 10_000_000), peer="p"))) < rpc.MOST_MESSAGE + 100


def test_an_unexpected_exception_echoes_little():
    _, message, _ = rpc.status_of(ValueError("v" * 10_000))
    assert message.startswith("ValueError: vvv") and len(message) < MOST_CHARS + 50


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("fe80::1%lo", False),
        ("no.such.host.invalid", False),
        ("", False),
    ],
)
def test_is_loopback(host, expected):
    assert rpc.is_loopback(host) is expected


def echo(server):
    handlers = {
        "Once": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        "Both": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", handlers)])


def test_streams_leave_room_for_short_calls():
    server, address = rpc.serve(echo, service="test.Echo", listen="127.0.0.1:0", threads=4, token=None)
    ends = [threading.Event() for _ in range(3)]

    def messages(end):
        yield b"a"
        end.wait(60)

    with grpc.insecure_channel(address) as channel:
        both = channel.stream_stream("/test.Echo/Both")
        streams = [both(messages(end), timeout=60) for end in ends]
        assert [next(stream) for stream in streams] == [b"a"] * 3
        with pytest.raises(grpc.RpcError) as refused:
            next(both(iter([b"b"]), timeout=60))
        assert refused.value.code() is CODE.RESOURCE_EXHAUSTED
        assert refused.value.details() == "3 streams are open here: try again later"
        assert isinstance(rpc.error_of(refused.value, peer="x"), errors.Overloaded)
        assert channel.unary_unary("/test.Echo/Once")(b"c", timeout=60) == b"c"
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status
        ends[0].set()
        assert list(streams[0]) == []

        def is_served():
            with contextlib.suppress(grpc.RpcError):
                return list(both(iter([b"d"]), timeout=60)) == [b"d"]

        until(is_served)
        for end in ends:
            end.set()
    server.stop(0).wait()
