"""Carries hot frames over shared memory or TCP, at the engine's end.

Called by ``client.remote``; ``fanout.native_fanout`` passes several of these connections to one native call.
The native calls block without the interpreter's lock. It must not know sequences or plans of more than one
shard.
"""

import socket

import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.transport.connect import is_same_host, refusal
from farshore.attention_offload.transport.core_sharing import lower_pool_priority
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S, Sent, Transport, frame_bytes, native
from farshore.errors import FarshoreError, InvalidRequest, Late, TransportError
from farshore.kernels.base import State
from farshore.kernels.host import address

SPIN_US = 200
"""How long an engine spins for an answer before it sleeps, if answers usually arrive that soon. The engine
has nothing else to do, and waking it takes 40 us if its core is idle on a virtual machine."""


class NativeConnection:
    """A :class:`~farshore.attention_offload.transport.frames.HotConnection` over shared memory or TCP.

    It owns the socket that it is given."""

    def __init__(
        self,
        connection: socket.socket,
        transport: Transport,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        shares_cores: bool = False,
    ) -> None:
        """``address`` is the shard's gRPC address, for error messages. ``shares_cores`` as in
        :class:`~farshore.attention_offload.transport.connect.Connected`."""
        self.transport = transport
        self.shares_cores = shares_cores
        self._address = address
        self._model = model
        self._dtype = dtype
        self._native = native()
        if transport is Transport.SHARED_MEMORY:
            self.wire = self._native.shared_memory(connection.detach(), MOST_DEADLINE_S, SPIN_US)
        else:
            same_host = is_same_host(connection)
            self.wire = self._native.stream(connection.detach(), MOST_DEADLINE_S, same_host, SPIN_US)
        if shares_cores:
            lower_pool_priority()

    @property
    def under_way(self) -> int:
        return self._native.under_way(self.wire)  # type: ignore[no-any-return]

    @property
    def is_open(self) -> bool:
        return self._native.is_open(self.wire)  # type: ignore[no-any-return]

    def drain(self, deadline_s: float) -> None:
        try:
            self._native.drain(self.wire, deadline_s)
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error

    def begin(self, step: ShardStep, deadline_s: float) -> None:
        groups, rows = step.group1 - step.group0, max(map(len, step.micro_batches), default=0)
        largest_payload_bytes = 0
        for spec in self._model.specs:
            q, lse, o = frame_bytes(spec, rows=rows, heads=groups * spec.q_heads_per_group, dtype=self._dtype)
            largest_payload_bytes = max(largest_payload_bytes, q, lse + o)
        message = codec.step_to_pb(step).SerializeToString()
        try:
            self._native.begin(self.wire, step.step, message, largest_payload_bytes, deadline_s)
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error

    def repeat_step(self, step: int, deadline_s: float) -> None:
        try:
            self._native.repeat_step(self.wire, step, deadline_s)
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error

    def send(self, sent: Sent, q: Tensor) -> None:
        self.check_dtype(q.dtype)
        _, heads, dim = q.shape
        if q.stride()[1:] != (dim, 1):
            q = q.contiguous()
        size = q.element_size()
        rows = address(q), heads * dim * size, q.stride(0) * size
        try:
            self._native.send(self.wire, *sent[:4], rows)
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error

    def wait(self, sent: Sent, out: State, deadline_s: float) -> None:
        o, lse = out
        size = o.element_size()
        lse_rows = address(lse), sent.heads * 4, lse.stride(0) * 4
        o_rows = address(o), sent.heads * o.shape[2] * size, o.stride(0) * size
        try:
            failure = self._native.wait(
                self.wire,
                *sent[:4],
                lse_rows,
                o_rows,
                deadline_s,
            )
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error
        if failure is not None:
            raise self.refusal(failure)

    def close(self) -> None:
        self._native.shut_down(self.wire)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises InvalidRequest if queries of ``dtype`` do not fit this connection."""
        if dtype != self._dtype:
            raise InvalidRequest(f"q is {dtype}: this connection was opened for {self._dtype}")

    def refusal(self, failure: bytes) -> FarshoreError:
        """Converts the payload of a FAILURE frame into the error with which the shard refuses the step.

        A malformed payload becomes TransportError."""
        return refusal(codec.error_from_bytes(failure, peer=self._address), self._address)

    def mapped(self, error: Exception) -> FarshoreError:
        """Converts an exception of a native call on this connection into a FarshoreError."""
        if isinstance(error, TimeoutError):
            return Late(f"{self._address}: no answer in time", shards=())
        if isinstance(error, OSError):
            return TransportError(f"{self._address}: {error}")
        return InvalidRequest(str(error))
