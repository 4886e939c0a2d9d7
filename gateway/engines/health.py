"""Probes the engine's health service, to know whether the engine takes requests.

Run by ``api.server``, read by ``requests.log`` before it starts a request. A killed engine is noticed at the
next probe, a frozen one after ``missed_probes``. Must not know the consequences.
"""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore.gateway.engines.engine_client import GrpcEngineClient
from farshore.gateway.limits import Limits
from farshore.proto import cluster_pb2
from farshore.text import shortened

_SERVICE = cluster_pb2.DESCRIPTOR.services_by_name["Engine"].full_name


class EngineHealth:
    """``problem``: why the engine takes no requests; None if it does. Use it on the event loop only."""

    def __init__(
        self,
        engine: GrpcEngineClient,
        *,
        limits: Limits,
        changed: Callable[[bool], Awaitable[None]],
    ) -> None:
        """``changed`` is called with whether the engine serves: after the first probe, and at each change."""
        self._engine = engine
        self._limits = limits
        self._changed = changed
        self._missed = 0
        self._known = False
        self.problem: str | None = f"dense worker {engine.address} has not answered yet"

    async def watch(self) -> None:
        """Probes every ``probe_s`` until the task is cancelled."""
        while True:
            await asyncio.sleep(self._limits.probe_s)
            await self.probe()

    async def probe(self) -> None:
        """Asks once, and calls ``changed`` if the answer differs from the last one."""
        problem = await self._ask()
        changed = not self._known or (problem is None) != (self.problem is None)
        self._known, self.problem = True, problem
        if changed:
            await self._changed(problem is None)

    async def _ask(self) -> str | None:
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            stub = health_pb2_grpc.HealthStub(self._engine.channel)
            reply = await stub.Check(request, timeout=self._limits.probe_s)
        except grpc.aio.AioRpcError as error:
            return self._without_answer(error)
        self._missed = 0
        if reply.status == health_pb2.HealthCheckResponse.SERVING:
            return None
        return f"dense worker {self._engine.address} cannot go on: see its log"

    def _without_answer(self, error: grpc.aio.AioRpcError) -> str | None:
        code = error.code()
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._missed = 0
            return None  # All its call slots are taken: it is alive.
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            self._missed += 1
            if self._missed < self._limits.missed_probes and self._known:
                return self.problem
            silent_s = self._missed * self._limits.probe_s
            return f"dense worker {self._engine.address} has not answered for {silent_s:g} s"
        self._missed = 0
        return (
            f"dense worker {self._engine.address} is gone ({code.name}: {shortened(error.details() or '')})"
        )
