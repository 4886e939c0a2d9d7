"""Finds out which workers have ended, and how.

Called by ``controller``, on behalf of the driver, while a cluster runs. Ray reports the end of a worker's
process; an engine's health service reports that the engine has ended while its process is alive. A worker
that does not answer, because it is frozen or unreachable, has not ended: status shows it as unreachable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.controller.exits import actor_end_in_words
from farshore.ids import WorkerId
from farshore.proto import cluster_pb2 as pb

HEALTH_DEADLINE_S = 1.0
ENGINE = pb.DESCRIPTOR.services_by_name["Engine"].full_name

Kind = Literal["dense", "attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedWorker:
    """A worker that ended without being told to."""

    worker: WorkerId
    kind: Kind
    how: str
    """How it ended; completes "<worker> …"."""
    fatal: bool
    """Whether the cluster can serve nothing without it."""


class Liveness:
    """Watches the workers that were added. Not thread-safe."""

    def __init__(self, *, pool_is_remote: bool) -> None:
        """``pool_is_remote``: KV is stored by the attention workers, so that one of them must be alive."""
        self._pool_is_remote = pool_is_remote
        self._kinds: dict[WorkerId, Kind] = {}
        self._actors: dict[WorkerId, Any] = {}
        self._ready: dict[WorkerId, Any] = {}  # pending __ray_ready__ calls, which fail when the actor dies
        self._engines: dict[WorkerId, grpc.Channel] = {}
        self._how: dict[WorkerId, str] = {}

    def add(self, worker: WorkerId, kind: Kind, actor: Any) -> None:
        """Watches the process of a worker's Ray actor."""
        self._kinds[worker] = kind
        self._actors[worker] = actor

    def add_engine(self, worker: WorkerId, address: str) -> None:
        """Also asks the health service of this dense worker's engine."""
        self._kinds[worker] = "dense"
        self._engines[worker] = grpc.insecure_channel(address, options=rpc.OPTIONS)

    def ended(self) -> list[EndedWorker]:
        """All workers that have ended so far. Blocks for at most HEALTH_DEADLINE_S."""
        for worker, how in (self._ask_ray() | self._ask_engines()).items():
            self._how.setdefault(worker, how)
        return ended_workers(self._how, self._kinds, pool_is_remote=self._pool_is_remote)

    def close(self) -> None:
        for channel in self._engines.values():
            channel.close()

    def _ask_ray(self) -> dict[WorkerId, str]:
        for worker in self._actors.keys() - self._how.keys() - self._ready.keys():
            self._ready[worker] = self._actors[worker].__ray_ready__.remote()
        answered, _ = (
            ray.wait(list(self._ready.values()), num_returns=len(self._ready), timeout=0)
            if self._ready
            else ([], [])
        )
        ended = {}
        for worker in [worker for worker, call in self._ready.items() if call in answered]:
            try:
                ray.get(self._ready.pop(worker))
            except ray.exceptions.RayActorError as error:
                ended[worker] = actor_end_in_words(error)
        return ended

    def _ask_engines(self) -> dict[WorkerId, str]:
        calls = {
            worker: health_pb2_grpc.HealthStub(channel).Check.future(
                health_pb2.HealthCheckRequest(service=ENGINE), timeout=HEALTH_DEADLINE_S
            )
            for worker, channel in self._engines.items()
            if worker not in self._how
        }
        return {
            worker: "lives, but its engine has ended: its health is NOT_SERVING"
            for worker, call in calls.items()
            if _is_not_serving(call)
        }


def ended_workers(
    how: Mapping[WorkerId, str], kinds: Mapping[WorkerId, Kind], *, pool_is_remote: bool
) -> list[EndedWorker]:
    """The workers in ``how``. The end of a dense worker is fatal; if ``pool_is_remote``, so is the end of the
    last attention worker."""
    attention = {worker for worker, kind in kinds.items() if kind == "attention"}
    pool_is_gone = pool_is_remote and attention <= how.keys()
    return [
        EndedWorker(
            worker=worker, kind=kinds[worker], how=text, fatal=kinds[worker] == "dense" or pool_is_gone
        )
        for worker, text in how.items()
    ]


def _is_not_serving(call: grpc.Future) -> bool:
    try:
        return call.result().status == health_pb2.HealthCheckResponse.NOT_SERVING
    except grpc.RpcError:
        return False  # It did not answer, which is no end; if its process has ended, Ray reports it.
