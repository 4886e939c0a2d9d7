"""gRPC servers and channels, and the translation of errors to status codes and back.

Used by every process that serves or calls gRPC, so that each code has one meaning. Must not know any service.
"""

import ipaddress
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from farshore import errors
from farshore.cluster_token import ClusterToken
from farshore.peers import ProofCheck, SignedChannel
from farshore.text import shortened

MAX_MESSAGE_BYTES = 64 << 20
"""Frames and bulk chunks are far smaller; the gateway limits prompts."""

OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A server that returns is reconnected within this time, however long it was away.
    ("grpc.max_reconnect_backoff_ms", 500),
    # Shorter than an engine waits before it retries a step, so that a restarted server fails no sequence.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # One process may hold several servers; a second server on a taken port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # A web proxy cannot reach the addresses inside a cluster.
    ("grpc.enable_http_proxy", 0),
]

_SERVER_OPTIONS = [
    *OPTIONS,
    # A stranger that connects and sends nothing is disconnected.
    ("grpc.server_handshake_timeout_ms", 5_000),
]

SHARD_ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"}
"""Environment to start the process with. gRPC reads it on import.

It disables gRPC's event engine, whose threads wake one another. A thread that waits for a message then reads
its socket itself, which saves a third of a gRPC hop's time."""

# The most specific class first: the first match wins.
_CODES: tuple[tuple[type[errors.FarshoreError], grpc.StatusCode], ...] = (
    (errors.InvalidPlan, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Full, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Corrupt, grpc.StatusCode.DATA_LOSS),
    (errors.Fenced, grpc.StatusCode.ABORTED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.TransportError, grpc.StatusCode.UNAVAILABLE),
    (errors.Internal, grpc.StatusCode.INTERNAL),
)

# Codes that Farshore's servers never send, but proxies, other servers and newer versions do: the server
# refuses the request. Every other code without an entry, UNKNOWN and UNIMPLEMENTED among them, becomes
# Internal.
_REFUSALS = {
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.PERMISSION_DENIED,
}

FROM_CORE = "Internal error from Core"
"""Message of gRPC's asyncio client, with INTERNAL, when a call ends while a message is being written. It
describes the write; the reason why the call ended is reported by the next call."""

_TOO_LARGE = "message larger than max"
"""In the message of gRPC's own RESOURCE_EXHAUSTED, from the sender or the receiver. A message that is too
large fails again, so the error is not Overloaded."""

MOST_MESSAGE = 2_000
"""Characters of an error's message: it travels in a trailer, and gRPC limits trailers to a few KiB."""

ERROR_KIND = "farshore-error"
"""Trailing metadata of a call that a servicer of ours failed: the error's type. Without it the connection
failed, or gRPC itself."""

STATUS_DETAILS = "grpc-status-details-bin"
"""Trailing metadata of each status that a gateway sends: the serialised google.rpc.Status. A status without
it was made by gRPC, or by something between."""

RETRY_PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata: when the server wants to be asked again. gRPC's own retries obey it."""

FREE_BYTES = "farshore-free-bytes"
"""Trailing metadata of Full: distinguishes it from Overloaded, and carries ``free_bytes``."""


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """(code, message, trailing metadata) for an error that a servicer raised. An exception that is not a
    FarshoreError is a bug in the servicer: INTERNAL, with the exception's type and the start of its text."""
    trailing: tuple[tuple[str, str], ...] = ((ERROR_KIND, type(error).__name__),)
    if isinstance(error, errors.Full):
        trailing += ((FREE_BYTES, str(error.free_bytes)),)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, shortened(str(error), MOST_MESSAGE), trailing
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {shortened(str(error))}", trailing


def code_of(number: int) -> grpc.StatusCode:
    """The status code with this number; UNKNOWN if there is none."""
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)


def abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """Ends a servicer's call with the error's status. Not for asyncio servicers."""
    code, message, trailing = status_of(error)
    context.set_trailing_metadata(trailing)
    context.abort(code, message)
    raise AssertionError("abort raises")


class CallLimit:
    """Bounds the open calls of one kind, which hold a thread of the server for long, so that other calls find
    one. Thread-safe. Not for asyncio servicers."""

    def __init__(self, most: int, refusal: str) -> None:
        """``refusal``: the message of Overloaded, behind the number."""
        self._room = threading.BoundedSemaphore(most)
        self._refusal = f"{most} {refusal}"

    @contextmanager
    def counted(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Counts a call while the context is open. Ends a call above the limit."""
        if not self._room.acquire(blocking=False):
            abort(context, errors.Overloaded(self._refusal))
        try:
            yield
        finally:
            self._room.release()


class StreamLimit(grpc.ServerInterceptor):
    """Refuses calls in which both sides stream above ``most`` open ones: their callers end them."""

    def __init__(self, most: int) -> None:
        self._limit = CallLimit(most, "streams are open here: try again later")

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(handler_call_details)
        if handler is None or handler.stream_stream is None:
            return handler
        return grpc.stream_stream_rpc_method_handler(
            partial(self._serve, handler.stream_stream),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _serve(
        self,
        behaviour: Callable[[Iterator[Any], grpc.ServicerContext], Iterator[Any]],
        messages: Iterator[Any],
        context: grpc.ServicerContext,
    ) -> Iterator[Any]:
        with self._limit.counted(context):
            yield from behaviour(messages, context)


def serve(
    register: Callable[[grpc.Server], None],
    *,
    service: str,
    listen: str,
    threads: int,
    token: ClusterToken | None,
    checks: health.HealthServicer | None = None,
) -> tuple[grpc.Server, str]:
    """Starts a server with one service, health checking and reflection.

    ``register`` adds the service whose full name is ``service``. ``listen``: ``host:port``, port 0 for any
    free one. ``threads``: calls served at once; further calls are refused. Calls in which both sides stream
    hold three quarters of them at most, so that short calls, such as those that ask for the state, always
    find room. ``token``: every call but a health
    check must prove it; None: none need to, which is allowed on a loopback address only. ``checks``: the
    health servicer, set to SERVING for the names "" and ``service``, which the caller may change later; None:
    SERVING until the server stops.

    Returns the server and its address with the real port. Raises PortInUse, and InvalidRequest for another
    address than loopback without a token.
    """
    if token is None and not is_loopback(listen.rpartition(":")[0]):
        raise errors.InvalidRequest(
            f"other hosts can reach {listen}: give --token-file, the file of the cluster's token"
        )
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix=service),
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=threads,
        interceptors=[*([] if token is None else [ProofCheck(token)]), StreamLimit(max(1, threads * 3 // 4))],
    )
    register(server)
    checks = checks or health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise errors.PortInUse(f"cannot listen on {listen}: choose another port, or 0 for any") from error
    server.start()
    for name in ("", service):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, f"{listen.rpartition(':')[0]}:{port}"


def channel(address: str, token: ClusterToken | None) -> grpc.Channel:
    """A channel to a server of :func:`serve`, whose calls prove ``token``. None: for a server without one."""
    plain = grpc.insecure_channel(address, options=OPTIONS)
    return plain if token is None else cast(grpc.Channel, SignedChannel(plain, token))


def aio_channel(address: str, token: ClusterToken | None) -> grpc.aio.Channel:
    """As :func:`channel`, for asyncio."""
    plain = grpc.aio.insecure_channel(address, options=OPTIONS)
    return plain if token is None else cast(grpc.aio.Channel, SignedChannel(plain, token))


class Channels(dict[str, grpc.Channel]):
    """Channels to servers of :func:`serve`, by address. Each is made when it is first asked for.
    Thread-safe."""

    def __init__(self, token: ClusterToken | None) -> None:
        super().__init__()
        self._token = token
        self._lock = threading.Lock()

    def __missing__(self, address: str) -> grpc.Channel:
        with self._lock:
            if address not in self:
                self[address] = channel(address, self._token)
            return self[address]

    def keep(self, addresses: Collection[str]) -> None:
        """Closes the channels to all others."""
        with self._lock:
            gone = [self.pop(address) for address in self.keys() - set(addresses)]
        for each in gone:
            each.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. False for a name that does not resolve."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or "?", 0, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # ValueError: an invalid name, such as one of 300 letters
        return False
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in found)


def error_of(failure: grpc.RpcError, *, peer: str) -> errors.FarshoreError:
    """The FarshoreError to raise, chained, for a failed call. ``peer``: the called server, for messages."""
    code, message = failure.code(), failure.details() or "no details"
    trailing = dict(failure.trailing_metadata() or ())
    free_bytes = str(trailing.get(FREE_BYTES, ""))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and free_bytes.isdecimal():
        return errors.Full(message, free_bytes=int(free_bytes))
    return error_of_status(code, message, peer=peer)


def error_of_status(code: grpc.StatusCode, message: str, *, peer: str) -> errors.FarshoreError:
    """As :func:`error_of`, for a status that did not arrive as a gRPC error.

    UNAVAILABLE becomes TransportError: gRPC reports it when nothing was reached or the connection broke, and
    Farshore's servicers report it when they could not reach a server themselves. INTERNAL becomes
    TransportError only for the message ``FROM_CORE``, which gRPC's client makes itself. Codes that stand for
    a bug become Internal: the same call fails again.
    """
    message = shortened(message, MOST_MESSAGE)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.InvalidRequest(message) if _TOO_LARGE in message else errors.Overloaded(message)
    named = f"{peer}: {code.name}: {message}"
    if code == grpc.StatusCode.UNAVAILABLE or (code == grpc.StatusCode.INTERNAL and message == FROM_CORE):
        return errors.TransportError(named)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return errors.Unauthenticated(f"{peer}: {message}")
    if code in _REFUSALS:
        return errors.InvalidRequest(named)
    for kind, kind_code in _CODES:
        if kind_code == code and kind is not errors.Internal:
            return kind(message)
    return errors.Internal(named)
