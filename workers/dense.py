"""The dense worker: a process that runs one engine behind one gRPC service.

The controller starts it as a Ray actor; Ray only starts and ends it. The worker reaches shards over gRPC, and
serves requests without the controller. It must not decide global placement.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from grpc_health.v1 import health, health_pb2

from farshore import rpc
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.codec import dtype_of
from farshore.attention_offload.fanout.latency import Link
from farshore.attention_offload.plan.placement import ShardBy
from farshore.cluster_token import ClusterToken
from farshore.errors import FarshoreError, TransportError
from farshore.ids import WorkerId
from farshore.interpreter import share_interpreter
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import Usage
from farshore.kvstore.directory.base import Directory, Listing, Load, WorkerRecord, WorkerState
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.model_spec import ModelSpec
from farshore.models.config.load import load_spec
from farshore.models.files.source import resolve_tokenizer
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.tokenizer.tokenizer import Tokenizer
from farshore.models.weights.load import load_model
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.text import shortened
from farshore.workers.announcer import Announcer
from farshore.workers.device import CPU, Device
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.views import EngineLoad
from farshore.workers.engine_service import EngineService
from farshore.workers.lease import Lease
from farshore.workers.shard_watch import ShardWatch
from farshore.workers.whereabouts import whereabouts

MAX_CALLS = 512
"""Threads of the gRPC server. Each gateway occupies one; see :func:`farshore.rpc.serve` for the room that is
left for others."""

STOP_GRACE_S = 1.0
MOST_REASON_CHARS = 500

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
    slot: str
    """The name of the worker's place in the cluster."""
    spec: ModelSpec
    """The model, and how to read it."""
    dtype: str
    kv_format: str
    """Format of stored KV: bf16, float32, int8 or int4."""
    kv_memory_bytes: int
    """Size of the engine's arena: it holds the tails, and spans unless ``offload``."""
    offload: bool
    """Whether spans are placed on the attention workers that the directory lists; else in the arena."""
    shard_by: ShardBy
    listen: str
    token: ClusterToken | None
    """The cluster's token; None, on a loopback address only: calls need no proof."""
    threads: int
    limits: EngineLimits
    device: Device = CPU
    """Where the model and the arena are."""


class DenseWorker:
    """One dense worker. Construct it, then call :meth:`run`. It is listed in ``directory`` from construction
    until :meth:`stop`."""

    def __init__(
        self,
        config: DenseConfig,
        directory: Directory,
        *,
        host: str,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """``host``: the address of the worker's node. ``on_failed``: called once, from any thread, if the
        model can't be loaded or the engine fails. The record says why; only a new process can go on."""
        self._config = config
        self._directory = directory
        self._host = host
        self._on_failed = on_failed
        self._loading = ""
        self._address = ""
        self._failure = ""
        self._engine: Engine | None = None
        self._watch: ShardWatch | None = None
        self._announcer: Announcer | None = None
        self._lock = threading.Lock()
        self._ends = False
        """Whether the process is to end: it drains, whatever the directory says."""
        self._drains = False
        torch.set_num_threads(config.threads)
        self._checks = health.HealthServicer()
        self._spec = config.spec.to_json()
        self._lease = Lease(directory, self._record, heard=self._hear)

    def load(self) -> None:
        """Loads the model. Attention workers may start at the same time. Raises ModelError."""
        config = self._config
        source, model_config = load_spec(config.spec, progress=self._progress)
        self._model = load_model(
            source,
            dtype=dtype_of(config.dtype),
            device=config.device.torch,
            config=model_config,
            progress=lambda done, total: self._progress(f"{done} of {total} tensors"),
        )

    def run(self) -> None:
        """Loads and serves. Every error is reported to the directory, and raised."""
        try:
            self.load()
            self.serve()
        except Exception as error:
            known = isinstance(error, FarshoreError)
            self._fail(str(error) if known else f"the worker can't start: {type(error).__name__}: {error}")
            raise

    def serve(self) -> str:
        """Starts the engine, and returns the address that it listens on. Attention workers join it when the
        directory lists them. Raises PortInUse if the configured port is taken."""
        config, model = self._config, self._model
        attention = attention_model(model.config, model.dtype, _FORMATS[config.kv_format])
        arena = Arena(config.kv_memory_bytes, device=model.device)
        self._store = store = LocalStore(worker=config.worker, arena=arena)
        local = InProcessClient(config.worker, store, attention)
        share_interpreter()
        identities = {config.worker: local.identify()}
        engine = Engine(
            model=model,
            attention=attention,
            arena=arena,
            clients={config.worker: local},
            targets=[] if config.offload else [config.worker],
            shard_by=config.shard_by,
            limits=config.limits,
            find_prefix=self._directory.find_prefix if config.offload else None,
            on_failed=lambda: self._fail(engine.failure),
        )
        engine.start()
        if config.offload:
            self._watch = ShardWatch(
                self._directory,
                engine,
                connect=lambda address: RemoteClient(
                    address, attention, model.dtype, engine=config.worker, token=config.token
                ),
                local=config.worker,
                identified=identities.__setitem__,
            )
        else:
            self._announcer = Announcer(self._directory, config.worker, store.names)
            self._announcer.start()
        self._service = service = EngineService(
            worker=config.worker,
            engine=engine,
            store=store,
            shards=identities,
            is_draining=lambda: self._drains,
            grammars=GrammarCompiler(
                self._tokenizer, vocab=model.config.vocab, eos_ids=model.config.eos_token_ids
            ),
        )
        self._server, self._address = rpc.serve(
            lambda server: pb_grpc.add_EngineServicer_to_server(service, server),
            service=_SERVICE,
            listen=config.listen,
            threads=MAX_CALLS,
            token=config.token,
            checks=self._checks,
        )
        self._engine = engine
        return self._address

    def begin_drain(self) -> None:
        """Refuses new requests from now on, and says so in the directory and in its health. Idempotent."""
        with self._lock:
            self._ends = True
            self._set_draining(True)
        self._checks.enter_graceful_shutdown()

    @property
    def is_drained(self) -> bool:
        """Whether no request runs or waits."""
        load = self._engine.load() if self._engine is not None else None
        return load is None or not (load.running or load.waiting)

    def _tokenizer(self) -> Tokenizer:
        spec = self._config.spec
        source = resolve_tokenizer(spec.tokenizer) if spec.tokenizer else load_spec(spec)[0]
        return load_tokenizer(source)

    def stop(self) -> None:
        """Withdraws from the directory, stops the engine and closes its shard clients. Each request that is
        left fails with a TransportError that says what to do."""
        if self._announcer is not None:
            self._announcer.end()
        self._lease.end()
        if self._engine is None:
            return
        if self._watch is not None:
            self._watch.stop()
        why = f"dense worker {self._config.worker} was {'drained' if self._ends else 'stopped'}"
        # Before the server, so that the requests end with this reason.
        self._engine.stop(reason=why)
        self._service.stop()
        self._server.stop(STOP_GRACE_S).wait()

    def load_now(self) -> tuple[EngineLoad, list[Link], Usage] | None:
        """The engine's load, its links to shards, and its own memory; None before it serves."""
        if self._engine is None:
            return None
        return self._engine.load(), self._engine.links(), self._store.usage()

    def _record(self) -> WorkerRecord:
        engine = self._engine
        shards = engine.shards() if engine is not None else {}
        return WorkerRecord(
            worker=self._config.worker,
            kind="dense",
            slot=self._config.slot,
            address=self._address,
            host=self._host,
            process_id=os.getpid(),
            **whereabouts(),
            state=self._state(),
            progress=self._loading,
            shards=sum(answers for worker, answers in shards.items() if worker != self._config.worker),
            failure=self._failure,
            load=self._load(),
            spec=self._spec,
            device=str(self._config.device),
        )

    def _load(self) -> Load | None:
        now = self.load_now()
        if now is None:
            return None
        load, _, usage = now
        return Load(
            running=load.running,
            waiting=load.waiting,
            parked=load.parked,
            free_bytes=usage.available_bytes,
            budget_bytes=usage.budget_bytes,
        )

    def _state(self) -> WorkerState:
        if self._failure:
            return "failed"
        if self._ends:
            return "draining"
        return "loading" if self._engine is None else "serving"

    def _hear(self, listing: Listing) -> None:
        """Follows what the directory says: the controller may drain this worker, and change its mind."""
        with self._lock:
            self._set_draining(self._ends or self._config.worker in listing.draining)

    def _set_draining(self, draining: bool) -> None:
        """The caller holds the lock."""
        if draining == self._drains or self._engine is None:
            return
        self._drains = draining
        refusal = TransportError(f"dense worker {self._config.worker} is draining: send the request again")
        self._engine.refuse(refusal if draining else None)
        reply = health_pb2.HealthCheckResponse
        for name in ("", _SERVICE):
            self._checks.set(name, reply.NOT_SERVING if draining else reply.SERVING)

    def _fail(self, reason: str) -> None:
        """Says that the worker can't go on. Health stays NOT_SERVING, whatever is set later."""
        self._failure = shortened(" ".join(reason.split()), MOST_REASON_CHARS)
        self._checks.enter_graceful_shutdown()
        self._on_failed()

    def _progress(self, words: str) -> None:
        self._loading = words
