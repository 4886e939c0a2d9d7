"""The gRPC stream transport, engine's end. It works wherever gRPC does; faster transports come beside it."""

import queue
import threading
from typing import NamedTuple

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel, ShardIdentity
from farshore.attention_offload.plan import ShardStep
from farshore.attention_offload.remote_store import CALL_DEADLINE_S, RemoteStore, shard_error
from farshore.errors import TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import OPTIONS

FRAME_DEADLINE_S = 30.0
"""One layer's answer. Generous: a shard's first touch of a 100K-token context on a busy host is slow."""


class Sent(NamedTuple):
    """A layer frame under way, and the shape of its answer."""

    step: int
    layer: int
    micro_batch: int
    rows: int
    heads: int


class _Stream:
    """One Attend stream: frames go out as they are put, answers and the final error come in by a thread."""

    def __init__(self, stub: pb_grpc.AttentionStub) -> None:
        self._outgoing: queue.SimpleQueue[pb.Frame | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[pb.State | grpc.RpcError | None] = queue.SimpleQueue()
        self._call = stub.Attend(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._receive, name="attend-reader", daemon=True)
        self._reader.start()

    def put(self, frame: pb.Frame) -> None:
        self._outgoing.put(frame)

    def get(self, timeout_s: float) -> pb.State:
        """The next answer. Raises grpc.RpcError, or TransportError when it does not come."""
        try:
            answer = self._incoming.get(timeout=timeout_s)
        except queue.Empty:
            raise TransportError(f"no answer within {timeout_s:.0f} s") from None
        if answer is None:
            raise TransportError("the shard ended the stream")
        if isinstance(answer, grpc.RpcError):
            raise answer
        return answer

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._reader.join()

    def _receive(self) -> None:
        try:
            for state in self._call:
                self._incoming.put(state)
            self._incoming.put(None)
        except grpc.RpcError as failure:
            self._incoming.put(failure)


class GrpcPeer:
    """A :class:`~farshore.attention_offload.base.Peer` over one gRPC channel."""

    store: RemoteStore
    transport = "gRPC"

    def __init__(
        self,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        frame_deadline_s: float = FRAME_DEADLINE_S,
    ) -> None:
        self._address = address
        self._model = model
        self._dtype = dtype
        self._frame_deadline_s = frame_deadline_s
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = pb_grpc.AttentionStub(self._channel)
        self._stream: _Stream | None = None
        self._unanswered = 0
        self._step: ShardStep | None = None
        self.store = RemoteStore(self._stub, address)

    def identify(self) -> ShardIdentity:
        try:
            message = self._stub.Identify(pb.IdentifyRequest(), timeout=CALL_DEADLINE_S)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
        return codec.identity_from_pb(message)

    def begin(self, step: ShardStep) -> None:
        if self._unanswered:
            # A step was dropped half way. A fresh stream is the simplest way never to see its answers.
            self._reset()
        if self._stream is None:
            self._stream = _Stream(self._stub)
            self._stream.put(pb.Frame(open=codec.model_to_pb(self._model, self._dtype)))
        self._step = step
        self._stream.put(pb.Frame(begin=codec.step_to_pb(step)))

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Sent:
        if self._stream is None or self._step is None:
            raise TransportError(f"{self._address}: the stream broke; begin the step again")
        number = self._step.step
        frame = pb.LayerFrame(step=number, layer=layer, micro_batch=micro_batch, q=codec.to_bytes(q))
        self._unanswered += 1
        self._stream.put(pb.Frame(layer=frame))
        return Sent(number, layer, micro_batch, q.shape[0], q.shape[1])

    def wait(self, sent: Sent) -> State:
        if self._stream is None:
            raise TransportError(f"{self._address}: the stream broke; begin the step again")
        try:
            answer = self._stream.get(self._frame_deadline_s)
        except grpc.RpcError as failure:
            self._reset()
            raise shard_error(failure, self._address) from failure
        except TransportError as error:
            self._reset()
            raise TransportError(f"{self._address}: {error}") from error
        if (answer.step, answer.layer, answer.micro_batch) != sent[:3]:
            self._reset()
            raise TransportError(
                f"{self._address}: answered step {answer.step} layer {answer.layer} micro-batch"
                f" {answer.micro_batch}, not {sent}"
            )
        self._unanswered -= 1
        v_dim = self._model.specs[self._model.layer_class[sent.layer]].v_dim
        lse_dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        return State(
            codec.from_bytes(answer.o, (sent.rows, sent.heads, v_dim), self._dtype),
            codec.from_bytes(answer.lse, (sent.rows, sent.heads), lse_dtype),
        )

    def close(self) -> None:
        self._reset()
        self._channel.close()

    def _reset(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._unanswered = 0
