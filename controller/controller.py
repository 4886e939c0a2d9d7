"""The controller: a Ray actor that places the workers and knows them.

It is never on the token path: engines and gateway go on without it. A crash in the middle of starting leaves
workers that Ray ends with their driver.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from farshore import rpc
from farshore.controller.config import LOAD_DEADLINE_S, PLACE_DEADLINE_S, ClusterConfig
from farshore.controller.exits import how_an_actor_ended
from farshore.controller.listen import bracketed, is_loopback
from farshore.controller.parts import Ended, Parts
from farshore.controller.service import ControllerService
from farshore.errors import StartupError
from farshore.ids import WorkerId
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.models.config import ModelConfig
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.workers.attention import ENVIRONMENT, AttentionWorker
from farshore.workers.dense import DenseConfig, DenseWorker
from farshore.workers.engine.admission import EngineLimits

MAX_CALLS = 64
STOP_DEADLINE_S = 15.0


class Controller:
    """Construct, :meth:`place`, then :meth:`load`; :meth:`loading` may be asked meanwhile; :meth:`ended`
    after that."""

    def __init__(self, config: ClusterConfig, model: ModelConfig) -> None:
        self._config = config
        self._actors: list[Any] = []
        self._dense: dict[WorkerId, Any] = {}
        self._models: dict[WorkerId, Any] = {}  # being loaded
        self._parts = Parts(pool_is_remote=config.placement == "offload")
        # A replaced controller must give out greater epochs than its predecessor did.
        directory = EmbeddedDirectory(first_epoch=time.time_ns() // 1000)
        self._service = ControllerService(config, model, directory)
        self._server, self._address = rpc.serve(
            lambda server: pb_grpc.add_ControllerServicer_to_server(self._service, server),
            service=pb.DESCRIPTOR.services_by_name["Controller"].full_name,
            listen=self._listen(),
            threads=MAX_CALLS,
        )

    def address(self) -> str:
        return self._address

    def place(self) -> dict[WorkerId, str]:
        """Start the attention workers, spread over the nodes that have their memory, and the dense worker,
        which loads its model meanwhile. Returns the attention workers' addresses.

        Raises StartupError where no node takes them: at once in a Ray of our own, whose one node never gets
        more; after PLACE_DEADLINE_S in one that was joined.
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
            self._parts.add(worker, "attention", actor)
        self._start_dense(workers)
        addresses = _results(
            {worker: actor.address.remote() for worker, actor in actors.items()},
            deadline_s=PLACE_DEADLINE_S,
            why=lambda waiting: self._too_little(_free_memory(), workers=waiting),
        )
        self._service.attention.update(addresses)
        return addresses

    def load(self) -> dict[WorkerId, str]:
        """Wait until the dense worker's model is loaded, and let it serve. Returns addresses; raises what
        loading raised."""
        _results(self._models, deadline_s=LOAD_DEADLINE_S)
        shards = dict(self._service.attention)
        serving = {worker: actor.serve.remote(shards) for worker, actor in self._dense.items()}
        addresses = _results(serving, deadline_s=LOAD_DEADLINE_S)
        for worker, address in addresses.items():
            self._parts.add_engine(worker, address)
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
            controller=self._address,
            listen=self._listen(),
            threads=_node_cores(),
            limits=EngineLimits(
                max_decode_stall_ms=config.max_decode_stall_ms,
                speculate_tokens=config.speculate,
                shard_grace_s=config.shard_grace_s,
            ),
        )
        # Two calls at once: load, and loading beside it.
        actor = ray.remote(DenseWorker).options(num_cpus=0, max_concurrency=2).remote(dense_config)
        self._actors.append(actor)
        self._parts.add(worker, "dense", actor)
        self._dense[worker] = actor
        self._models[worker] = actor.load.remote()

    def loading(self) -> tuple[int, int]:
        """(tensors loaded, tensors in all) of the model."""
        if not self._dense:
            return (0, 0)
        try:
            return ray.get(next(iter(self._dense.values())).loading.remote(), timeout=PLACE_DEADLINE_S)
        except ray.exceptions.RayActorError:
            return (0, 0)  # `load` tells.

    def ended(self) -> list[Ended]:
        """Every worker that has ended though it was not asked to. Takes a second at most."""
        return self._parts.ended()

    def stop(self) -> None:
        """End the workers: streams first, then processes. Idempotent."""
        stopping = [actor.stop.remote() for actor in reversed(self._actors)]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_DEADLINE_S) if stopping else None
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._server.stop(0).wait()
        self._service.close()
        self._parts.close()

    def _listen(self) -> str:
        """Any port of the loopback device. In a Ray that was joined: of the node's address, if the gateway,
        too, was opened to the network."""
        if self._config.ray_address is None or is_loopback(self._config.host):
            return "127.0.0.1:0"
        return f"{bracketed(ray.util.get_node_ip_address())}:0"

    def _too_little(self, nodes: Mapping[str, int], *, workers: int | None = None) -> str | None:
        config = self._config
        count = config.attention_workers if workers is None else workers
        return too_little_memory(nodes, workers=count, each_bytes=config.kv_memory_bytes)


def _worker_id(kind: str, index: int) -> WorkerId:
    """The random part is the incarnation: a worker that comes back is another worker."""
    return WorkerId(f"{kind}-{index}-{uuid.uuid4().hex[:6]}")


def _node_cores() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, len(ray.nodes())))


def _total_memory() -> dict[str, int]:
    """Node's address -> bytes that Ray gives to actors there in all."""
    return {node["NodeManagerAddress"]: int(node["Resources"].get("memory", 0)) for node in _nodes()}


def _free_memory() -> dict[str, int]:
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
    """What each worker answers. ``why``: what keeps so many of them from starting, where that is known."""
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
        # Farshore's own errors keep their class and message across the process.
        raise error.cause if error.cause is not None else error from None
    except ray.exceptions.RayActorError as error:
        raise StartupError(
            f"{worker} {how_an_actor_ended(error)}, while it started: is there memory?"
        ) from error


def too_little_memory(nodes: Mapping[str, int], *, workers: int, each_bytes: int) -> str | None:
    """What is missing, by name and number, and the fix; None where ``nodes`` (address -> bytes) take all."""
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
