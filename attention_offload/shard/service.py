"""Serves one store over gRPC: cold calls, the Attend stream of hot frames, and offers of native connections.

Called by ``workers.attention``; runs in an attention worker's process. It must not know engines' schedules or
the cluster. One thread serves one call; an engine's Attend stream occupies a thread for as long as it lasts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import grpc
import numpy as np
import torch
from torch import Tensor

from farshore import rpc
from farshore.attention_offload import codec
from farshore.attention_offload.base import ShardBeat, ShardIdentity
from farshore.attention_offload.shard import checks, exports
from farshore.attention_offload.shard.bulk_loop import serve_bulk
from farshore.attention_offload.shard.engine_holds import EngineHolds
from farshore.attention_offload.shard.frame_loop import FrameListener, serve_frames
from farshore.attention_offload.shard.imports import SpanImports
from farshore.attention_offload.shard.session import AttendedBytes, ShardSession, identity_of
from farshore.attention_offload.transport.core_sharing import oversubscribed_with
from farshore.attention_offload.transport.frames import native
from farshore.cluster_token import ClusterToken
from farshore.errors import Cancelled, InvalidRequest
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import AttentionSpec, State
from farshore.kernels.host import HOST
from farshore.kvstore.store.span import check_shape
from farshore.kvstore.store.store import LocalStore
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc

MOST_IMPORT_CALLS = 64
"""Calls that wait for an import. Each holds a thread of the server, which engines need for their beats."""

MOST_IMPORT_S = 120.0
"""How long a call waits for an import at most, whatever its own deadline."""

READ_CHUNK_BYTES = 256 << 10
"""The KV in one message of a pull. Handling a message holds the interpreter's lock, and hot frames wait: with
1 MiB their p99 was twice as long, and bulk KV no faster."""


def _mapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a unary handler: errors become status codes, and an abandoned call does nothing.

    A call is abandoned if its caller gave up while this process was paused or all threads were busy."""

    @wraps(method)
    def handler(self: "AttentionService", request: Any, context: grpc.ServicerContext) -> Any:
        try:
            if not context.is_active():
                raise Cancelled("the caller gave up before the call was begun")
            return method(self, request)
        except Exception as error:
            rpc.abort(context, error)

    return handler


class _FrameBuffers(NamedTuple):
    """Buffers for the queries and the answers of frames of one shape, allocated once for repeated steps.

    Allocating per frame is slow: every PyTorch operation releases the interpreter's lock, and then waits for
    gRPC's threads to return it."""

    q: Tensor
    out: State
    q_bytes: Tensor
    o_bytes: np.ndarray
    lse_bytes: np.ndarray

    @classmethod
    def of(cls, spec: AttentionSpec, rows: int, groups: int, dtype: torch.dtype) -> "_FrameBuffers":
        heads = groups * spec.q_heads_per_group
        q = torch.empty(rows, heads, spec.k_dim, dtype=dtype, device=HOST)
        out = State.identity(rows, heads, spec.v_dim, dtype=dtype, device=HOST)
        o_bytes, lse_bytes = (tensor.view(torch.uint8).numpy() for tensor in out)
        return cls(q, out, q.view(torch.uint8), o_bytes, lse_bytes)


class AttentionService(pb_grpc.AttentionServicer):
    """The gRPC handlers of one shard. Thread-safe."""

    def __init__(
        self,
        worker: WorkerId,
        store: LocalStore,
        *,
        token: ClusterToken | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """``token``: what callers must prove, and what this shard proves to others; None: nothing, which is
        allowed on a loopback address only. ``clock``: monotonic seconds for engines' leases. ``on_failed``:
        called with the reason, at every tick, once the store's device refuses its calls."""
        self.token = token
        self._on_failed = on_failed
        self._worker = worker
        self._store = store
        self._attended = AttendedBytes()
        self.holds = EngineHolds(store, clock=clock)
        self.imports = SpanImports(store, token=token, clock=clock)
        self._importing = rpc.CallLimit(MOST_IMPORT_CALLS, "calls wait for imports: try again later")
        self.listener: FrameListener | None = None
        """Accepts native connections. None until :func:`serve` sets it; then only gRPC is offered."""

    def identity(self) -> ShardIdentity:
        """The worker, its process and store, and its present memory use."""
        return identity_of(self._worker, self._store, self._attended)

    @_mapped
    def Identify(self, request: pb.IdentifyRequest) -> pb.ShardIdentity:
        return codec.identity_to_pb(self.identity())

    @_mapped
    def Beat(self, request: pb.BeatRequest) -> pb.BeatReply:
        named = sum(1 + len(sequence.span_ids) for sequence in request.wanted)
        if named > checks.MOST_WANTED:
            raise InvalidRequest(f"a list of {named} sequences and spans: {checks.MOST_WANTED} at most")
        wanted = codec.wanted_from_pb(request.wanted) if request.complete else None
        must_reconcile = self.holds.beat(codec.caller_from_pb(request.caller), wanted)
        identity = self.identity()
        return codec.beat_to_pb(
            ShardBeat(
                worker=identity.worker,
                incarnation=identity.incarnation,
                budget_bytes=identity.budget_bytes,
                free_bytes=identity.free_bytes,
                attended_bytes=identity.attended_bytes,
                must_reconcile=must_reconcile,
            )
        )

    @_mapped
    def Create(self, request: pb.CreateRequest) -> pb.CreateReply:
        key, layout = codec.key_from_pb(request.key), codec.layout_from_pb(request.layout)
        checks.check_key(key)
        check_shape(key, request.capacity_tokens, layout)
        epoch = Epoch(request.epoch)
        with self.holds.changing(codec.caller_from_pb(request.caller), key.sequence, epoch):
            span = self._store.create(
                key, capacity_tokens=request.capacity_tokens, layout=layout, epoch=epoch
            )
        return pb.CreateReply(span_id=span)

    @_mapped
    def Write(self, requests: Iterator[pb.WriteRequest]) -> pb.WriteReply:
        for request in requests:
            self.holds.renew(request.caller.engine)
            span, sequence = SpanId(request.span_id), SequenceId(request.sequence_id)
            layout = self._store.look_up(span, holder=sequence).layout
            k, v = codec.tokens_from_bytes(request.k, request.v, layout, request.tokens)
            self._store.write(
                span, request.layer, request.first_token, k, v, sequence=sequence, epoch=Epoch(request.epoch)
            )
        return pb.WriteReply()

    @_mapped
    def Seal(self, request: pb.SealRequest) -> pb.SealReply:
        self.holds.renew(request.caller.engine)
        digest = self._store.seal(
            SpanId(request.span_id),
            request.tokens,
            sequence=SequenceId(request.sequence_id),
            epoch=Epoch(request.epoch),
            blocks=checks.check_blocks([codec.block_from_pb(block) for block in request.blocks]),
        )
        return pb.SealReply(digest=digest)

    @_mapped
    def FindPrefix(self, request: pb.FindPrefixRequest) -> pb.PrefixFound:
        self.holds.renew(request.caller.engine)
        hashes = checks.check_hashes(request.hashes)
        return codec.found_to_pb(self._store.find_prefix(hashes, layer_class=request.layer_class))

    @_mapped
    def HoldPrefix(self, request: pb.HoldPrefixRequest) -> pb.PrefixFound:
        blocks = checks.check_blocks([codec.block_from_pb(block) for block in request.blocks])
        with self._changing(request) as (sequence, epoch):
            found = self._store.hold_prefix(
                blocks, layer_class=request.layer_class, sequence=sequence, epoch=epoch
            )
        return codec.found_to_pb(found)

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[pb.KVTokens]:
        try:
            self.holds.renew(request.caller.engine)
            span, sequence = SpanId(request.span_id), SequenceId(request.sequence_id)
            layout = self._store.look_up(span, holder=sequence).layout
            chunk_tokens = max(1, READ_CHUNK_BYTES // layout.layer_token_bytes)
            # At least one read, so that the store checks an empty range too.
            for first in range(request.first_token, request.end_token, chunk_tokens) or (
                request.first_token,
            ):
                last = min(first + chunk_tokens, request.end_token)
                k, v = self._store.read(
                    span, request.layer, first, last, sequence=sequence, dtype=torch.uint8
                )
                yield pb.KVTokens(tokens=last - first, k=codec.to_bytes(k.cpu()), v=codec.to_bytes(v.cpu()))
        except Exception as error:
            rpc.abort(context, error)

    @_mapped
    def Hold(self, request: pb.HoldRequest) -> pb.HoldReply:
        spans = checks.check_spans([SpanId(span) for span in request.span_ids])
        with self._changing(request) as (sequence, epoch):
            self._store.hold(spans, sequence=sequence, epoch=epoch)
            stored = [self._store.look_up(span, holder=sequence) for span in spans]
        return pb.HoldReply(layouts=[codec.layout_to_pb(span.layout) for span in stored])

    @_mapped
    def Drop(self, request: pb.HoldRequest) -> pb.DropReply:
        spans = checks.check_spans([SpanId(span) for span in request.span_ids])
        with self._changing(request) as (sequence, epoch):
            self._store.drop(spans, sequence=sequence, epoch=epoch)
        return pb.DropReply()

    @_mapped
    def DropSequence(self, request: pb.SequenceRequest) -> pb.SequenceReply:
        with self._changing(request) as (sequence, epoch):
            self._store.drop_sequence(sequence, epoch=epoch)
        return pb.SequenceReply()

    @contextmanager
    def _changing(self, request: Any) -> Iterator[tuple[SequenceId, Epoch]]:
        """A context for a request that creates or drops holds; yields its sequence and epoch.

        Raises as :meth:`EngineHolds.changing`, and InvalidRequest for a bad sequence id."""
        sequence = SequenceId(checks.check_id("a sequence id", request.sequence_id))
        epoch = Epoch(request.epoch)
        with self.holds.changing(codec.caller_from_pb(request.caller), sequence, epoch):
            yield sequence, epoch

    @_mapped
    def Fence(self, request: pb.SequenceRequest) -> pb.SequenceReply:
        sequence = SequenceId(checks.check_id("a sequence id", request.sequence_id))
        self._store.fence(sequence, Epoch(request.epoch))
        return pb.SequenceReply()

    def Import(self, request: pb.ImportRequest, context: grpc.ServicerContext) -> pb.ImportReply:
        with self._importing.counted(context):
            try:
                deadline_s = min(context.time_remaining() or MOST_IMPORT_S, MOST_IMPORT_S)
                return codec.imported_to_pb(self.imports.import_span(request, deadline_s=deadline_s))
            except Exception as error:
                rpc.abort(context, error)

    def Export(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[pb.ExportPiece]:
        try:
            yield from exports.messages(self._store, request)
        except Exception as error:
            rpc.abort(context, error)

    def tick(self) -> None:
        """Ends leases and holds whose time is over, and looks after the store's device. Must be called every
        ``TICK_S``."""
        if self._store.runtime is not None:
            try:
                # After an error of a GPU all later calls raise it. Nothing else uses this stream.
                self._store.runtime.main.record().wait()
            except RuntimeError as error:
                self._on_failed(f"the device failed: {str(error).partition(chr(10))[0]}")
        self.holds.tick()
        self.imports.tick()

    @_mapped
    def Announce(self, request: pb.AnnounceRequest) -> pb.Announcement:
        return pb.Announcement(spans=[codec.info_to_pb(info) for info in self._store.announce()])

    def Connect(self, request: pb.ConnectRequest, context: grpc.ServicerContext) -> pb.ConnectReply:
        try:
            return self._connect(request, secured=_secured(context))
        except Exception as error:
            rpc.abort(context, error)

    def _connect(self, request: pb.ConnectRequest, *, secured: bool) -> pb.ConnectReply:
        if self.listener is None or native() is None:
            return pb.ConnectReply()
        if not request.HasField("open"):
            return self.listener.expect(partial(serve_bulk, self._store, self.holds), tcp=not secured)
        session, dtype = self._open_session(request.open)
        if not (session.runs_natively(dtype) or session.is_staged(dtype)):
            return pb.ConnectReply()
        # The threads of a shard on a device wait for it and compute nothing.
        shares_cores = session.runs_natively(dtype) and oversubscribed_with(request.cores, request.threads)
        serve = partial(serve_frames, session, dtype, shares_cores)
        return self.listener.expect(serve, tcp=not secured, shares_cores=shares_cores)

    def Attend(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.State]:
        try:
            yield from self._attend(frames)
        except Exception as error:
            rpc.abort(context, error)

    def _attend(self, frames: Iterator[pb.Frame]) -> Iterator[pb.State]:
        opening = next(frames, None)
        if opening is None or opening.WhichOneof("kind") != "open":
            raise InvalidRequest("the first frame of an Attend stream must be Open")
        session, dtype = self._open_session(opening.open)
        buffers: dict[tuple[AttentionSpec, int], _FrameBuffers] = {}
        groups = 0
        for frame in frames:
            kind = frame.WhichOneof("kind")
            if kind == "begin":
                step = codec.step_from_pb(frame.begin)
                session.begin(step)
                buffers.clear()
                groups = step.group1 - step.group0
                continue
            if kind == "repeat_step":
                session.repeat_step(frame.repeat_step.step)
                continue
            layer = frame.layer
            key = (session.spec(layer.layer), layer.micro_batch)
            if key not in buffers:
                buffers[key] = _FrameBuffers.of(key[0], session.rows(layer.micro_batch), groups, dtype)
            q, out, q_bytes, o_bytes, lse_bytes = buffers[key]
            codec.bytes_into(q_bytes, layer.q)
            session.attend(layer.step, layer.layer, layer.micro_batch, q, out=out)
            yield pb.State(
                step=layer.step,
                layer=layer.layer,
                micro_batch=layer.micro_batch,
                o=o_bytes.tobytes(),
                lse=lse_bytes.tobytes(),
            )

    def _open_session(self, opening: pb.Open) -> tuple[ShardSession, torch.dtype]:
        """A session for the model that ``opening`` describes, and q's dtype. Raises InvalidRequest."""
        model, dtype = codec.model_from_pb(opening), codec.dtype_of(opening.dtype)
        checks.check_model(model, dtype)
        return ShardSession(self._store, model, self._attended), dtype


def _secured(context: grpc.ServicerContext) -> bool:
    """Whether gRPC encrypts or authenticates this call. If so, no KV may leave the host unencrypted."""
    return context.auth_context().get("transport_security_type", [b"insecure"]) != [b"insecure"]
