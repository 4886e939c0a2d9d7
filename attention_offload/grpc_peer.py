"""The gRPC stream transport, engine's end. It works wherever gRPC does; faster transports come beside it."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel, ShardIdentity
from farshore.attention_offload.plan import ShardStep
from farshore.errors import Cancelled, DeadlineExceeded, FarshoreError, NotFound, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout, State
from farshore.kvstore import blocks
from farshore.kvstore.base import Digest, SpanInfo, SpanKey
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import OPTIONS, error_of

CALL_DEADLINE_S = 30.0
"""A cold call: at most a few MiB, or an announcement."""

FRAME_DEADLINE_S = 30.0
"""One layer's answer. Generous: a shard's first touch of a 100K-token context on a busy host is slow."""

WRITE_CHUNK_BYTES = 1 << 20


def _error_of(failure: grpc.RpcError, address: str) -> FarshoreError:
    """What a call to a shard failed with. Late, or cancelled by the other end, is as good as unreachable: the
    caller gave no such order, and may try again."""
    error = error_of(failure, peer=address)
    if isinstance(error, Cancelled | DeadlineExceeded):
        return TransportError(f"{address}: {error}")
    return error


@dataclass(slots=True, kw_only=True)
class _Granted:
    """A span this connection was granted, for as long as something here may still read it."""

    key: SpanKey
    layout: KVLayout
    epoch: Epoch
    holders: int = 1
    owned: bool = True
    """Whether the sequence's own hold was not yet given back by drop_sequence."""


class RemoteStore:
    """A shard's store over gRPC: the same calls, with the same errors, as the store itself. Thread-safe too.

    Everything but :meth:`segments` and ``memory``, which are for whoever shares the shard's address space.
    Spans are read and written through the connection that created them: it knows their shape.
    """

    def __init__(self, stub: pb_grpc.AttentionStub, address: str) -> None:
        self._stub = stub
        self._address = address
        self._lock = threading.Lock()
        self._granted: dict[SpanId, _Granted] = {}

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        request = pb.CreateRequest(
            key=codec.key_to_pb(key),
            capacity_tokens=capacity_tokens,
            layout=codec.layout_to_pb(layout),
            epoch=epoch,
        )
        span = SpanId(self._call(self._stub.Create, request).span_id)
        with self._lock:
            self._granted[span] = _Granted(key=key, layout=layout, epoch=epoch)
        return span

    def write(self, span: SpanId, layer: int, first: int, k: Tensor, v: Tensor, *, epoch: Epoch) -> None:
        layout = self._layout(span)
        blocks.check_tokens(layout, layer, k, v)  # here, where shapes and dtypes are still known
        chunk = max(1, WRITE_CHUNK_BYTES // layout.layer_token_bytes)
        for start in range(0, k.shape[1], chunk):
            part = slice(start, min(start + chunk, k.shape[1]))
            request = pb.WriteRequest(
                span_id=span,
                layer=layer,
                first=first + start,
                tokens=part.stop - start,
                k=codec.to_bytes(k[:, part]),
                v=codec.to_bytes(v[:, part]),
                epoch=epoch,
            )
            self._call(self._stub.Write, request)

    def seal(self, span: SpanId, tokens: int, *, epoch: Epoch) -> Digest:
        request = pb.SealRequest(span_id=span, tokens=tokens, epoch=epoch)
        return Digest(self._call(self._stub.Seal, request).digest)

    def read(self, span: SpanId, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        layout = self._layout(span)
        request = pb.ReadRequest(span_id=span, layer=layer, first=first, last=last)
        ks, vs = [], []
        try:
            for chunk in self._stub.Read(request, timeout=CALL_DEADLINE_S):
                k, v = codec.tokens_from_bytes(chunk.k, chunk.v, layout, chunk.tokens)
                ks.append(k)
                vs.append(v)
        except grpc.RpcError as failure:
            raise _error_of(failure, self._address) from failure
        return torch.cat(ks, dim=1), torch.cat(vs, dim=1)

    def hold(self, span: SpanId) -> None:
        self._call(self._stub.Hold, pb.SpanRequest(span_id=span))
        with self._lock:
            if span in self._granted:
                self._granted[span].holders += 1

    def drop(self, span: SpanId) -> None:
        with self._lock:
            self._release(span)
        self._call(self._stub.Drop, pb.SpanRequest(span_id=span))

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        with self._lock:
            for span, it in list(self._granted.items()):
                if it.key.sequence == sequence and it.epoch <= epoch and it.owned:
                    it.owned = False
                    self._release(span)
        self._call(self._stub.DropSequence, pb.SequenceRequest(sequence_id=sequence, epoch=epoch))

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        self._call(self._stub.Fence, pb.SequenceRequest(sequence_id=sequence, epoch=epoch))

    def announce(self) -> list[SpanInfo]:
        return [codec.info_from_pb(i) for i in self._call(self._stub.Announce, pb.AnnounceRequest()).spans]

    def _layout(self, span: SpanId) -> KVLayout:
        with self._lock:
            if span not in self._granted:
                raise NotFound(f"no span {span} of this connection to {self._address}")
            return self._granted[span].layout

    def _release(self, span: SpanId) -> None:
        """Mirrors the store's count of holders; the caller holds the lock."""
        it = self._granted.get(span)
        if it is not None:
            it.holders -= 1
            if not it.holders:
                del self._granted[span]

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=CALL_DEADLINE_S)
        except grpc.RpcError as failure:
            raise _error_of(failure, self._address) from failure


class Sent(NamedTuple):
    """A layer frame under way, and the shape of its answer."""

    step: int
    layer: int
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
            raise _error_of(failure, self._address) from failure
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
        return Sent(number, layer, q.shape[0], q.shape[1])

    def wait(self, sent: Sent) -> State:
        if self._stream is None:
            raise TransportError(f"{self._address}: the stream broke; begin the step again")
        try:
            answer = self._stream.get(self._frame_deadline_s)
        except grpc.RpcError as failure:
            self._reset()
            raise _error_of(failure, self._address) from failure
        except TransportError as error:
            self._reset()
            raise TransportError(f"{self._address}: {error}") from error
        if (answer.step, answer.layer) != (sent.step, sent.layer):
            self._reset()
            raise TransportError(
                f"{self._address}: answered step {answer.step} layer {answer.layer}, not {sent}"
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
