"""Probes one engine's health service, to know whether the engine takes requests.

Created by ``known`` for each engine. A killed engine is noticed when its connection breaks, a frozen one
after ``missed_probes``, when requests that it has not confirmed go elsewhere; those that it runs fail after
``lost_s``. Must not know the other engines.
"""

import asyncio
import logging
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore.gateway.engines.engine_client import EngineClient
from farshore.gateway.limits import Limits
from farshore.periodic import repeat
from farshore.proto import cluster_pb2
from farshore.text import shortened

_logger = logging.getLogger(__name__)

_SERVICE = cluster_pb2.DESCRIPTOR.services_by_name["Engine"].full_name


class EngineHealth:
    """``problem``: why the engine takes no requests; None if it does. Use it on the event loop only."""

    def __init__(
        self, client: EngineClient, *, limits: Limits, probing: asyncio.Semaphore, changed: Callable[[], None]
    ) -> None:
        """``probing``: bounds the probes to all engines at once. ``changed`` is called when ``problem``
        appears or disappears."""
        self._client = client
        self._limits = limits
        self._probing = probing
        self._changed = changed
        self._missed = 0
        self._known = False
        self._soon = asyncio.Event()
        self._due_s = 0.0
        self.problem: str | None = f"{client.name} has not answered yet"

    async def watch(self) -> None:
        """Probes every ``probe_s`` until the task is cancelled."""
        await repeat(self._probe_when_due, tell=self._tell)

    async def _probe_when_due(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(self._due_s):
                await self._soon.wait()
        except TimeoutError:
            pass
        self._soon.clear()
        self._due_s = loop.time() + self._limits.probe_s
        await self.probe()

    def _tell(self, error: Exception) -> None:
        _logger.error("%s can't be probed", self._client.name, exc_info=error)

    def broke(self) -> None:
        """The connection broke under a call: the engine gets nothing new until a probe, which is made at
        once, finds it well."""
        self._set(f"{self._client.name} is gone: its connection broke")
        self._soon.set()

    async def probe(self) -> None:
        """Asks once."""
        async with self._probing:
            problem = await self._ask()
        self._known = True
        self._set(problem)

    def _set(self, problem: str | None) -> None:
        changed = (problem is None) != (self.problem is None)
        self.problem = problem
        if changed:
            self._changed()

    async def _ask(self) -> str | None:
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            stub = health_pb2_grpc.HealthStub(self._client.channel)
            reply = await stub.Check(request, timeout=self._limits.probe_s)
        except grpc.aio.AioRpcError as error:
            return self._without_answer(error)
        self._answered()
        if reply.status == health_pb2.HealthCheckResponse.SERVING:
            return None
        return f"{self._client.name} takes nothing new: it drains or has failed, see its log"

    def _without_answer(self, error: grpc.aio.AioRpcError) -> str | None:
        code = error.code()
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._answered()
            return None  # All its call slots are taken: it is alive.
        if code != grpc.StatusCode.DEADLINE_EXCEEDED:
            self._missed = 0
            return f"{self._client.name} is gone ({code.name}: {shortened(error.details() or '')})"
        self._missed += 1
        missed_s = self._missed * self._limits.probe_s
        problem = f"{self._client.name} has not answered for {missed_s:g} s"
        if self._missed < self._limits.missed_probes:
            # One missed probe may mean that this process was paused, so silence alone proves nothing.
            return self.problem if self._known else problem
        if asyncio.get_running_loop().time() - self._client.heard_s >= self._limits.lost_s:
            self._client.lose(f"it answered nothing for {self._limits.lost_s:g} s")
        else:
            self._client.doubt(f"it answered nothing for {missed_s:g} s")
        return problem

    def _answered(self) -> None:
        self._missed = 0
        self._client.heard_s = asyncio.get_running_loop().time()
        self._client.found()
