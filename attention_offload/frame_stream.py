"""Hot frames over shared memory or TCP, engine's end: native calls that wait without the interpreter's lock.

Also how a connection past gRPC is made. The shard says over gRPC where it listens; whether that can be
reached is tried by connecting, never told from names. Called by :mod:`remote_peer` and :mod:`remote_store`.
"""

import socket
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.frames import Sent, Transport, frame_bytes, native
from farshore.attention_offload.plan import ShardStep
from farshore.errors import FarshoreError, InvalidRequest, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb

CONNECT_DEADLINE_S = 2.0
"""To a host that gRPC has just reached: longer means that something between drops what it does not know."""

WELCOME = b"\1"


def dial(transport: Transport, offer: pb.ConnectReply, address: str) -> socket.socket | None:
    """A connection to where the shard listens, its token taken; None if it cannot be reached so."""
    where: Any
    if transport is Transport.SHARED_MEMORY:
        family, where = socket.AF_UNIX, f"\0{offer.unix_name}"
    else:
        family, where = None, (address.rpartition(":")[0].strip("[]"), offer.tcp_port)
    if not (offer.unix_name if family else offer.tcp_port):
        return None
    try:
        if family is None:
            connection = socket.create_connection(where, timeout=CONNECT_DEADLINE_S)
            tune(connection)
        else:
            connection = socket.socket(family)
            connection.settimeout(CONNECT_DEADLINE_S)
            connection.connect(where)
    except OSError:
        return None
    try:
        connection.sendall(offer.token)
        if connection.recv(1) == WELCOME:
            return connection
    except OSError:
        pass
    connection.close()
    return None


def tune(connection: socket.socket) -> None:
    """A TCP connection's options, at both ends: frames leave at once, and a host that is gone is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class FrameStream:
    """A :class:`~farshore.attention_offload.frames.HotStream` on a connection that it owns from now on."""

    def __init__(
        self,
        connection: socket.socket,
        transport: Transport,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        frame_deadline_s: float,
    ) -> None:
        self.transport = transport
        self._address = address
        self._model = model
        self._dtype = dtype
        self._deadline_s = frame_deadline_s
        self._native = native()
        make = self._native.shared_memory if transport is Transport.SHARED_MEMORY else self._native.stream
        self._wire = make(connection.detach(), frame_deadline_s)

    def begin(self, step: ShardStep) -> None:
        groups, rows = step.group1 - step.group0, max(map(len, step.micro_batches), default=0)
        most = 0
        for spec in self._model.specs:
            q, lse, o = frame_bytes(spec, rows=rows, heads=groups * spec.q_heads_per_group, dtype=self._dtype)
            most = max(most, q, lse + o)
        message = codec.step_to_pb(step).SerializeToString()
        try:
            self._native.begin(self._wire, step.step, message, most)
        except (OSError, ValueError) as error:
            raise self._mapped(error) from error

    def send(self, sent: Sent, q: Tensor) -> None:
        if q.dtype != self._dtype:
            raise InvalidRequest(f"q is {q.dtype}: this connection was opened for {self._dtype}")
        _, heads, dim = q.shape
        if q.stride()[1:] != (dim, 1):
            q = q.contiguous()
        size = q.element_size()
        try:
            self._native.send(self._wire, *sent[:4], q.data_ptr(), heads * dim * size, q.stride(0) * size)
        except (OSError, ValueError) as error:
            raise self._mapped(error) from error

    def wait(self, sent: Sent, out: State) -> None:
        o, lse = out
        size = o.element_size()
        try:
            failure = self._native.wait(
                self._wire,
                *sent[:4],
                lse.data_ptr(),
                sent.heads * 4,
                lse.stride(0) * 4,
                o.data_ptr(),
                sent.heads * o.shape[2] * size,
                o.stride(0) * size,
                self._deadline_s,
            )
        except (OSError, ValueError) as error:
            raise self._mapped(error) from error
        if failure is not None:
            raise codec.error_from_pb(pb.Failure.FromString(failure), peer=self._address)

    def close(self) -> None:
        self._native.shut_down(self._wire)

    def _mapped(self, error: Exception) -> FarshoreError:
        if isinstance(error, TimeoutError):
            return TransportError(f"{self._address}: no answer within {self._deadline_s:g} s")
        if isinstance(error, OSError):
            return TransportError(f"{self._address}: {error}")
        return InvalidRequest(str(error))
