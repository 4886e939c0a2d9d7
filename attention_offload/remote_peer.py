"""An attention worker in another process, as its engine sees it: cold calls over gRPC, hot frames over the
fastest transport that connects.

Called by the dense worker. It must not know what else the engine reads from.
"""

from collections.abc import Sequence
from uuid import uuid4

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel, ShardIdentity
from farshore.attention_offload.connect import Dialler, shard_error
from farshore.attention_offload.frame_stream import FrameStream
from farshore.attention_offload.frames import REMOTE, HotStream, Sent, Transport
from farshore.attention_offload.grpc_stream import GrpcStream
from farshore.attention_offload.plan import ShardStep
from farshore.attention_offload.remote_store import DEADLINE_S, RemoteStore
from farshore.errors import FarshoreError, InvalidRequest, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import OPTIONS

FRAME_DEADLINE_S = 30.0
"""One layer's answer. Generous: a shard's first touch of a 100K-token context on a busy host is slow."""

MAX_UNDER_WAY = 16
"""Frames unanswered at a time: one a micro-batch is usual, and shared memory has slots for so many."""


class RemotePeer:
    """A :class:`~farshore.attention_offload.base.Peer`. ``transports`` are tried in the order given."""

    store: RemoteStore

    def __init__(
        self,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        frame_deadline_s: float = FRAME_DEADLINE_S,
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
        self._frame_deadline_s = frame_deadline_s
        self._transports = tuple(transports)
        self._twin: RemotePeer | None = None
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = pb_grpc.AttentionStub(self._channel)
        self._stream: HotStream | None = None
        self._step: ShardStep | None = None
        """The one announced last on this connection."""
        self._dialler = Dialler(self._stub, address, transports, purpose="hot frames go")
        self.store = RemoteStore(
            self._stub, address, engine=self._engine, deadline_s=deadline_s, transports=transports
        )

    @property
    def transport(self) -> Transport | None:
        """Of hot frames; None while there is no connection for them."""
        return self._stream.transport if self._stream else None

    @property
    def frames(self) -> FrameStream | None:
        return self._stream if isinstance(self._stream, FrameStream) else None

    @property
    def bulk_transport(self) -> Transport | None:
        return self.store.transport

    def identify(self) -> ShardIdentity:
        try:
            message = self._stub.Identify(pb.IdentifyRequest(), timeout=self._deadline_s)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
        return codec.identity_from_pb(message)

    def connect(self) -> Transport:
        """Make the connection for hot frames now; :meth:`begin` makes it where there is none."""
        if self._stream is None:
            self._stream = self._open()
        return self._stream.transport

    def begin(self, step: ShardStep) -> None:
        if self._stream is not None and self._stream.under_way:
            # A step was dropped half way. A fresh connection is the simplest way never to see its answers.
            self.break_off()
        used = self._stream is not None
        self.connect()
        try:
            self._announce(step)
        except TransportError:
            if not used:
                raise
            # The shard was gone for a while between two steps.
            self.connect()
            self._announce(step)

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Sent:
        if self._stream is None or self._step is None:
            raise TransportError(f"{self._address}: the stream broke; begin the step again")
        if self._stream.under_way == MAX_UNDER_WAY:
            raise InvalidRequest(f"{MAX_UNDER_WAY} frames are under way: wait for one before the next")
        sent = Sent(self._step.step, layer, micro_batch, q.shape[0], q.shape[1])
        try:
            self._stream.send(sent, q)
        except FarshoreError:
            self.break_off()
            raise
        return sent

    def wait(self, sent: Sent, *, out: State | None = None) -> State:
        if self._stream is None:
            raise TransportError(f"{self._address}: the stream broke; begin the step again")
        if out is None:
            v_dim = self._model.specs[self._model.layer_class[sent.layer]].v_dim
            out = State(
                torch.empty(sent.rows, sent.heads, v_dim, dtype=self._dtype),
                torch.empty(sent.rows, sent.heads, dtype=self._lse_dtype),
            )
        try:
            self._stream.wait(sent, out)
        except FarshoreError:
            self.break_off()
            raise
        return out

    def twin(self) -> "RemotePeer":
        if self._twin is None:
            self._twin = RemotePeer(
                self._address,
                self._model,
                self._dtype,
                frame_deadline_s=self._frame_deadline_s,
                transports=self._transports,
                engine=self._engine,
                deadline_s=self._deadline_s,
            )
        return self._twin

    def break_off(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._step = None

    def close(self) -> None:
        if self._twin is not None:
            self._twin.close()
        self.break_off()
        self.store.close()
        self._channel.close()

    def _announce(self, step: ShardStep) -> None:
        assert self._stream is not None
        try:
            if self._step is not None and not self._model.has_windows and step.reads_as(self._step):
                self._stream.again(step.step)
            else:
                self._stream.begin(step)
        except FarshoreError:
            self.break_off()
            raise
        self._step = step

    def _open(self) -> HotStream:
        connected = self._dialler.connect(codec.model_to_pb(self._model, self._dtype))
        if connected is not None:
            return FrameStream(
                connected.connection,
                connected.transport,
                self._address,
                self._model,
                self._dtype,
                frame_deadline_s=self._frame_deadline_s,
                shares_cores=connected.shares_cores,
            )
        return GrpcStream(
            self._address,
            self._model,
            self._dtype,
            frame_deadline_s=self._frame_deadline_s,
        )
