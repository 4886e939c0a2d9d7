"""Which workers have ended, and how: asked by the driver while a cluster runs.

Used by the controller, in its process. Ray tells which worker's process is gone; an engine's health tells
that it has ended inside a process that lives. A worker that is merely silent, because it is frozen or far
away, has not ended: status shows it as unreachable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.controller.exits import how_an_actor_ended
from farshore.ids import WorkerId
from farshore.proto import cluster_pb2 as pb

HEALTH_DEADLINE_S = 1.0
ENGINE = pb.DESCRIPTOR.services_by_name["Engine"].full_name

Kind = Literal["dense", "attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    worker: WorkerId
    kind: Kind
    how: str
    """Completes "<worker> …"."""
    fatal: bool
    """The cluster can serve nothing without it."""


class Parts:
    """One thread at a time calls it."""

    def __init__(self, *, pool_is_remote: bool) -> None:
        """``pool_is_remote``: KV lies on the attention workers, so that one of them must live."""
        self._pool_is_remote = pool_is_remote
        self._kinds: dict[WorkerId, Kind] = {}
        self._actors: dict[WorkerId, Any] = {}
        self._ready: dict[WorkerId, Any] = {}  # a call that each answers as long as it lives
        self._engines: dict[WorkerId, grpc.Channel] = {}
        self._how: dict[WorkerId, str] = {}

    def add(self, worker: WorkerId, kind: Kind, actor: Any) -> None:
        self._kinds[worker] = kind
        self._actors[worker] = actor

    def add_engine(self, worker: WorkerId, address: str) -> None:
        """Ask this dense worker's engine for its health, too."""
        self._kinds[worker] = "dense"
        self._engines[worker] = grpc.insecure_channel(address, options=rpc.OPTIONS)

    def ended(self) -> list[Ended]:
        """Every worker that has ended so far; takes HEALTH_DEADLINE_S at most."""
        for worker, how in (self._ask_ray() | self._ask_engines()).items():
            self._how.setdefault(worker, how)
        return judged(self._how, self._kinds, pool_is_remote=self._pool_is_remote)

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
                ended[worker] = how_an_actor_ended(error)
        return ended

    def _ask_engines(self) -> dict[WorkerId, str]:
        asked = {
            worker: health_pb2_grpc.HealthStub(channel).Check.future(
                health_pb2.HealthCheckRequest(service=ENGINE), timeout=HEALTH_DEADLINE_S
            )
            for worker, channel in self._engines.items()
            if worker not in self._how
        }
        return {
            worker: "lives, but its engine has ended: its health is NOT_SERVING"
            for worker, call in asked.items()
            if _is_not_serving(call)
        }


def judged(
    how: Mapping[WorkerId, str], kinds: Mapping[WorkerId, Kind], *, pool_is_remote: bool
) -> list[Ended]:
    """The workers in ``how``; fatal is the loss of a dense one, and of the last that holds KV."""
    attention = {worker for worker, kind in kinds.items() if kind == "attention"}
    pool_is_gone = pool_is_remote and attention <= how.keys()
    return [
        Ended(worker=worker, kind=kinds[worker], how=text, fatal=kinds[worker] == "dense" or pool_is_gone)
        for worker, text in how.items()
    ]


def _is_not_serving(call: grpc.Future) -> bool:
    try:
        return call.result().status == health_pb2.HealthCheckResponse.NOT_SERVING
    except grpc.RpcError:
        return False  # Silent, which is not ended; or gone, and Ray tells that.
