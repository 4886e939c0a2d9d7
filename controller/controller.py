"""The controller: places the workers as Ray actors and watches them.

Runs inside ``cluster.ControllerActor``; the driver calls it through Ray. It is never on the token path:
engines and gateway go on without it. If it crashes while it starts workers, Ray ends these with the driver.
"""

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from farshore import rpc
from farshore.controller.config import LOAD_DEADLINE_S, PLACE_DEADLINE_S, ClusterConfig
from farshore.controller.exits import actor_end_in_words
from farshore.controller.listen import bracketed, is_loopback
from farshore.controller.liveness import EndedWorker, Liveness
from farshore.controller.service import ControllerService
from farshore.errors import StartupError
from farshore.ids import WorkerId
from farshore.models.config.model import ModelConfig
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.workers.attention import ENVIRONMENT, AttentionWorker
from farshore.workers.dense import DenseConfig, DenseWorker
from farshore.workers.engine.admission import EngineLimits

MAX_CALLS = 64
STOP_DEADLINE_S = 15.0


class Controller:
    """Call :meth:`place`, then :meth:`load`, then :meth:`ended` from time to time. :meth:`loading` and
    :meth:`stop` may be called from other threads meanwhile."""

    def __init__(self, config: ClusterConfig, model: ModelConfig) -> None:
        self._config = config
        self._actors: list[Any] = []
        self._dense: dict[WorkerId, Any] = {}
        self._models: dict[WorkerId, Any] = {}  # pending calls of DenseWorker.load
        self._liveness = Liveness(pool_is_remote=config.placement == "offload")
        self._service = ControllerService(config, model)
        self._server, self._address = rpc.serve(
            lambda server: pb_grpc.add_ControllerServicer_to_server(self._service, server),
            service=pb.DESCRIPTOR.services_by_name["Controller"].full_name,
            listen=self._listen(),
            threads=MAX_CALLS,
        )

    def address(self) -> str:
        """The HOST:PORT at which the controller's gRPC service answers."""
        return self._address

    def place(self) -> dict[WorkerId, str]:
        """Starts the attention workers, spread over nodes with enough memory, and the dense worker, which
        starts to load its model. Blocks until the attention workers answer, and returns their addresses. Not
        idempotent; after a crash in the middle Ray ends the workers with the driver.

        Raises StartupError if the workers do not fit: at once in a private Ray, which has one node, after
        PLACE_DEADLINE_S in a joined Ray, where nodes may still come.
        """
        config = self._config
        if config.ray_address is None and (missing := self._too_little(_total_memory())):
            raise StartupError(missing)
        workers = [_worker_id("attention", i) for i in range(config.attention_workers)]
        actors = {
            worker: ray.remote(AttentionWorker)
            .options(
                num_cpus=0,
                memory=config.kv_memory_bytes,
                scheduling_strategy="SPREAD",
                runtime_env={"env_vars": ENVIRONMENT},
            )
            .remote(
                worker=worker,
                kv_memory_bytes=config.kv_memory_bytes,
                listen=self._listen(),
                threads=max(1, _node_cores() // config.attention_workers),
            )
            for worker in workers
        }
        self._actors += actors.values()
        for worker, actor in actors.items():
            self._liveness.add(worker, "attention", actor)
        self._start_dense(workers)
        addresses = _results(
            {worker: actor.address.remote() for worker, actor in actors.items()},
            deadline_s=PLACE_DEADLINE_S,
            why=lambda waiting: self._too_little(_free_memory(), workers=waiting),
        )
        self._service.attention.update(addresses)
        return addresses

    def load(self) -> dict[WorkerId, str]:
        """Blocks until the dense worker has loaded its model, and makes it serve. Returns the dense workers'
        addresses. Raises the error that loading raised, or StartupError after LOAD_DEADLINE_S."""
        _results(self._models, deadline_s=LOAD_DEADLINE_S)
        shards = dict(self._service.attention)
        serving = {worker: actor.serve.remote(shards) for worker, actor in self._dense.items()}
        addresses = _results(serving, deadline_s=LOAD_DEADLINE_S)
        for worker, address in addresses.items():
            self._liveness.add_engine(worker, address)
        self._service.dense.update(addresses)
        return addresses

    def _start_dense(self, shards: list[WorkerId]) -> None:
        config = self._config
        worker = _worker_id("dense", 0)
        dense_config = DenseConfig(
            worker=worker,
            model=config.model,
            dtype=config.dtype,
            kv_format=config.stored_format,
            kv_memory_bytes=config.kv_memory_bytes,
            targets=tuple(shards) if config.placement == "offload" else (worker,),
            shard_by=config.shard_by if config.placement == "offload" else "range",
            listen=self._listen(),
            threads=_node_cores(),
            limits=EngineLimits(
                max_decode_stall_ms=config.max_decode_stall_ms,
                speculate_tokens=config.speculate,
                shard_grace_s=config.shard_grace_s,
            ),
        )
        # Two calls at once: load and loading.
        actor = ray.remote(DenseWorker).options(num_cpus=0, max_concurrency=2).remote(dense_config)
        self._actors.append(actor)
        self._liveness.add(worker, "dense", actor)
        self._dense[worker] = actor
        self._models[worker] = actor.load.remote()

    def loading(self) -> tuple[int, int]:
        """(tensors loaded, tensors in all) of the model; (0, 0) if unknown. Read-only."""
        if not self._dense:
            return (0, 0)
        try:
            return ray.get(next(iter(self._dense.values())).loading.remote(), timeout=PLACE_DEADLINE_S)
        except ray.exceptions.RayActorError:
            return (0, 0)  # `load` reports the end of the worker.

    def ended(self) -> list[EndedWorker]:
        """All workers that have ended without being told to. Blocks for a second at most. Idempotent."""
        return self._liveness.ended()

    def stop(self) -> None:
        """Ends the workers, first their streams and then their processes, and this controller's server.
        Idempotent."""
        stopping = [actor.stop.remote() for actor in reversed(self._actors)]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_DEADLINE_S) if stopping else None
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._server.stop(0).wait()
        self._service.close()
        self._liveness.close()

    def _listen(self) -> str:
        """The address for workers to listen on, with any free port: loopback, or the node's address in a
        joined Ray if the gateway listens on the network too."""
        if self._config.ray_address is None or is_loopback(self._config.host):
            return "127.0.0.1:0"
        return f"{bracketed(ray.util.get_node_ip_address())}:0"

    def _too_little(self, nodes: Mapping[str, int], *, workers: int | None = None) -> str | None:
        config = self._config
        count = config.attention_workers if workers is None else workers
        return too_little_memory(nodes, workers=count, each_bytes=config.kv_memory_bytes)


def _worker_id(kind: str, index: int) -> WorkerId:
    """The random suffix is the incarnation, so that a restarted worker gets another id."""
    return WorkerId(f"{kind}-{index}-{uuid.uuid4().hex[:6]}")


def _node_cores() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, len(ray.nodes())))


def _total_memory() -> dict[str, int]:
    """Address of each node -> bytes of memory that Ray gives to actors there in all."""
    return {node["NodeManagerAddress"]: int(node["Resources"].get("memory", 0)) for node in _nodes()}


def _free_memory() -> dict[str, int]:
    """Address of each node -> bytes of memory that Ray has not given to actors yet."""
    free = available_resources_per_node()
    return {
        node["NodeManagerAddress"]: int(free.get(node["NodeID"], {}).get("memory", 0)) for node in _nodes()
    }


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _results(
    pending: dict[WorkerId, Any],
    *,
    deadline_s: float,
    why: Callable[[int], str | None] = lambda _: None,
) -> dict[WorkerId, str]:
    """Each worker's answer. Raises StartupError after ``deadline_s``. ``why``: called with the number of
    workers that did not answer; returns the reason, or None if it is unknown."""
    _, waiting = ray.wait(list(pending.values()), num_returns=len(pending), timeout=deadline_s)
    if waiting:
        names = ", ".join(worker for worker, call in pending.items() if call in waiting)
        cause = why(len(waiting)) or "see the logs of Ray on its nodes"
        raise StartupError(f"not started within {deadline_s:.0f} s: {names}: {cause}")
    return {worker: _result(worker, call) for worker, call in pending.items()}


def _result(worker: WorkerId, call: Any) -> str:
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        # Farshore's errors keep their class and message across processes.
        raise error.cause if error.cause is not None else error from None
    except ray.exceptions.RayActorError as error:
        raise StartupError(
            f"{worker} {actor_end_in_words(error)}, while it started: is there memory?"
        ) from error


def too_little_memory(nodes: Mapping[str, int], *, workers: int, each_bytes: int) -> str | None:
    """A message with the missing memory and the fix, or None if the workers fit. ``nodes``: address ->
    bytes."""
    if sum(memory // each_bytes for memory in nodes.values()) >= workers:
        return None
    have = (
        ", ".join(f"{_mib(memory)} on {node}" for node, memory in sorted(nodes.items())) or "no node at all"
    )
    each = " each" if workers > 1 else ""
    return (
        f"{workers} attention worker{'s' if workers > 1 else ''} with {_mib(each_bytes)} of memory{each} "
        f"({_mib(workers * each_bytes)} in all) do not fit: Ray has {have}; lower --kv-memory or "
        "--attention-workers, or add nodes"
    )


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):,.0f} MiB"
