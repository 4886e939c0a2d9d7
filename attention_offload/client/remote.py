"""Implements the shard client for an attention worker in another process. Cold calls go over gRPC, hot frames
over the fastest transport that connects.

Called by the dense worker. It must not know what else the engine reads from.
"""

import threading
from collections.abc import Sequence
from uuid import uuid4

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel, Imported, ShardBeat, ShardIdentity, Wanted
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
from farshore.cluster_token import ClusterToken
from farshore.errors import FarshoreError, InvalidRequest, Late, TransportError
from farshore.ids import SequenceId, SpanId
from farshore.kernels.base import State
from farshore.kernels.host import HOST
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import channel

BEAT_DEADLINE_S = 1.0
"""The deadline of a beat. A beat is a small call, so a shard that takes longer counts as not answering."""

MAX_UNDER_WAY = 16
"""The largest number of unanswered frames of a connection. An engine usually has one for each micro-batch;
shared memory has this many slots."""


class RemoteClient:
    """A :class:`~farshore.attention_offload.client.base.ShardClient` of the attention worker at an address.

    Any thread may connect; only the engine's loop uses the connection. ``connect`` therefore puts a new
    connection into ``_newest``, and the loop takes it over into ``_connection`` when it begins a step.
    """

    store: RemoteStore

    def __init__(
        self,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        transports: Sequence[Transport] = REMOTE,
        engine: str | None = None,
        token: ClusterToken | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """``address`` is ``host:port`` of the shard's gRPC server. ``dtype`` is the dtype of q and o.
        ``transports`` are tried in the given order. ``engine`` is the incarnation of the engine that owns
        this client; None for a new one. ``token`` is the cluster's; None for a shard without one.
        ``deadline_s`` bounds each cold call."""
        self._token = token
        self._engine = engine or uuid4().hex
        self._deadline_s = deadline_s
        self._address = address
        self._model = model
        self._dtype = dtype
        self._lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._transports = tuple(transports)
        self._second_connection: RemoteClient | None = None
        self._channel = channel(address, token)
        self._stub = pb_grpc.AttentionStub(self._channel)
        self._connecting = threading.Lock()
        """Held while a connection is made, so that one thread at a time makes one."""
        self._handover = threading.Lock()
        self._newest: HotConnection | None = None
        """The newest connection. Written by any thread, under ``_handover``."""
        self._connection: HotConnection | None = None
        """The connection on which the current step was announced. Used by the loop only."""
        self._step: ShardStep | None = None
        """The step that was announced last on ``_connection``."""
        self._dialler = Dialler(self._stub, address, transports, token=token, purpose="hot frames go")
        self.store = RemoteStore(
            self._stub,
            address,
            engine=self._engine,
            token=token,
            deadline_s=deadline_s,
            transports=transports,
        )

    @property
    def address(self) -> str:
        return self._address

    @property
    def transport(self) -> Transport | None:
        connection = self._newest
        return connection.transport if connection is not None else None

    @property
    def native_connection(self) -> NativeConnection | None:
        return self._connection if isinstance(self._connection, NativeConnection) else None

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
        connection, second = self._newest, self._second_connection
        return connection is not None and connection.is_open and (second is None or second.ready)

    def connect(self, *, deadline_s: float = CONNECT_DEADLINE_S) -> Transport:
        """``deadline_s`` bounds the call that asks the shard where it listens; each transport that is then
        tried has DIAL_DEADLINE_S to connect."""
        with self._connecting:
            connection = self._newest
            if connection is None or not connection.is_open:
                connection = self._open(deadline_s)
                with self._handover:
                    self._newest = connection
        if self._second_connection is not None:
            self._second_connection.connect(deadline_s=deadline_s)
        return connection.transport

    def import_span(
        self, address: str, span: SpanId, *, tokens: int, holder: SequenceId, deadline_s: float
    ) -> Imported:
        wanted = pb.ExportRequest(span_id=span, tokens=tokens, sequence_id=holder)
        try:
            reply = self._stub.Import(pb.ImportRequest(address=address, span=wanted), timeout=deadline_s)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
        return codec.imported_from_pb(reply)

    def begin(
        self, step: ShardStep, *, deadline_s: float = MOST_DEADLINE_S, drain_s: float = MOST_DEADLINE_S
    ) -> None:
        self._take_newest()
        connection = self._connection
        if connection is None:
            raise Late(f"{self._address}: there is no connection for hot frames now", shards=())
        try:
            if connection.under_way:
                connection.drain(drain_s)
            if self._step is not None and not self._model.has_windows and step.reads_as(self._step):
                connection.repeat_step(step.step, deadline_s)
            else:
                connection.begin(step, deadline_s)
        except FarshoreError:
            self.break_off()
            raise
        self._step = step

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Sent:
        if self._connection is None or self._step is None:
            raise TransportError(f"{self._address}: the connection is closed; begin the step again")
        if self._connection.under_way == MAX_UNDER_WAY:
            raise InvalidRequest(f"{MAX_UNDER_WAY} frames are under way: wait for one before the next")
        sent = Sent(self._step.step, layer, micro_batch, q.shape[0], q.shape[1])
        try:
            self._connection.send(sent, q)
        except FarshoreError:
            self.break_off()
            raise
        return sent

    def wait(self, sent: Sent, *, out: State | None = None, deadline_s: float = MOST_DEADLINE_S) -> State:
        if self._connection is None or self._step is None:
            raise TransportError(f"{self._address}: the connection is closed; begin the step again")
        if out is None:
            v_dim = self._model.specs[self._model.layer_class[sent.layer]].v_dim
            out = State(
                torch.empty(sent.rows, sent.heads, v_dim, dtype=self._dtype, device=HOST),
                torch.empty(sent.rows, sent.heads, dtype=self._lse_dtype, device=HOST),
            )
        try:
            self._connection.wait(sent, out, deadline_s)
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
                token=self._token,
                deadline_s=self._deadline_s,
            )
        return self._second_connection

    def break_off(self) -> None:
        connection, self._connection, self._step = self._connection, None, None
        if connection is not None:
            connection.close()
            with self._handover:
                if self._newest is connection:
                    self._newest = None

    def close(self) -> None:
        if self._second_connection is not None:
            self._second_connection.close()
        self._take_newest()
        self.break_off()
        self.store.close()
        self._channel.close()

    def _take_newest(self) -> None:
        if self._newest is not self._connection:
            self.break_off()
            self._connection = self._newest

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
        # A GrpcConnection opens its call only when the loop begins a step. The shard must answer a call now,
        # so that the loop does not wait for a shard that is gone.
        self.identify(deadline_s=deadline_s)
        return GrpcConnection(self._address, self._model, self._dtype, token=self._token)
