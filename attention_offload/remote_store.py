"""A shard's store as its peers see it: the cold calls, over gRPC."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.errors import Cancelled, DeadlineExceeded, FarshoreError, NotFound, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore import forms
from farshore.kvstore.base import Digest, SpanInfo, SpanKey
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import error_of

CALL_DEADLINE_S = 30.0
"""A cold call: at most a few MiB, or an announcement."""

WRITE_CHUNK_BYTES = 1 << 20


def shard_error(failure: grpc.RpcError, address: str) -> FarshoreError:
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
        forms.check_tokens(layout, layer, k, v)  # here, where shapes and dtypes are still known
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
            raise shard_error(failure, self._address) from failure
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
            raise shard_error(failure, self._address) from failure
