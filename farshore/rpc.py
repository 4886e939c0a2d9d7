"""gRPC at the edge: our errors to status codes and back, once, and the options every channel shares."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from farshore import errors

MAX_MESSAGE_BYTES = 64 << 20
"""Frames and bulk chunks stay far below; prompts are limited by the gateway."""

OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A peer that comes back is found within this, however long it was away.
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Less than an engine waits between two attempts at a step: a peer that restarts costs no sequence.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # One process may hold several servers; a second server on a taken port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # A proxy for the web knows no way into a cluster.
    ("grpc.enable_http_proxy", 0),
]

# The most specific class first: the first match wins.
_CODES: tuple[tuple[type[errors.FarshoreError], grpc.StatusCode], ...] = (
    (errors.InvalidPlan, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Full, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Corrupt, grpc.StatusCode.DATA_LOSS),
    (errors.Fenced, grpc.StatusCode.ABORTED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.TransportError, grpc.StatusCode.UNAVAILABLE),
    (errors.Internal, grpc.StatusCode.INTERNAL),
)

# Codes that only a peer that is not ours, or a newer one, sends: the caller asked for something that this
# peer does not grant. Every other code without an entry, UNKNOWN and UNIMPLEMENTED among them, is Internal.
_REFUSALS = {
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}

_FROM_CORE = "Internal error from Core"
"""What gRPC's asyncio client says, with INTERNAL, of a call that ended while a message was being written: of
the write, not of why the call ended, which the peer says to the next one."""

_TOO_LARGE = "message larger than max"
"""Of gRPC's own RESOURCE_EXHAUSTED, at either end: sent again, it is as large."""

MOST_ECHOED = 200
"""Characters of a string that came from outside, in any message of ours."""

MOST_MESSAGE = 2_000
"""Characters of an error's message: it travels in a trailer, and gRPC limits those to some KiB."""

_FREE_BYTES = "farshore-free-bytes"
"""Trailing metadata of a refusal: tells Full from Overloaded, and how much was free."""


def shown(text: object, most: int = MOST_ECHOED) -> str:
    """``text`` as part of a message: cut, with its length, where it is longer than ``most`` characters."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}... ({len(whole)} characters)"


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """(code, message, trailing metadata) for an error that leaves a servicer. What is no error of ours is a
    mistake in the servicer: INTERNAL."""
    trailing = ((_FREE_BYTES, str(error.free_bytes)),) if isinstance(error, errors.Full) else ()
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, shown(error, MOST_MESSAGE), trailing
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {shown(error)}", trailing


def abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """End a servicer's call (not an asyncio one) with the error's status."""
    code, message, trailing = status_of(error)
    context.set_trailing_metadata(trailing)
    context.abort(code, message)
    raise AssertionError("abort raises")


def serve(
    register: Callable[[grpc.Server], None],
    *,
    service: str,
    listen: str,
    threads: int,
    checks: health.HealthServicer | None = None,
) -> tuple[grpc.Server, str]:
    """Start a server with one service, health checking and reflection. ``checks``: the health of both names
    ("" and the service's), which the caller may change; None: it serves for as long as it runs.

    ``register`` adds the service named ``service`` in full; ``listen`` is ``host:port``, port 0 for any;
    ``threads`` bounds the calls served at once. Returns the server and the address with its real port.
    Raises PortInUse.
    """
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix=service),
        options=OPTIONS,
        maximum_concurrent_rpcs=threads,
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
    for served in ("", service):
        checks.set(served, health_pb2.HealthCheckResponse.SERVING)
    return server, f"{listen.rpartition(':')[0]}:{port}"


def error_of(failure: grpc.RpcError, *, peer: str) -> errors.FarshoreError:
    """The error to raise, chained, for what a call to ``peer`` came back with."""
    code, message = failure.code(), failure.details() or "no details"
    trailing = dict(failure.trailing_metadata() or ())
    free_bytes = str(trailing.get(_FREE_BYTES, ""))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and free_bytes.isdecimal():
        return errors.Full(message, free_bytes=int(free_bytes))
    return error_of_status(code, message, peer=peer)


def error_of_status(code: grpc.StatusCode, message: str, *, peer: str) -> errors.FarshoreError:
    """As :func:`error_of`, of a status that came another way.

    Only UNAVAILABLE is a TransportError, but for what gRPC's client makes up itself: gRPC gives it where
    nothing was reached or the connection broke, and a servicer of ours where a peer of its own did. A code
    that names a mistake is Internal: the same call fails again.
    """
    message = shown(message, MOST_MESSAGE)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.InvalidRequest(message) if _TOO_LARGE in message else errors.Overloaded(message)
    named = f"{peer}: {code.name}: {message}"
    if code == grpc.StatusCode.UNAVAILABLE or (code == grpc.StatusCode.INTERNAL and message == _FROM_CORE):
        return errors.TransportError(named)
    if code in _REFUSALS:
        return errors.InvalidRequest(named)
    for kind, kind_code in _CODES:
        if kind_code == code and kind is not errors.Internal:
            return kind(message)
    return errors.Internal(named)
