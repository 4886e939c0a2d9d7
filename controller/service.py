"""The controller's gRPC service: the status of the cluster.

Called by the gateway, never on the token path. It keeps no state: each call asks the workers.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping

import grpc

from farshore import __version__, rpc
from farshore.attention_offload.codec import identity_from_pb, info_from_pb
from farshore.controller.config import ClusterConfig
from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.base import SpanInfo
from farshore.kvstore.directory.base import Directory
from farshore.models.config.model import ModelConfig
from farshore.proto import attention_pb2 as attention_pb
from farshore.proto import attention_pb2_grpc as attention_grpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto import inference_pb2 as api

PROBE_DEADLINE_S = 2.0
"""For all workers, which are asked at once. A worker that does not answer in time is shown as unreachable."""


class ControllerService(pb_grpc.ControllerServicer):
    """Asks the workers that ``directory`` lists. Thread-safe."""

    def __init__(self, config: ClusterConfig, model: ModelConfig, directory: Directory) -> None:
        self._config = config
        self._model = model
        self._directory = directory
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> api.ClusterStatusReply:
        """Asks every worker, and answers from the workers' replies."""
        workers: list[api.WorkerStatus] = []
        sequences: dict[SequenceId, api.SequenceStatus] = {}
        records = [record for record in self._directory.listing().workers if record.address]
        dense, attention = (
            {record.worker: record.address for record in records if record.kind == kind}
            for kind in ("dense", "attention")
        )
        dense_calls = {worker: self._ask_dense(address) for worker, address in dense.items()}
        attention_calls = {worker: self._ask_attention(address) for worker, address in attention.items()}
        for worker, call in dense_calls.items():
            status, owned = _dense(worker, dense[worker], call)
            workers.append(status)
            sequences |= {SequenceId(s.sequence_id): s for s in owned}
        spans: dict[SequenceId, dict[WorkerId, list[SpanInfo]]] = defaultdict(dict)
        for worker, calls in attention_calls.items():
            status, infos = _attention(worker, attention[worker], *calls)
            workers.append(status)
            for info in infos:
                spans[info.key.sequence].setdefault(worker, []).append(info)
        for sequence, by_worker in spans.items():
            if sequence in sequences:
                _add_spans(sequences[sequence], by_worker)
        return self._reply(workers, list(sequences.values()))

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _reply(
        self, workers: list[api.WorkerStatus], sequences: list[api.SequenceStatus]
    ) -> api.ClusterStatusReply:
        config = self._config
        pool_kind = "dense" if config.placement == "local" else "attention"
        pool = [w for w in workers if w.kind == pool_kind and w.state == "ready"]
        return api.ClusterStatusReply(
            model=self._model.name,
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
        stub = pb_grpc.EngineStub(self._channel(address))
        return stub.Status.future(pb.EngineStatusRequest(), timeout=PROBE_DEADLINE_S)

    def _ask_attention(self, address: str) -> tuple[grpc.Future, grpc.Future]:
        stub = attention_grpc.AttentionStub(self._channel(address))
        return (
            stub.Identify.future(attention_pb.IdentifyRequest(), timeout=PROBE_DEADLINE_S),
            stub.Announce.future(attention_pb.AnnounceRequest(), timeout=PROBE_DEADLINE_S),
        )

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if address not in self._channels:
                self._channels[address] = grpc.insecure_channel(address, options=rpc.OPTIONS)
            return self._channels[address]


def _dense(
    worker: WorkerId, address: str, call: grpc.Future
) -> tuple[api.WorkerStatus, list[api.SequenceStatus]]:
    try:
        answer = call.result()
    except grpc.RpcError:
        return _unreachable(worker, "dense", address), []
    answer.worker.address = address
    return answer.worker, list(answer.sequences)


def _attention(
    worker: WorkerId, address: str, identify: grpc.Future, announce: grpc.Future
) -> tuple[api.WorkerStatus, list[SpanInfo]]:
    try:
        identity, spans = identity_from_pb(identify.result()), announce.result().spans
    except grpc.RpcError:
        return _unreachable(worker, "attention", address), []
    status = api.WorkerStatus(
        worker_id=worker,
        kind="attention",
        address=address,
        host=identity.host,
        process_id=identity.process_id,
        state="ready",
        budget_bytes=identity.budget_bytes,
        free_bytes=identity.free_bytes,
        attended_bytes=identity.attended_bytes,
    )
    return status, [info_from_pb(span) for span in spans]


def _add_spans(status: api.SequenceStatus, by_worker: Mapping[WorkerId, list[SpanInfo]]) -> None:
    found = [
        api.SpanStatus(
            worker_id=worker,
            first=info.key.first,
            last=info.key.first + info.sealed_tokens,
            group0=info.key.group0,
            group1=info.key.group1,
            bytes=info.bytes,
        )
        for worker, infos in by_worker.items()
        for info in infos
        if info.epoch == status.epoch and info.sealed_tokens
    ]
    status.spans.extend(sorted(found, key=lambda span: (span.first, span.group0)))


def _unreachable(worker: WorkerId, kind: str, address: str) -> api.WorkerStatus:
    return api.WorkerStatus(worker_id=worker, kind=kind, address=address, state="unreachable")
