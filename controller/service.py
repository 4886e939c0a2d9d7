"""The operators' calls, ``farshore.admin.v1``: status, scale, drain, down, events.

Registered by ``controller``; gateways pass their clients' calls on. Never on the token path. Must not know
Ray.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Protocol

import grpc

from farshore import __version__, rpc
from farshore.attention_offload.codec import identity_from_pb
from farshore.cluster_token import ClusterToken
from farshore.controller.config import MOST_DRAIN_S, ClusterConfig
from farshore.controller.events import Events
from farshore.controller.reconcile import Kind
from farshore.errors import FarshoreError, InvalidRequest
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory, WorkerRecord
from farshore.models.config.model import ModelConfig
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc as admin_grpc
from farshore.proto import attention_pb2 as attention_pb
from farshore.proto import attention_pb2_grpc as attention_grpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

PROBE_DEADLINE_S = 2.0
"""For all workers, which are asked at once. A worker that does not answer in time is shown as unreachable."""
STATUS_AGE_S = 0.5
"""An answer is given to every caller that asks within this time after it was complete, or while it is made:
asking all workers costs each of them."""

EVENTS_POLL_S = 1.0
"""How often a stream of events looks whether its reader is gone."""

MOST_FOLLOWERS = 16
"""Streams of events that are open at once. Each holds a thread of the server, which serves the workers' calls
to the directory, too."""

MOST_ASKING = 32
"""Calls for the state at once. They wait together while a worker does not answer."""


class Operations(Protocol):
    """The effects of the calls on the cluster. Thread-safe."""

    events: Events

    def scale(self, changes: Mapping[Kind, int]) -> Mapping[Kind, int]:
        """Changes the numbers of workers. Returns those in force. Raises InvalidRequest."""

    def drain(self, worker: str, timeout_s: float | None) -> WorkerId:
        """Marks a worker, given by its id or its slot, to be drained; ``timeout_s``: for how long at most.
        Returns its id. Raises NotFound if it does not run."""

    def begin_down(self) -> None:
        """Begins to end the cluster, and returns. Idempotent."""


class AdminService(admin_grpc.AdminServiceServicer):
    """Asks the workers that ``directory`` lists. Thread-safe."""

    def __init__(
        self,
        config: ClusterConfig,
        model: ModelConfig,
        directory: Directory,
        operations: Operations,
        *,
        token: ClusterToken | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._model = model
        self._directory = directory
        self._operations = operations
        self._clock = clock
        self._channels = rpc.Channels(token)
        self._lock = threading.Lock()
        self._followers = rpc.CallLimit(
            MOST_FOLLOWERS, "calls follow the events already: end one, or ask without follow"
        )
        self._asking = rpc.CallLimit(MOST_ASKING, "calls ask for the state already: try again in a second")
        self._status: Future[tuple[admin.ClusterStatusResponse, float]] | None = None
        """The newest answer and the time of its completion."""

    def Scale(self, request: admin.ScaleRequest, context: grpc.ServicerContext) -> admin.ScaleResponse:
        """Returns when the new numbers are stored; workers start and retire meanwhile."""
        changes: dict[Kind, int] = {}
        if request.HasField("dense_workers"):
            changes["dense"] = request.dense_workers
        if request.HasField("attention_workers"):
            changes["attention"] = request.attention_workers
        try:
            counts = self._operations.scale(changes)
        except FarshoreError as error:
            rpc.abort(context, error)
        return admin.ScaleResponse(dense_workers=counts["dense"], attention_workers=counts["attention"])

    def Drain(self, request: admin.DrainRequest, context: grpc.ServicerContext) -> admin.DrainResponse:
        """Returns when the mark is stored."""
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        try:
            if timeout_s is not None and not 0 <= timeout_s <= MOST_DRAIN_S:
                raise InvalidRequest(f"timeout_s {timeout_s:g}: use 0 to {MOST_DRAIN_S:g} seconds")
            worker = self._operations.drain(request.worker_id, timeout_s)
        except FarshoreError as error:
            rpc.abort(context, error)
        return admin.DrainResponse(worker_id=worker)

    def Down(self, request: admin.DownRequest, context: grpc.ServicerContext) -> admin.DownResponse:
        try:
            self._operations.begin_down()
        except FarshoreError as error:
            rpc.abort(context, error)
        return admin.DownResponse()

    def WatchEvents(
        self, request: admin.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[admin.ClusterEvent]:
        """With ``follow`` it goes on until its reader is gone; one above MOST_FOLLOWERS is refused."""
        if not request.follow:
            yield from self._events_since(request.since)
            return
        with self._followers.counted(context):
            yield from self._follow(request.since, context)

    def _follow(self, seen: int, context: grpc.ServicerContext) -> Iterator[admin.ClusterEvent]:
        while context.is_active():
            for event in self._events_since(seen, timeout_s=EVENTS_POLL_S):
                seen = event.number
                yield event

    def _events_since(self, seen: int, *, timeout_s: float = 0.0) -> Iterator[admin.ClusterEvent]:
        for event in self._operations.events.since(seen, timeout_s=timeout_s):
            yield admin.ClusterEvent(**event._asdict())

    def ClusterStatus(
        self, request: admin.ClusterStatusRequest, context: grpc.ServicerContext
    ) -> admin.ClusterStatusResponse:
        """Asks every worker, and answers from the workers' replies. Callers share an answer: see
        STATUS_AGE_S."""
        with self._asking.counted(context):
            return self._shared_status(context)

    def _shared_status(self, context: grpc.ServicerContext) -> admin.ClusterStatusResponse:
        with self._lock:
            makes = self._status is None or self._is_old(self._status)
            if makes:
                self._status = Future()
            status = self._status
        assert status is not None
        if makes:
            try:
                status.set_result((self._ask_workers(), self._clock()))
            except BaseException as error:
                status.set_exception(error)
        try:
            return status.result()[0]
        except FarshoreError as error:
            rpc.abort(context, error)

    def _is_old(self, status: "Future[tuple[admin.ClusterStatusResponse, float]]") -> bool:
        if not status.done():
            return False
        return status.exception() is not None or self._clock() - status.result()[1] >= STATUS_AGE_S

    def _ask_workers(self) -> admin.ClusterStatusResponse:
        listing = self._directory.listing()
        records = [record for record in listing.workers if record.address]
        dense, attention = (
            {record.worker: record.address for record in records if record.kind == kind}
            for kind in ("dense", "attention")
        )
        dense_calls = {worker: self._ask_dense(address) for worker, address in dense.items()}
        attention_calls = {worker: self._ask_attention(address) for worker, address in attention.items()}
        workers: dict[WorkerId, admin.WorkerStatus] = {}
        sequences: list[admin.SequenceStatus] = []
        for worker, call in dense_calls.items():
            workers[worker], owned = _dense(worker, dense[worker], call)
            sequences += owned
        for worker, call in attention_calls.items():
            workers[worker] = _attention(worker, attention[worker], call)
        # Only one answer is made at a time.
        self._channels.keep({record.address for record in records})
        for record in listing.workers:
            status = workers.get(record.worker)
            if record.state == "failed" and (
                status is None or status.state == admin.WORKER_STATE_UNREACHABLE
            ):
                workers[record.worker] = _failed(record)
            if record.worker in workers:
                workers[record.worker].device = record.device
                workers[record.worker].node, workers[record.worker].zone = record.node, record.zone
        draining = listing.draining.union(r.worker for r in records if r.state == "draining")
        for worker in draining & workers.keys():
            if workers[worker].state == admin.WORKER_STATE_READY:
                workers[worker].state = admin.WORKER_STATE_DRAINING
        return self._reply(list(workers.values()), sequences)

    def close(self) -> None:
        self._channels.keep(())

    def _reply(
        self, workers: list[admin.WorkerStatus], sequences: list[admin.SequenceStatus]
    ) -> admin.ClusterStatusResponse:
        config = self._config
        local = config.placement == "local"
        pool_kind = admin.WORKER_KIND_DENSE if local else admin.WORKER_KIND_ATTENTION
        pool = [w for w in workers if w.kind == pool_kind and w.state == admin.WORKER_STATE_READY]
        return admin.ClusterStatusResponse(
            model=config.spec.name,
            dtype=config.dtype,
            max_positions=self._model.max_positions,
            placement=config.placement,
            shard_by=config.shard_by,
            workers=workers,
            sequences=sequences,
            pool_budget_bytes=sum(w.budget_bytes for w in pool),
            pool_free_bytes=sum(w.free_bytes for w in pool),
            version=__version__,
            kv_format=config.stored_format,
            max_decode_stall_ms=config.max_decode_stall_ms,
            speculate_tokens=config.speculate,
        )

    def _ask_dense(self, address: str) -> grpc.Future:
        stub = pb_grpc.EngineStub(self._channels[address])
        return stub.Status.future(pb.EngineStatusRequest(), timeout=PROBE_DEADLINE_S)

    def _ask_attention(self, address: str) -> grpc.Future:
        stub = attention_grpc.AttentionStub(self._channels[address])
        return stub.Identify.future(attention_pb.IdentifyRequest(), timeout=PROBE_DEADLINE_S)


def _dense(
    worker: WorkerId, address: str, call: grpc.Future
) -> tuple[admin.WorkerStatus, list[admin.SequenceStatus]]:
    try:
        answer = call.result()
    except grpc.RpcError:
        return _unreachable(worker, admin.WORKER_KIND_DENSE, address), []
    answer.worker.address = address
    return answer.worker, list(answer.sequences)


def _attention(worker: WorkerId, address: str, call: grpc.Future) -> admin.WorkerStatus:
    try:
        identity = identity_from_pb(call.result())
    except grpc.RpcError:
        return _unreachable(worker, admin.WORKER_KIND_ATTENTION, address)
    return admin.WorkerStatus(
        worker_id=worker,
        kind=admin.WORKER_KIND_ATTENTION,
        address=address,
        host=identity.host,
        process_id=identity.process_id,
        state=admin.WORKER_STATE_READY,
        budget_bytes=identity.budget_bytes,
        free_bytes=identity.free_bytes,
        attended_bytes=identity.attended_bytes,
        cached_bytes=identity.cached_bytes,
    )


def _failed(record: WorkerRecord) -> admin.WorkerStatus:
    """One that could not load has no address to be asked at; one that can't go on need not answer."""
    dense = record.kind == "dense"
    return admin.WorkerStatus(
        worker_id=record.worker,
        kind=admin.WORKER_KIND_DENSE if dense else admin.WORKER_KIND_ATTENTION,
        address=record.address,
        host=record.host,
        process_id=record.process_id,
        state=admin.WORKER_STATE_FAILED,
        failure=record.failure,
    )


def _unreachable(worker: WorkerId, kind: admin.WorkerKind, address: str) -> admin.WorkerStatus:
    state = admin.WORKER_STATE_UNREACHABLE
    return admin.WorkerStatus(worker_id=worker, kind=kind, address=address, state=state)
