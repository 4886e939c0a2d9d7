"""The dense worker: a process that runs one engine behind one gRPC service.

The controller starts it as a Ray actor; Ray only starts and ends it. The worker reaches shards over gRPC, and
serves requests without the controller. It must not decide global placement.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from grpc_health.v1 import health

from farshore import rpc
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.codec import dtype_of
from farshore.attention_offload.plan.placement import ShardBy
from farshore.ids import WorkerId
from farshore.interpreter import share_interpreter
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine_service import EngineService

MAX_CALLS = 512
"""Threads of the gRPC server. Each running or waiting request occupies one."""

STOP_GRACE_S = 1.0

_SERVICE = pb.DESCRIPTOR.services_by_name["Engine"].full_name
_FORMATS = {
    "bf16": KVFormat.BFLOAT16,
    "float32": KVFormat.FLOAT32,
    "int8": KVFormat.INT8,
    "int4": KVFormat.INT4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """Configuration of one dense worker; made by the controller."""

    worker: WorkerId
    model: str
    """Folder or name of the model, as :func:`farshore.models.files.source.resolve` takes it."""
    dtype: str
    kv_format: str
    """Format of stored KV: bf16, float32, int8 or int4."""
    kv_memory_bytes: int
    """Size of the engine's arena: it holds the tails, and spans if ``targets`` names this worker itself."""
    targets: tuple[WorkerId, ...]
    """Workers that new spans are placed on."""
    shard_by: ShardBy
    listen: str
    threads: int
    limits: EngineLimits


class DenseWorker:
    """One dense worker. Construct it, call :meth:`load`, then :meth:`serve`.

    :meth:`loading` may be called from another thread at any time.
    """

    def __init__(self, config: DenseConfig) -> None:
        self._config = config
        self._loading = (0, 0)
        torch.set_num_threads(config.threads)
        self._checks = health.HealthServicer()

    def load(self) -> None:
        """Loads the model. Attention workers may start at the same time. Raises ModelError."""
        config = self._config
        self._source = resolve(config.model)
        self._model = load_model(self._source, dtype=dtype_of(config.dtype), progress=self._progress)

    def serve(self, shards: Mapping[WorkerId, str]) -> str:
        """Connects to the attention workers, starts the engine, and returns the address that it listens on.

        ``shards`` maps worker ids to addresses. Raises TransportError if a shard does not answer, PortInUse
        if the configured port is taken.
        """
        config, model = self._config, self._model
        attention = attention_model(model.config, model.dtype, _FORMATS[config.kv_format])
        arena = Arena(config.kv_memory_bytes)
        store = LocalStore(worker=config.worker, arena=arena)
        self._clients: dict[WorkerId, ShardClient] = {
            config.worker: InProcessClient(config.worker, store, attention),
            **{
                worker: RemoteClient(address, attention, model.dtype, engine=config.worker)
                for worker, address in shards.items()
            },
        }
        share_interpreter()
        identities = {worker: client.identify() for worker, client in self._clients.items()}
        self._engine = Engine(
            model=model,
            attention=attention,
            arena=arena,
            clients=self._clients,
            targets=list(config.targets),
            shard_by=config.shard_by,
            revision=f"{self._source.path} {self._source.path.stat().st_mtime_ns}",
            limits=config.limits,
            on_failed=self._stop_serving,
        )
        self._engine.start()
        service = EngineService(
            worker=config.worker,
            engine=self._engine,
            store=store,
            shards=identities,
        )
        self._server, address = rpc.serve(
            lambda server: pb_grpc.add_EngineServicer_to_server(service, server),
            service=_SERVICE,
            listen=config.listen,
            threads=MAX_CALLS,
            checks=self._checks,
        )
        return address

    def loading(self) -> tuple[int, int]:
        """Progress of :meth:`load`: (tensors loaded, total tensors)."""
        return self._loading

    def stop(self) -> None:
        """Ends every stream, then stops the engine and closes its shard clients."""
        self._server.stop(STOP_GRACE_S).wait()
        self._engine.stop()
        for client in self._clients.values():
            client.close()

    def _stop_serving(self) -> None:
        """Called when the engine fails. Health stays NOT_SERVING from now on, whatever is set later."""
        self._checks.enter_graceful_shutdown()

    def _progress(self, done: int, total: int) -> None:
        self._loading = (done, total)
