"""The gRPC stream transport, engine's end. It works wherever gRPC does: TLS, flow control, keepalive, and any
kernels at the shard. A hop takes some 600 us, most of it threads that wake each other (decision 009).
"""

import queue
import threading

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.connect import shard_error
from farshore.attention_offload.frames import Sent, Transport
from farshore.attention_offload.plan import ShardStep
from farshore.errors import TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc


class GrpcStream:
    """A :class:`~farshore.attention_offload.frames.HotStream`: one Attend call. Frames go out as they are
    put, answers and the final error come in by a thread."""

    transport = Transport.GRPC

    def __init__(
        self,
        stub: pb_grpc.AttentionStub,
        address: str,
        model: AttentionModel,
        dtype: torch.dtype,
        *,
        frame_deadline_s: float,
    ) -> None:
        self._address = address
        self._deadline_s = frame_deadline_s
        self.under_way = 0
        self._outgoing: queue.SimpleQueue[pb.Frame | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[pb.State | grpc.RpcError | None] = queue.SimpleQueue()
        self._call = stub.Attend(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._receive, name="attend-reader", daemon=True)
        self._reader.start()
        self._outgoing.put(pb.Frame(open=codec.model_to_pb(model, dtype)))

    def begin(self, step: ShardStep) -> None:
        self._outgoing.put(pb.Frame(begin=codec.step_to_pb(step)))

    def again(self, step: int) -> None:
        self._outgoing.put(pb.Frame(again=pb.Again(step=step)))

    def send(self, sent: Sent, q: Tensor) -> None:
        frame = pb.LayerFrame(
            step=sent.step, layer=sent.layer, micro_batch=sent.micro_batch, q=codec.to_bytes(q)
        )
        self._outgoing.put(pb.Frame(layer=frame))
        self.under_way += 1

    def wait(self, sent: Sent, out: State) -> None:
        answer = self._next()
        if (answer.step, answer.layer, answer.micro_batch) != sent[:3]:
            raise TransportError(
                f"{self._address}: answered step {answer.step} layer {answer.layer} micro-batch"
                f" {answer.micro_batch}, not {sent}"
            )
        out.o.copy_(codec.from_bytes(answer.o, tuple(out.o.shape), out.o.dtype))
        out.lse.copy_(codec.from_bytes(answer.lse, tuple(out.lse.shape), out.lse.dtype))
        self.under_way -= 1

    def close(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._reader.join()

    def _next(self) -> pb.State:
        try:
            answer = self._incoming.get(timeout=self._deadline_s)
        except queue.Empty:
            raise TransportError(f"{self._address}: no answer within {self._deadline_s:g} s") from None
        if answer is None:
            raise TransportError(f"{self._address}: the shard ended the stream")
        if isinstance(answer, grpc.RpcError):
            raise shard_error(answer, self._address) from answer
        return answer

    def _receive(self) -> None:
        try:
            for state in self._call:
                self._incoming.put(state)
            self._incoming.put(None)
        except grpc.RpcError as failure:
            self._incoming.put(failure)
