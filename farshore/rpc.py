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
)

_FREE_BYTES = "farshore-free-bytes"
"""Trailing metadata of a refusal: tells Full from Overloaded, and how much was free."""


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """(code, message, trailing metadata) for an error that leaves a servicer."""
    trailing = ((_FREE_BYTES, str(error.free_bytes)),) if isinstance(error, errors.Full) else ()
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error), trailing
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}", trailing


def abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """End a servicer's call (not an asyncio one) with the error's status."""
    code, message, trailing = status_of(error)
    context.set_trailing_metadata(trailing)
    context.abort(code, message)
    raise AssertionError("abort raises")


def serve(
    register: Callable[[grpc.Server], None], *, service: str, listen: str, threads: int
) -> tuple[grpc.Server, str]:
    """Start a server with one service, health checking and reflection.

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
    checks = health.HealthServicer()
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
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and _FREE_BYTES in trailing:
        return errors.Full(message, free_bytes=int(trailing[_FREE_BYTES]))
    return error_of_status(code, message, peer=peer)


def error_of_status(code: grpc.StatusCode, message: str, *, peer: str) -> errors.FarshoreError:
    """As :func:`error_of`, of a status that came another way."""
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.Overloaded(message)
    for kind, kind_code in _CODES:
        if kind_code == code and kind is not errors.TransportError:
            return kind(message)
    return errors.TransportError(f"{peer}: {code.name}: {message}")
