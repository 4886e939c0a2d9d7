"""Asks workers directly, from a thread of its own: those that the directory lost, and the engines.

Called by ``observer``. It must not know what follows from the answers.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.errors import FarshoreError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory
from farshore.periodic import PeriodicThread
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

_LOG = logging.getLogger(__name__)

PERIOD_S = 0.5
DEADLINE_S = 1.0

_SILENCE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""The codes of a call that nothing answered. A worker whose call slots are all taken refuses, and lives."""


class WorkerProbes:
    """Implements :class:`~farshore.controller.loop.observer.Probes` over gRPC. Asks from construction until
    :meth:`stop`."""

    def __init__(
        self,
        directory: Directory,
        *,
        token: ClusterToken | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._suspects: Mapping[WorkerId, str] = {}
        self._silent_since_s: dict[WorkerId, float] = {}
        self._engines: Mapping[WorkerId, str] = {}
        self._listed: Mapping[WorkerId, str] = {}
        self._readers: tuple[Collection[WorkerId], Mapping[WorkerId, int] | None] = (), None
        self._alive: set[WorkerId] = set()
        self._channels = rpc.Channels(token)
        self._thread = PeriodicThread(self._run, name="probe", period_s=PERIOD_S, tell=_tell)
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()
        self._channels.keep(())

    def silent_s(self, suspects: Mapping[WorkerId, str]) -> dict[WorkerId, float]:
        self._suspects = dict(suspects)
        now_s = self._clock()
        since_s = dict(self._silent_since_s)
        return {worker: now_s - since_s[worker] if worker in since_s else 0.0 for worker in suspects}

    def alive(self) -> set[WorkerId]:
        return self._alive

    def readers(self, engines: Mapping[WorkerId, str]) -> Mapping[WorkerId, int] | None:
        self._engines = dict(engines)
        asked, readers = self._readers
        return readers if engines.keys() <= set(asked) else None

    def _run(self) -> None:
        try:
            self._ask()
        except Exception:
            # Such as an answer of another version: nothing is known, so nothing may follow.
            self._readers, self._silent_since_s = ((), None), {}
            raise

    def _ask(self) -> None:
        """Asks once, and keeps the answers."""
        suspects = self._suspects
        self._look()
        engines = {**self._engines, **self._listed}
        statuses = {worker: self._status(address) for worker, address in engines.items()}
        checks = {worker: self._check(address) for worker, address in suspects.items() if address}
        reported: set[WorkerId] = set()
        readers: Counter[WorkerId] | None = Counter()
        for worker, call in statuses.items():
            if call.exception() is not None:
                readers = None
                continue
            status = call.result()
            reported |= {WorkerId(shard) for shard, answers in status.shards.items() if answers}
            if readers is not None:
                readers.update({WorkerId(shard): count for shard, count in status.readers.items()})
                readers[worker] += status.worker.running + status.worker.waiting
        self._readers, self._alive = (engines.keys(), readers), reported
        alive = reported | {worker for worker, call in checks.items() if _is_answered(call)}
        now_s = self._clock()
        self._silent_since_s = {
            worker: self._silent_since_s.get(worker, now_s) for worker in suspects if worker not in alive
        }
        self._channels.keep({*engines.values(), *suspects.values()})

    def _look(self) -> None:
        """Reads the engines from the directory. While it does not answer, the last known ones are asked."""
        with contextlib.suppress(FarshoreError):
            self._listed = {
                record.worker: record.address
                for record in self._directory.listing().workers
                if record.kind == "dense" and record.address
            }

    def _status(self, address: str) -> grpc.Future:
        stub = pb_grpc.EngineStub(self._channels[address])
        return stub.Status.future(pb.EngineStatusRequest(), timeout=DEADLINE_S)

    def _check(self, address: str) -> grpc.Future:
        stub = health_pb2_grpc.HealthStub(self._channels[address])
        return stub.Check.future(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)


def _tell(error: Exception) -> None:
    _LOG.error("the workers' answers make no sense; they are asked again", exc_info=error)


def _is_answered(call: grpc.Future) -> bool:
    """Blocks until the call has ended."""
    error = call.exception()
    return error is None or error.code() not in _SILENCE
