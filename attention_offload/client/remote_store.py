"""Implements the store interface for a shard in another process. Calls go over gRPC, bulk KV over the fastest
transport that connects.

Called by the engine's KV code through :attr:`ShardClient.store`. It must not know steps or hot frames.
"""

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
from farshore.cluster_token import ClusterToken
from farshore.errors import NotFound
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import KVLayout
from farshore.kernels.host import HOST
from farshore.kvstore.base import Digest, PrefixFound, SpanInfo, SpanKey
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.holds import HoldTable
from farshore.kvstore.store.layout import forms
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc

WRITE_CHUNK_BYTES = 256 << 10
"""The size of the messages in which gRPC carries a write; the shard's ``READ_CHUNK_BYTES`` is the same for
reads."""

SLOWEST_BYTES_PER_S = 16 << 20
"""The slowest accepted rate of a KV transfer over gRPC; it sets the transfer's deadline."""

DEADLINE_S = 5.0
"""The deadline of a cold call, which carries some KiB or grants memory that was never touched. A shard that
takes longer is frozen."""


class RemoteStore:
    """A client of a shard's store, with the calls and errors of the store itself. Thread-safe.

    It has no ``segments`` and no ``memory``: these need the shard's address space. It reads and writes
    only spans that it holds, that is, that it created, found or held: the shard's reply to those calls tells
    it the span's layout.
    """

    def __init__(
        self,
        stub: pb_grpc.AttentionStub,
        address: str,
        *,
        engine: str,
        token: ClusterToken | None,
        deadline_s: float = DEADLINE_S,
        transports: Sequence[Transport] = REMOTE,
    ) -> None:
        """``engine`` is the incarnation of the engine that calls. The shard drops the engine's holds if it
        receives no beat for 30 s, see :meth:`beat`. ``token`` is the cluster's, for bulk transfers.
        ``deadline_s`` bounds every call; for a bulk transfer, the time in which no byte moves."""
        self._stub = stub
        self._address = address
        self._engine = engine
        self._deadline_s = deadline_s
        dialler = Dialler(stub, address, transports, token=token, purpose="bulk KV goes")
        self._bulk = BulkLink(dialler, address, deadline_s=deadline_s)
        self._lock = threading.Lock()
        self._holds = HoldTable(fences=0)
        self._layouts: dict[SpanId, KVLayout] = {}
        """The layouts of the held spans."""

    @property
    def transport(self) -> Transport | None:
        """The transport of bulk KV. None while there is no connection for it."""
        return self._bulk.transport

    def beat(self, wanted: Wanted | None, *, deadline_s: float | None = None) -> ShardBeat:
        """Renews the lease on the engine's holds. ``wanted`` lists all spans that the engine wants to hold
        here, by sequence and epoch; the shard drops the engine's other holds. With None the shard drops none,
        and its answer says whether the next beat must list them.

        No other call that adds or drops holds may run at the same time: the shard takes such a call for one
        that the engine has given up, and refuses it."""
        request = pb.BeatRequest(caller=self._caller(), complete=wanted is not None)
        if wanted is not None:
            request.wanted.extend(codec.wanted_to_pb(wanted))
        reply = self._call(self._stub.Beat, request, deadline_s=deadline_s)
        if wanted is not None:
            kept = {(sequence, span) for (sequence, _), spans in wanted.items() for span in spans}
            with self._lock:
                for sequence, span, epoch in self._holds.all():
                    if (sequence, span) not in kept:
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
        forms.check_tokens(layout, layer, k, v)  # the shard receives bytes, without shapes and dtypes
        k, v = forms.to_stored(layout, k, v)
        request = pb.WriteRequest(
            span_id=span,
            layer=layer,
            first_token=first,
            tokens=k.shape[1],
            sequence_id=sequence,
            epoch=epoch,
            caller=self._caller(),
        )
        if not self._bulk.run(lambda connection: connection.write(request, k, v)):
            chunks = _write_chunks(request, k, v, layout)
            self._call(self._stub.Write, chunks, deadline_s=self._transfer_deadline_s(k.nbytes + v.nbytes))

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
            first_token=first,
            end_token=last,
            sequence_id=sequence,
            caller=self._caller(),
        )
        tokens = max(0, last - first)
        k, v = (
            torch.empty(heads, tokens, row_bytes, dtype=torch.uint8, device=HOST)
            for heads, row_bytes in zip(
                (layout.k_heads, layout.v_heads), forms.stored_bytes(layout), strict=True
            )
        )
        if not self._bulk.run(lambda connection: connection.read(request, k, v)):
            self._read_over_grpc(request, k, v)
        if dtype is None:
            dtype = torch.float32 if layout.format.quantised else layout.format.dtype
        return (k, v) if dtype == torch.uint8 else forms.from_stored(layout, k, v, dtype=dtype)

    def find_prefix(self, names: Sequence[bytes], *, layer_class: int) -> PrefixFound:
        request = pb.FindPrefixRequest(hashes=names, layer_class=layer_class, caller=self._caller())
        return codec.found_from_pb(self._call(self._stub.FindPrefix, request))

    def hold_prefix(
        self, blocks: Sequence[PrefixBlock], *, layer_class: int, sequence: SequenceId, epoch: Epoch
    ) -> PrefixFound:
        request = pb.HoldPrefixRequest(
            blocks=[codec.block_to_pb(block) for block in blocks],
            layer_class=layer_class,
            sequence_id=sequence,
            epoch=epoch,
            caller=self._caller(),
        )
        found = codec.found_from_pb(self._call(self._stub.HoldPrefix, request))
        for span_slice in found.slices:
            self._learn(span_slice.span, span_slice.layout, sequence, epoch)
        return found

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
        reply = self._call(self._stub.Announce, pb.AnnounceRequest())
        return [codec.info_from_pb(message) for message in reply.spans]

    def close(self) -> None:
        """Closes the connection for bulk KV. The next transfer makes a new one."""
        self._bulk.close()

    def _read_over_grpc(self, request: pb.ReadRequest, k: Tensor, v: Tensor) -> None:
        start = 0
        try:
            deadline_s = self._transfer_deadline_s(k.nbytes + v.nbytes)
            for chunk in self._stub.Read(request, timeout=deadline_s):
                end = start + chunk.tokens
                for tensor, data in ((k, chunk.k), (v, chunk.v)):
                    codec.bytes_into(tensor[:, start:end], data)
                start = end
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure

    def _transfer_deadline_s(self, transfer_bytes: int) -> float:
        """The deadline of a whole transfer over gRPC, which has no deadline on progress."""
        return self._deadline_s + transfer_bytes / SLOWEST_BYTES_PER_S

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
        """Removes holds, and the layouts of spans that are no longer held. The caller holds the lock."""
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


def _write_chunks(
    request: pb.WriteRequest, k: Tensor, v: Tensor, layout: KVLayout
) -> Iterator[pb.WriteRequest]:
    """Cuts a write into messages of about WRITE_CHUNK_BYTES of KV each; at least one message."""
    chunk_tokens = max(1, WRITE_CHUNK_BYTES // layout.layer_token_bytes)
    for first in range(0, request.tokens, chunk_tokens) or (0,):
        chunk = slice(first, min(first + chunk_tokens, request.tokens))
        yield pb.WriteRequest(
            span_id=request.span_id,
            layer=request.layer,
            first_token=request.first_token + first,
            tokens=chunk.stop - first,
            k=codec.to_bytes(k[:, chunk]),
            v=codec.to_bytes(v[:, chunk]),
            sequence_id=request.sequence_id,
            epoch=request.epoch,
            caller=request.caller,
        )
