"""A shard's store as its peers see it: the cold calls, over gRPC."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.errors import Cancelled, DeadlineExceeded, FarshoreError, NotFound, TransportError
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore import forms
from farshore.kvstore.base import Digest, SpanInfo, SpanKey, SpanSlice
from farshore.kvstore.holds import Holds
from farshore.kvstore.prefix import PrefixBlock
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


class RemoteStore:
    """A shard's store over gRPC: the same calls, with the same errors, as the store itself. Thread-safe too.

    Everything but :meth:`segments` and ``memory``, which are for whoever shares the shard's address space.
    Spans are read and written through a connection that holds them: that created, found or held them, and so
    was told their shape.
    """

    def __init__(self, stub: pb_grpc.AttentionStub, address: str) -> None:
        self._stub = stub
        self._address = address
        self._lock = threading.Lock()
        self._holds = Holds(fences=0)
        self._layouts: dict[SpanId, KVLayout] = {}
        """Of the spans held."""

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        request = pb.CreateRequest(
            key=codec.key_to_pb(key),
            capacity_tokens=capacity_tokens,
            layout=codec.layout_to_pb(layout),
            epoch=epoch,
        )
        span = SpanId(self._call(self._stub.Create, request).span_id)
        self._learn(span, layout, key.sequence, epoch)
        return span

    def write(self, span: SpanId, layer: int, first: int, k: Tensor, v: Tensor, *, epoch: Epoch) -> None:
        layout = self._layout(span)
        forms.check_tokens(layout, layer, k, v)  # here, where shapes and dtypes are still known
        k, v = forms.to_stored(layout, k, v)
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

    def seal(self, span: SpanId, tokens: int, *, epoch: Epoch, blocks: Sequence[PrefixBlock] = ()) -> Digest:
        request = pb.SealRequest(
            span_id=span, tokens=tokens, epoch=epoch, blocks=[codec.block_to_pb(block) for block in blocks]
        )
        return Digest(self._call(self._stub.Seal, request).digest)

    def read(
        self, span: SpanId, layer: int, first: int, last: int, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
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
        k, v = torch.cat(ks, dim=1), torch.cat(vs, dim=1)
        if dtype is None:
            dtype = torch.float32 if layout.format.quantised else layout.format.dtype
        return (k, v) if dtype == torch.uint8 else forms.from_stored(layout, k, v, dtype=dtype)

    def find_prefix(
        self, blocks: Sequence[PrefixBlock], *, layer_class: int, sequence: SequenceId, epoch: Epoch
    ) -> list[SpanSlice]:
        request = pb.FindPrefixRequest(
            blocks=[codec.block_to_pb(block) for block in blocks],
            layer_class=layer_class,
            sequence_id=sequence,
            epoch=epoch,
        )
        slices = [codec.slice_from_pb(it) for it in self._call(self._stub.FindPrefix, request).slices]
        for found in slices:
            self._learn(found.span, found.layout, sequence, epoch)
        return slices

    def hold(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        request = pb.HoldRequest(span_ids=spans, sequence_id=sequence, epoch=epoch)
        reply = self._call(self._stub.Hold, request)
        for span, layout in zip(spans, reply.layouts, strict=True):
            self._learn(span, codec.layout_from_pb(layout), sequence, epoch)

    def drop(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        self._forget(spans, sequence, epoch)
        self._call(self._stub.Drop, pb.HoldRequest(span_ids=spans, sequence_id=sequence, epoch=epoch))

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        with self._lock:
            held = self._holds.of(sequence)
        self._forget(held, sequence, epoch)
        self._call(self._stub.DropSequence, pb.SequenceRequest(sequence_id=sequence, epoch=epoch))

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        self._call(self._stub.Fence, pb.SequenceRequest(sequence_id=sequence, epoch=epoch))

    def announce(self) -> list[SpanInfo]:
        return [codec.info_from_pb(i) for i in self._call(self._stub.Announce, pb.AnnounceRequest()).spans]

    def _layout(self, span: SpanId) -> KVLayout:
        with self._lock:
            if span not in self._layouts:
                raise NotFound(f"no span {span} held through this connection to {self._address}")
            return self._layouts[span]

    def _learn(self, span: SpanId, layout: KVLayout, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            self._holds.add(sequence, span, epoch)
            self._layouts[span] = layout

    def _forget(self, spans: Sequence[SpanId], sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            for span in self._holds.remove(sequence, spans, epoch):
                del self._layouts[span]

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=CALL_DEADLINE_S)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure
