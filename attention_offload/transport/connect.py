"""Opens native connections from an engine to a shard, and reports why one cannot be opened.

Called by ``client.remote`` for hot frames and by ``client.remote_store`` for bulk KV; each has its own
connection. ``shard.frame_loop`` uses the socket options. It must not know what a connection carries.

The engine asks the shard over gRPC where it listens, and receives an offer that it presents first on the new
connection (``transport.handshake``). Whether a transport works is found by connecting, never inferred from
host names. A Unix socket in the abstract namespace can be reached by processes of the same host and network
namespace only. TCP connects to the host at which gRPC reached the shard, whatever name the shard has for
itself.
"""

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

import grpc
import torch

from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.attention_offload.transport.frames import Transport, native
from farshore.attention_offload.transport.handshake import prove_as_engine
from farshore.cluster_token import ClusterToken
from farshore.errors import Cancelled, DeadlineExceeded, FarshoreError, TransportError, Unauthenticated
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import error_of

_LOG = logging.getLogger(__name__)

CONNECT_DEADLINE_S = 5.0
"""The default deadline for opening a hot connection, or for identifying a shard: a few round trips."""

DIAL_DEADLINE_S = 2.0
"""The deadline for connecting to a host that gRPC has just reached. A wait for longer means that a firewall
drops the packets."""

TCP_RETRY_S = 60.0
"""How long TCP is not tried after a timeout, so that not every step waits for it."""


def shard_error(failure: grpc.RpcError, address: str) -> FarshoreError:
    """Converts a failed gRPC call into a FarshoreError; a malformed status becomes TransportError."""
    try:
        return refusal(error_of(failure, peer=address), address)
    except ValueError as garbage:
        return TransportError(f"{address}: garbage: a status that makes no sense: {garbage}")


def refusal(error: FarshoreError, address: str) -> FarshoreError:
    """Converts the error that a shard answered with into the one that a caller receives.

    Cancelled and DeadlineExceeded become TransportError: the caller did not cancel, so it may retry."""
    if isinstance(error, Cancelled | DeadlineExceeded):
        return TransportError(f"{address}: {error}")
    return error


class Connected(NamedTuple):
    """An open socket that the shard serves; each end has proved the cluster token to the other."""

    connection: socket.socket
    transport: Transport
    shares_cores: bool
    """Whether the threads of engine and shard outnumber their cores. Always False on different hosts."""


class Dialler:
    """Opens connections to one shard; tries ``transports`` in order. Not thread-safe."""

    def __init__(
        self,
        stub: pb_grpc.AttentionStub,
        address: str,
        transports: Sequence[Transport],
        *,
        token: ClusterToken | None,
        purpose: str,
    ) -> None:
        """``address`` is the shard's gRPC address, ``host:port``. ``token``: None if the shard has none.
        ``purpose`` is the beginning of a warning, such as "hot frames go"."""
        self._stub = stub
        self._address = address
        self._token = token
        self._transports = tuple(transports)
        self._purpose = purpose
        self._retry_tcp_at_s = 0.0
        self._last_warning = ""

    def connect(self, opening: pb.Open | None, *, deadline_s: float) -> Connected | None:
        """Opens a connection, or returns None if the caller must use gRPC instead.

        ``opening`` describes the model for hot frames; None asks for a connection for bulk KV. ``deadline_s``
        bounds the gRPC call; each transport then has DIAL_DEADLINE_S. Raises TransportError if the shard
        cannot be reached over gRPC, or if no transport works and gRPC is not one of ``transports``; raises
        Unauthenticated, which is one, if the shard does not prove the cluster token. Raises the shard's error
        if it refuses ``opening``. Logs a warning when gRPC takes over for a new reason."""
        result = self._open_native(opening, deadline_s)
        if isinstance(result, Connected):
            return result
        if Transport.GRPC not in self._transports:
            raise TransportError(f"{self._address}: cannot be reached: {result}")
        if result and result != self._last_warning:
            _LOG.warning("%s: %s over gRPC, the slowest way: %s", self._address, self._purpose, result)
        self._last_warning = result
        return None

    def _open_native(self, opening: pb.Open | None, deadline_s: float) -> Connected | str:
        """Returns the connection, or the reason why there is none ("" if only gRPC was asked for)."""
        wanted = [transport for transport in self._transports if transport is not Transport.GRPC]
        if not wanted:
            return ""
        if native() is None:
            return "this installation has no native module (was there no compiler?)"
        try:
            request = pb.ConnectRequest(open=opening, cores=usable_cores(), threads=torch.get_num_threads())
            offer = self._stub.Connect(request, timeout=deadline_s)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
        reasons = []
        for transport in wanted:
            try:
                connection = self._dial(transport, offer)
                return Connected(connection, transport, is_same_host(connection) and offer.shares_cores)
            except OSError as error:
                reasons.append(f"{transport}: {error}")
        return "; ".join(reasons)

    def _dial(self, transport: Transport, offer: pb.ConnectReply) -> socket.socket:
        if transport is Transport.SHARED_MEMORY:
            if not offer.unix_name:
                raise ConnectionError("the shard offers none")
            connection = socket.socket(socket.AF_UNIX)
            unix_address: Any = f"\0{offer.unix_name}"
        else:
            if not offer.tcp_port:
                raise ConnectionError("the shard offers none")
            if monotonic() < self._retry_tcp_at_s:
                raise ConnectionError(f"port {offer.tcp_port} was not reachable a moment ago")
            connection, unix_address = self._dial_tcp(offer.tcp_port), None
        try:
            connection.settimeout(DIAL_DEADLINE_S)
            if unix_address is not None:
                connection.connect(unix_address)
            prove_as_engine(connection, offer.token, self._token, deadline_s=DIAL_DEADLINE_S)
            connection.settimeout(DIAL_DEADLINE_S)
        except BaseException as error:
            connection.close()
            if isinstance(error, Unauthenticated):
                raise Unauthenticated(f"{self._address}: {error}") from None
            raise
        return connection

    def _dial_tcp(self, port: int) -> socket.socket:
        host = self._address.rpartition(":")[0].strip("[]")
        try:
            connection = socket.create_connection((host, port), timeout=DIAL_DEADLINE_S)
        except TimeoutError:
            self._retry_tcp_at_s = monotonic() + TCP_RETRY_S
            raise ConnectionError(
                f"no answer from {host}, port {port}, within {DIAL_DEADLINE_S:g} s: does a firewall let only"
                " gRPC's port through?"
            ) from None
        except OSError as error:
            raise ConnectionError(f"{host}, port {port}: {error}") from None
        tune(connection)
        return connection


def tune(connection: socket.socket) -> None:
    """Sets a TCP socket's options, at either end: no delay for small frames, and keepalive probes that detect
    a dead host."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def is_same_host(connection: socket.socket) -> bool:
    """Whether both ends of a socket have this host's address. True for a broken socket."""
    with suppress(OSError):  # The next call on a broken socket reports the error.
        return connection.family == socket.AF_UNIX or bool(
            connection.getsockname()[0] == connection.getpeername()[0]
        )
    return True


def is_refused(error: BaseException | None) -> bool:
    """Returns whether the shard's host refused the connection: no process listens at the address."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        if isinstance(error, grpc.RpcError) and "onnection refused" in (error.details() or ""):
            return True
        error = error.__cause__
    return False
