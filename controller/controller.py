"""The controller: a Ray actor that places the workers and knows them.

It is never on the token path: engines and gateway go on without it. A crash in the middle of starting leaves
workers that Ray ends with their driver.
"""

import time
import uuid
from typing import Any

import ray

from farshore import rpc
from farshore.controller.config import ClusterConfig
from farshore.controller.service import ControllerService
from farshore.errors import StartupError
from farshore.ids import WorkerId
from farshore.kvstore.directory import EmbeddedDirectory
from farshore.models.config import ModelConfig
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.workers.admission import EngineLimits
from farshore.workers.attention import ENVIRONMENT, AttentionWorker
from farshore.workers.dense import DenseConfig, DenseWorker

MAX_CALLS = 64
PLACE_DEADLINE_S = 120.0
"""A worker process imports torch and opens a port in seconds; longer means that no node can hold it."""

LOAD_DEADLINE_S = 1800.0
STOP_DEADLINE_S = 15.0


class Controller:
    """Construct, :meth:`place`, then :meth:`load`; :meth:`loading` may be asked meanwhile."""

    def __init__(self, config: ClusterConfig, model: ModelConfig) -> None:
        self._config = config
        self._actors: list[Any] = []
        self._dense: dict[WorkerId, Any] = {}
        self._models: dict[WorkerId, Any] = {}  # being loaded
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

        Raises StartupError where no node takes them.
        """
        config = self._config
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
        self._start_dense(workers)
        addresses = _results(
            {worker: actor.address.remote() for worker, actor in actors.items()},
            what="the attention workers",
            fix=f"a node with {config.kv_memory_bytes >> 20} MiB of free memory for each: lower --kv-memory",
            deadline_s=PLACE_DEADLINE_S,
        )
        self._service.attention.update(addresses)
        return addresses

    def load(self) -> dict[WorkerId, str]:
        """Wait until the dense worker's model is loaded, and let it serve. Returns addresses; raises what
        loading raised."""
        need = {
            "what": "the dense worker",
            "fix": "enough memory for the model",
            "deadline_s": LOAD_DEADLINE_S,
        }
        _results(self._models, **need)
        shards = dict(self._service.attention)
        serving = {worker: actor.serve.remote(shards) for worker, actor in self._dense.items()}
        addresses = _results(serving, **need)
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
                max_decode_stall_ms=config.max_decode_stall_ms, speculate_tokens=config.speculate
            ),
        )
        # Two calls at once: load, and loading beside it.
        actor = ray.remote(DenseWorker).options(num_cpus=0, max_concurrency=2).remote(dense_config)
        self._actors.append(actor)
        self._dense[worker] = actor
        self._models[worker] = actor.load.remote()

    def loading(self) -> tuple[int, int]:
        """(tensors loaded, tensors in all) of the model."""
        if not self._dense:
            return (0, 0)
        return ray.get(next(iter(self._dense.values())).loading.remote(), timeout=PLACE_DEADLINE_S)

    def stop(self) -> None:
        """End the workers: streams first, then processes. Idempotent."""
        stopping = [actor.stop.remote() for actor in reversed(self._actors)]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_DEADLINE_S) if stopping else None
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._server.stop(0).wait()
        self._service.close()

    def _listen(self) -> str:
        """Any port of the loopback device, unless the gateway itself was opened to the network."""
        loopback = self._config.host in ("127.0.0.1", "localhost", "::1")
        return f"{'127.0.0.1' if loopback else ray.util.get_node_ip_address()}:0"


def _worker_id(kind: str, index: int) -> WorkerId:
    """The random part is the incarnation: a worker that comes back is another worker."""
    return WorkerId(f"{kind}-{index}-{uuid.uuid4().hex[:6]}")


def _node_cores() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, len(ray.nodes())))


def _results(pending: dict[WorkerId, Any], *, what: str, fix: str, deadline_s: float) -> dict[WorkerId, str]:
    try:
        answers = ray.get(list(pending.values()), timeout=deadline_s)
    except ray.exceptions.GetTimeoutError as error:
        raise StartupError(f"{what} did not start within {deadline_s:.0f} s; they need {fix}") from error
    except ray.exceptions.RayTaskError as error:
        # Farshore's own errors keep their class and message across the process.
        raise error.cause if error.cause is not None else error from None
    except ray.exceptions.RayActorError as error:
        raise StartupError(f"{what} ended while starting; they need {fix}: {error}") from error
    return dict(zip(pending, answers, strict=True))
