"""An attention worker in another process, as its engine sees it: cold calls over gRPC, hot frames over the
fastest transport that connects.

Called by the dense worker. It must not know what else the engine reads from.
"""

import threading
from collections.abc import Sequence
from uuid import uuid4

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel, ShardBeat, ShardIdentity, Wanted
from farshore.attention_offload.client.remote_store import DEADLINE_S, RemoteStore
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.transport.connect import CONNECT_DEADLINE_S, Dialler, shard_error
from farshore.attention_offload.transport.frames import (
    MOST_DEADLINE_S,
    REMOTE,
    HotConnection,
    Sent,
    Transport,
)
from farshore.attention_offload.transport.grpc_connection import GrpcConnection
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.errors import FarshoreError, InvalidRequest, Late, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import OPTIONS

BEAT_DEADLINE_S = 1.0
"""A beat is a small call: a shard that takes longer does not answer."""

MAX_UNDER_WAY = 16
"""Frames unanswered at a time: one a micro-batch is usual, and shared memory has slots for so many."""


class RemoteClient:
    """A :class:`~farshore.attention_offload.client.base.ShardClient`. ``transports`` are tried in the
    order given."""

    store: RemoteStore

    def __init__(
        self,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        transports: Sequence[Transport] = REMOTE,
        engine: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """``engine``: the incarnation of the engine whose peer this is; None: one of its own. ``deadline_s``:
        of cold calls."""
        self._engine = engine or uuid4().hex
        self._deadline_s = deadline_s
        self._address = address
        self._model = model
        self._dtype = dtype
        self._lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._transports = tuple(transports)
        self._second_connection: RemoteClient | None = None
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = pb_grpc.AttentionStub(self._channel)
        self._connecting = threading.Lock()
        """Held while a connection is made: one thread at a time makes one."""
        self._handover = threading.Lock()
        self._connected: HotConnection | None = None
        """The newest connection: any thread puts it here, the loop takes it when it begins a step."""
        self._stream: HotConnection | None = None
        """The loop's: the one that the step under way was announced on."""
        self._step: ShardStep | None = None
        """The one announced last on ``_stream``."""
        self._dialler = Dialler(self._stub, address, transports, purpose="hot frames go")
        self.store = RemoteStore(
            self._stub, address, engine=self._engine, deadline_s=deadline_s, transports=transports
        )

    @property
    def transport(self) -> Transport | None:
        """Of hot frames; None while there is no connection for them."""
        stream = self._connected
        return stream.transport if stream is not None else None

    @property
    def frames(self) -> NativeConnection | None:
        return self._stream if isinstance(self._stream, NativeConnection) else None

    @property
    def bulk_transport(self) -> Transport | None:
        return self.store.transport

    def identify(self, *, deadline_s: float = CONNECT_DEADLINE_S) -> ShardIdentity:
        try:
            message = self._stub.Identify(pb.IdentifyRequest(), timeout=deadline_s)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
        return codec.identity_from_pb(message)

    def beat(self, wanted: Wanted | None) -> ShardBeat:
        return self.store.beat(wanted, deadline_s=BEAT_DEADLINE_S)

    @property
    def ready(self) -> bool:
        stream, second_connection = self._connected, self._second_connection
        return (
            stream is not None and stream.is_open and (second_connection is None or second_connection.ready)
        )

    def connect(self, *, deadline_s: float = CONNECT_DEADLINE_S) -> Transport:
        """``deadline_s``: of the call that asks the shard; dialling has DIAL_DEADLINE_S for each way."""
        with self._connecting:
            stream = self._connected
            if stream is None or not stream.is_open:
                stream = self._open(deadline_s)
                with self._handover:
                    self._connected = stream
        if self._second_connection is not None:
            self._second_connection.connect(deadline_s=deadline_s)
        return stream.transport

    def begin(
        self, step: ShardStep, *, deadline_s: float = MOST_DEADLINE_S, drain_s: float = MOST_DEADLINE_S
    ) -> None:
        self._take_newest()
        stream = self._stream
        if stream is None:
            raise Late(f"{self._address}: there is no connection for hot frames now", shards=())
        try:
            if stream.under_way:
                stream.drain(drain_s)
            if self._step is not None and not self._model.has_windows and step.reads_as(self._step):
                stream.repeat_step(step.step, deadline_s)
            else:
                stream.begin(step, deadline_s)
        except FarshoreError:
            self.break_off()
            raise
        self._step = step

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Sent:
        if self._stream is None or self._step is None:
            raise TransportError(f"{self._address}: the connection is closed; begin the step again")
        if self._stream.under_way == MAX_UNDER_WAY:
            raise InvalidRequest(f"{MAX_UNDER_WAY} frames are under way: wait for one before the next")
        sent = Sent(self._step.step, layer, micro_batch, q.shape[0], q.shape[1])
        try:
            self._stream.send(sent, q)
        except FarshoreError:
            self.break_off()
            raise
        return sent

    def wait(self, sent: Sent, *, out: State | None = None, deadline_s: float = MOST_DEADLINE_S) -> State:
        if self._stream is None or self._step is None:
            raise TransportError(f"{self._address}: the connection is closed; begin the step again")
        if out is None:
            v_dim = self._model.specs[self._model.layer_class[sent.layer]].v_dim
            out = State(
                torch.empty(sent.rows, sent.heads, v_dim, dtype=self._dtype),
                torch.empty(sent.rows, sent.heads, dtype=self._lse_dtype),
            )
        try:
            self._stream.wait(sent, out, deadline_s)
        except FarshoreError:
            self.break_off()
            raise
        return out

    def second_connection(self) -> "RemoteClient":
        if self._second_connection is None:
            self._second_connection = RemoteClient(
                self._address,
                self._model,
                self._dtype,
                transports=self._transports,
                engine=self._engine,
                deadline_s=self._deadline_s,
            )
        return self._second_connection

    def break_off(self) -> None:
        stream, self._stream, self._step = self._stream, None, None
        if stream is not None:
            stream.close()
            with self._handover:
                if self._connected is stream:
                    self._connected = None

    def close(self) -> None:
        if self._second_connection is not None:
            self._second_connection.close()
        self._take_newest()
        self.break_off()
        self.store.close()
        self._channel.close()

    def _take_newest(self) -> None:
        if self._connected is not self._stream:
            self.break_off()
            self._stream = self._connected

    def _open(self, deadline_s: float) -> HotConnection:
        opening = codec.model_to_pb(self._model, self._dtype)
        connected = self._dialler.connect(opening, deadline_s=deadline_s)
        if connected is not None:
            return NativeConnection(
                connected.connection,
                connected.transport,
                self._address,
                self._model,
                self._dtype,
                shares_cores=connected.shares_cores,
            )
        # The stream opens when the loop begins a step: only a shard that answers now may be waited for then.
        self.identify(deadline_s=deadline_s)
        return GrpcConnection(self._address, self._model, self._dtype)
