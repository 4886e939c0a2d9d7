"""Hot frames over shared memory or TCP, engine's end: native calls that wait without the interpreter's
lock."""

import socket

import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.transport.connect import is_near, refusal
from farshore.attention_offload.transport.core_sharing import give_way
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S, Sent, Transport, frame_bytes, native
from farshore.errors import FarshoreError, InvalidRequest, Late, TransportError
from farshore.kernels.base import State

AWAKE_US = 200
"""How long an engine waits for an answer awake, where answers come that soon: it has nothing else to do, and
waking it takes 40 us where its core is idle and a virtual machine's."""


class FrameStream:
    """A :class:`~farshore.attention_offload.transport.frames.HotStream` on a connection that it owns from
    now on."""

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
        """``shares_cores``: with the shard; see ``connect.Connected``."""
        self.transport = transport
        self.shares_cores = shares_cores
        self._address = address
        self._model = model
        self._dtype = dtype
        self._native = native()
        if transport is Transport.SHARED_MEMORY:
            self.wire = self._native.shared_memory(connection.detach(), MOST_DEADLINE_S, AWAKE_US)
        else:
            near = is_near(connection)
            self.wire = self._native.stream(connection.detach(), MOST_DEADLINE_S, near, AWAKE_US)
        if shares_cores:
            give_way()

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
        most = 0
        for spec in self._model.specs:
            q, lse, o = frame_bytes(spec, rows=rows, heads=groups * spec.q_heads_per_group, dtype=self._dtype)
            most = max(most, q, lse + o)
        message = codec.step_to_pb(step).SerializeToString()
        try:
            self._native.begin(self.wire, step.step, message, most, deadline_s)
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
        try:
            self._native.send(self.wire, *sent[:4], q.data_ptr(), heads * dim * size, q.stride(0) * size)
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error

    def wait(self, sent: Sent, out: State, deadline_s: float) -> None:
        o, lse = out
        size = o.element_size()
        try:
            failure = self._native.wait(
                self.wire,
                *sent[:4],
                lse.data_ptr(),
                sent.heads * 4,
                lse.stride(0) * 4,
                o.data_ptr(),
                sent.heads * o.shape[2] * size,
                o.stride(0) * size,
                deadline_s,
            )
        except (OSError, ValueError) as error:
            raise self.mapped(error) from error
        if failure is not None:
            raise self.refusal(failure)

    def close(self) -> None:
        self._native.shut_down(self.wire)

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype != self._dtype:
            raise InvalidRequest(f"q is {dtype}: this connection was opened for {self._dtype}")

    def refusal(self, failure: bytes) -> FarshoreError:
        """What a shard's last message says: the error that it refuses the step with, or TransportError where
        the message is garbage."""
        return refusal(codec.error_from_bytes(failure, client=self._address), self._address)

    def mapped(self, error: Exception) -> FarshoreError:
        """The error for what a native call on this connection failed with."""
        if isinstance(error, TimeoutError):
            return Late(f"{self._address}: no answer in time", shards=())
        if isinstance(error, OSError):
            return TransportError(f"{self._address}: {error}")
        return InvalidRequest(str(error))
