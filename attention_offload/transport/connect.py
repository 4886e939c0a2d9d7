"""How an engine reaches a shard: past gRPC where it can, and what it says where it cannot.

The shard tells over gRPC where it listens, and gives a token: whoever brings it is served. Whether it can be
reached so is tried by connecting, never told from names: a Unix socket in the abstract namespace is there for
processes of one host (and network namespace), TCP is at the host by which gRPC reached the shard, whatever
the shard calls itself. Used for hot frames and for bulk KV, each a connection of its own.
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
from farshore.errors import Cancelled, DeadlineExceeded, FarshoreError, TransportError
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import error_of

_LOG = logging.getLogger(__name__)

CONNECT_DEADLINE_S = 5.0
"""To make a connection for hot frames, or to ask a shard who it is: a few round trips."""

DIAL_DEADLINE_S = 2.0
"""To a host that gRPC has just reached: longer means that something between drops what it does not know."""

DIAL_AGAIN_S = 60.0
"""After that, TCP is not tried again for so long: a step must not wait for it every time."""

WELCOME = b"\1"


def shard_error(failure: grpc.RpcError, address: str) -> FarshoreError:
    """What a call to a shard failed with. TransportError where the shard's own words are garbage."""
    try:
        return refusal(error_of(failure, client=address), address)
    except ValueError as garbage:
        return TransportError(f"{address}: garbage: a status that makes no sense: {garbage}")


def refusal(error: FarshoreError, address: str) -> FarshoreError:
    """What a shard refuses with. Late, or cancelled by the other end, is as good as unreachable: the caller
    gave no such order, and may try again."""
    if isinstance(error, Cancelled | DeadlineExceeded):
        return TransportError(f"{address}: {error}")
    return error


class Connected(NamedTuple):
    connection: socket.socket
    transport: Transport
    shares_cores: bool
    """With the shard: both ends' threads are more than the cores they may run on. False on another host."""


class Dialler:
    """Ways to one shard, tried in the order of ``transports``. Not thread-safe."""

    def __init__(
        self, stub: pb_grpc.AttentionStub, address: str, transports: Sequence[Transport], *, purpose: str
    ) -> None:
        """``address``: the shard's, ``host:port``; ``purpose``: what goes over it, for people."""
        self._stub = stub
        self._address = address
        self._transports = tuple(transports)
        self._purpose = purpose
        self._dial_again_s = 0.0
        self._said = ""

    def connect(self, opening: pb.Open | None, *, deadline_s: float) -> Connected | None:
        """``opening``: what hot frames will mean; None for bulk KV. None comes back where gRPC has to serve.
        Raises TransportError where that was not asked for, or does not reach the shard either.
        ``deadline_s``: of the call; each way that is tried then has DIAL_DEADLINE_S."""
        failed = self._past_grpc(opening, deadline_s)
        if isinstance(failed, Connected):
            return failed
        if Transport.GRPC not in self._transports:
            raise TransportError(f"{self._address}: cannot be reached: {failed}")
        if failed and failed != self._said:
            _LOG.warning("%s: %s over gRPC, the slowest way: %s", self._address, self._purpose, failed)
        self._said = failed
        return None

    def _past_grpc(self, opening: pb.Open | None, deadline_s: float) -> Connected | str:
        """Or why not."""
        wanted = [it for it in self._transports if it is not Transport.GRPC]
        if not wanted:
            return ""
        if native() is None:
            return "this installation has no native module (was there no compiler?)"
        try:
            request = pb.ConnectRequest(open=opening, cores=usable_cores(), threads=torch.get_num_threads())
            offer = self._stub.Connect(request, timeout=deadline_s)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
        failed = []
        for transport in wanted:
            try:
                connection = self._dial(transport, offer)
                return Connected(connection, transport, is_near(connection) and offer.shares_cores)
            except OSError as error:
                failed.append(f"{transport}: {error}")
        return "; ".join(failed)

    def _dial(self, transport: Transport, offer: pb.ConnectReply) -> socket.socket:
        if transport is Transport.SHARED_MEMORY:
            if not offer.unix_name:
                raise ConnectionError("the shard offers none")
            connection = socket.socket(socket.AF_UNIX)
            where: Any = f"\0{offer.unix_name}"
        else:
            if not offer.tcp_port:
                raise ConnectionError("the shard offers none")
            if monotonic() < self._dial_again_s:
                raise ConnectionError(f"port {offer.tcp_port} was not reachable a moment ago")
            connection, where = self._dial_tcp(offer.tcp_port), None
        try:
            connection.settimeout(DIAL_DEADLINE_S)
            if where is not None:
                connection.connect(where)
            connection.sendall(offer.token)
            if connection.recv(1) != WELCOME:
                raise ConnectionError("the shard did not take its own token")
        except BaseException:
            connection.close()
            raise
        return connection

    def _dial_tcp(self, port: int) -> socket.socket:
        host = self._address.rpartition(":")[0].strip("[]")
        try:
            connection = socket.create_connection((host, port), timeout=DIAL_DEADLINE_S)
        except TimeoutError:
            self._dial_again_s = monotonic() + DIAL_AGAIN_S
            raise ConnectionError(
                f"no answer from {host}, port {port}, within {DIAL_DEADLINE_S:g} s: does a firewall let only"
                " gRPC's port through?"
            ) from None
        except OSError as error:
            raise ConnectionError(f"{host}, port {port}: {error}") from None
        tune(connection)
        return connection


def tune(connection: socket.socket) -> None:
    """A TCP connection's options, at both ends: frames leave at once, and a host that is gone is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def is_near(connection: socket.socket) -> bool:
    """Whether both ends of a connection are on this host, by their addresses."""
    with suppress(OSError):  # broken: who uses it next will find out
        return connection.family == socket.AF_UNIX or bool(
            connection.getsockname()[0] == connection.getpeername()[0]
        )
    return True
