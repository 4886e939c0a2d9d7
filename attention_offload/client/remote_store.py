"""A shard's store as its peers see it: cold calls over gRPC, bulk KV over the fastest way that connects."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import ShardBeat, Wanted
from farshore.attention_offload.client.bulk_link import BulkLink
from farshore.attention_offload.transport.connect import Dialler, shard_error
from farshore.attention_offload.transport.frames import REMOTE, Transport
from farshore.errors import NotFound
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import Digest, SpanInfo, SpanKey, SpanSlice
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store import forms
from farshore.kvstore.store.holds import HoldTable
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc

WRITE_CHUNK_BYTES = 256 << 10
"""As ``READ_CHUNK_BYTES`` at the shard."""

SLOWEST_BYTES_PER_S = 16 << 20
"""Of KV over gRPC: a transfer that is slower than this is late."""

DEADLINE_S = 5.0
"""Of a cold call: some KiB, or a grant of memory that is new. A shard that is slower than that is frozen."""


class RemoteStore:
    """A shard's store: the same calls, with the same errors, as the store itself. Thread-safe too.

    Everything but :meth:`segments` and ``memory``, which are for whoever shares the shard's address space.
    Spans are read and written through a connection that holds them: that created, found or held them, and so
    was told their shape.

    ``engine``: the incarnation of the engine that calls. The shard gives its holds back when it hears nothing
    of it for 30 s: see :meth:`beat`. ``deadline_s``: of every call; of a transfer of KV, how long it may
    stand still."""

    def __init__(
        self,
        stub: pb_grpc.AttentionStub,
        address: str,
        *,
        engine: str,
        deadline_s: float = DEADLINE_S,
        transports: Sequence[Transport] = REMOTE,
    ) -> None:
        self._stub = stub
        self._address = address
        self._engine = engine
        self._deadline_s = deadline_s
        dialler = Dialler(stub, address, transports, purpose="bulk KV goes")
        self._bulk = BulkLink(dialler, address, deadline_s=deadline_s)
        self._lock = threading.Lock()
        self._holds = HoldTable(fences=0)
        self._layouts: dict[SpanId, KVLayout] = {}
        """Of the spans held."""

    @property
    def transport(self) -> Transport | None:
        """What carries KV; None while nothing is connected."""
        return self._bulk.transport

    def beat(self, wanted: Wanted | None, *, deadline_s: float | None = None) -> ShardBeat:
        """Renews the engine's lease on its holds. ``wanted``: all that it wants here, by sequence and epoch;
        what else it brought is given back. None: it doesn't say; the answer tells whether it must.

        No other call that makes or gives back holds may be under way meanwhile: the shard takes one that is
        for given up, and refuses it."""
        request = pb.BeatRequest(caller=self._caller(), complete=wanted is not None)
        if wanted is not None:
            request.sequences.extend(codec.wanted_to_pb(wanted))
        reply = self._call(self._stub.Beat, request, deadline_s=deadline_s)
        if wanted is not None:
            named = {(sequence, span) for (sequence, _), spans in wanted.items() for span in spans}
            with self._lock:
                for sequence, span, epoch in self._holds.all():
                    if (sequence, span) not in named:
                        self._forget([span], sequence, epoch)
        return codec.beat_from_pb(reply)

    def create(self, key: SpanKey, *, capacity_tokens: int, layout: KVLayout, epoch: Epoch) -> SpanId:
        request = pb.CreateRequest(
            key=codec.key_to_pb(key),
            capacity_tokens=capacity_tokens,
            layout=codec.layout_to_pb(layout),
            epoch=epoch,
            caller=self._caller(),
        )
        span = SpanId(self._call(self._stub.Create, request).span_id)
        self._learn(span, layout, key.sequence, epoch)
        return span

    def write(
        self,
        span: SpanId,
        layer: int,
        first: int,
        k: Tensor,
        v: Tensor,
        *,
        sequence: SequenceId,
        epoch: Epoch,
    ) -> None:
        layout = self._layout(span)
        forms.check_tokens(layout, layer, k, v)  # here, where shapes and dtypes are still known
        k, v = forms.to_stored(layout, k, v)
        request = pb.WriteRequest(
            span_id=span,
            layer=layer,
            first=first,
            tokens=k.shape[1],
            sequence_id=sequence,
            epoch=epoch,
            caller=self._caller(),
        )
        if not self._bulk.run(lambda stream: stream.write(request, k, v)):
            pieces = _write_pieces(request, k, v, layout)
            self._call(self._stub.Write, pieces, deadline_s=self._transfer_deadline_s(k.nbytes + v.nbytes))

    def seal(
        self,
        span: SpanId,
        tokens: int,
        *,
        sequence: SequenceId,
        epoch: Epoch,
        blocks: Sequence[PrefixBlock] = (),
    ) -> Digest:
        request = pb.SealRequest(
            span_id=span,
            tokens=tokens,
            sequence_id=sequence,
            epoch=epoch,
            blocks=[codec.block_to_pb(block) for block in blocks],
            caller=self._caller(),
        )
        return Digest(self._call(self._stub.Seal, request).digest)

    def read(
        self,
        span: SpanId,
        layer: int,
        first: int,
        last: int,
        *,
        sequence: SequenceId,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        layout = self._layout(span)
        request = pb.ReadRequest(
            span_id=span,
            layer=layer,
            first=first,
            last=last,
            sequence_id=sequence,
            caller=self._caller(),
        )
        tokens = max(0, last - first)
        k, v = (
            torch.empty(heads, tokens, row_bytes, dtype=torch.uint8)
            for heads, row_bytes in zip(
                (layout.k_heads, layout.v_heads), forms.stored_bytes(layout), strict=True
            )
        )
        if not self._bulk.run(lambda stream: stream.read(request, k, v)):
            self._read(request, k, v)
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
            caller=self._caller(),
        )
        slices = [codec.slice_from_pb(it) for it in self._call(self._stub.FindPrefix, request).slices]
        for found in slices:
            self._learn(found.span, found.layout, sequence, epoch)
        return slices

    def hold(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        reply = self._call(self._stub.Hold, self._hold_request(spans, sequence, epoch))
        for span, layout in zip(spans, reply.layouts, strict=True):
            self._learn(span, codec.layout_from_pb(layout), sequence, epoch)

    def drop(self, spans: Sequence[SpanId], *, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            self._forget(spans, sequence, epoch)
        self._call(self._stub.Drop, self._hold_request(spans, sequence, epoch))

    def drop_sequence(self, sequence: SequenceId, *, epoch: Epoch) -> None:
        with self._lock:
            self._forget(self._holds.of(sequence), sequence, epoch)
        request = pb.SequenceRequest(sequence_id=sequence, epoch=epoch, caller=self._caller())
        self._call(self._stub.DropSequence, request)

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        self._call(self._stub.Fence, pb.SequenceRequest(sequence_id=sequence, epoch=epoch))

    def announce(self) -> list[SpanInfo]:
        return [codec.info_from_pb(i) for i in self._call(self._stub.Announce, pb.AnnounceRequest()).spans]

    def close(self) -> None:
        """Ends the connection for bulk KV; the next transfer makes another."""
        self._bulk.close()

    def _read(self, request: pb.ReadRequest, k: Tensor, v: Tensor) -> None:
        at = 0
        try:
            deadline_s = self._transfer_deadline_s(k.nbytes + v.nbytes)
            for chunk in self._stub.Read(request, timeout=deadline_s):
                end = at + chunk.tokens
                for whole, data in ((k, chunk.k), (v, chunk.v)):
                    codec.bytes_into(whole[:, at:end], data)
                at = end
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure

    def _transfer_deadline_s(self, count: int) -> float:
        """Over gRPC, which knows no deadline on progress."""
        return self._deadline_s + count / SLOWEST_BYTES_PER_S

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
        """In the lock."""
        for span in self._holds.remove(sequence, spans, epoch):
            del self._layouts[span]

    def _caller(self) -> pb.Caller:
        return pb.Caller(engine=self._engine, sent_ns=time.monotonic_ns())

    def _hold_request(self, spans: Sequence[SpanId], sequence: SequenceId, epoch: Epoch) -> pb.HoldRequest:
        return pb.HoldRequest(span_ids=spans, sequence_id=sequence, epoch=epoch, caller=self._caller())

    def _call(self, method: Callable[..., Any], request: Any, *, deadline_s: float | None = None) -> Any:
        try:
            return method(request, timeout=self._deadline_s if deadline_s is None else deadline_s)
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure


def _write_pieces(
    request: pb.WriteRequest, k: Tensor, v: Tensor, layout: KVLayout
) -> Iterator[pb.WriteRequest]:
    """The request, cut into messages."""
    piece_tokens = max(1, WRITE_CHUNK_BYTES // layout.layer_token_bytes)
    for first in range(0, request.tokens, piece_tokens) or (0,):
        part = slice(first, min(first + piece_tokens, request.tokens))
        yield pb.WriteRequest(
            span_id=request.span_id,
            layer=request.layer,
            first=request.first + first,
            tokens=part.stop - first,
            k=codec.to_bytes(k[:, part]),
            v=codec.to_bytes(v[:, part]),
            sequence_id=request.sequence_id,
            epoch=request.epoch,
            caller=request.caller,
        )
