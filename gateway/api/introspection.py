"""The gateway's health, by service, and its reflection.

Made and registered by ``server``. A service's health derives from what the service needs: the client API's
from the engines, the operators' from the controller. Must not know how these are found.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from farshore.gateway.engines.known import KnownEngines
from farshore.periodic import repeat

_logger = logging.getLogger(__name__)

_REFLECTION = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
"""v1 has the messages of v1alpha; grpcio has code for v1alpha only."""


class StandingCalls:
    """Refuses calls that stay open above ``most``. Use it on the event loop only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0

    @contextlib.asynccontextmanager
    async def counted(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        if self._open >= self._most:
            message = f"{self._most} calls watch this gateway already: end one, or use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


class _Checks(health.aio.HealthServicer):
    """The health service, whose watches are bounded."""

    def __init__(self, standing: StandingCalls) -> None:
        super().__init__()
        self._standing = standing

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._standing.counted(context):
            await super().Watch(request, context)


class ServingState:
    """The health of the services ``inference`` and ``operators``, by their names. The name "" means the
    gateway, and is as ``inference``."""

    def __init__(self, *, inference: str, operators: str, standing: StandingCalls) -> None:
        self._inference = inference
        self._operators = operators
        self._checks = _Checks(standing)
        self._changed = asyncio.Event()
        self.serving = asyncio.Event()
        """Set while an engine takes requests."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the health service to a server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, server)

    def changed(self) -> None:
        """The engines changed."""
        self._changed.set()

    async def follow(self, engines: KnownEngines) -> None:
        """Follows ``engines`` until the task is cancelled."""
        await repeat(partial(self._follow_change, engines), tell=_tell)

    async def follow_controller(self, controller: grpc.aio.Channel) -> None:
        """Follows the connection to the controller, which it keeps open, until the task is cancelled."""
        await repeat(partial(self._follow_state, controller), tell=_tell)

    async def tell(self, engines: KnownEngines) -> None:
        serves = engines.problem is None
        for name in ("", self._inference):
            await self._set(name, serves)
        if serves:
            self.serving.set()
        else:
            self.serving.clear()

    async def stop(self) -> None:
        """NOT_SERVING for all names from now on."""
        await self._checks.enter_graceful_shutdown()

    async def _follow_change(self, engines: KnownEngines) -> None:
        await self.tell(engines)
        await self._changed.wait()
        self._changed.clear()

    async def _follow_state(self, controller: grpc.aio.Channel) -> None:
        state = controller.get_state(try_to_connect=True)
        await self._set(self._operators, state is grpc.ChannelConnectivity.READY)
        await controller.wait_for_state_change(state)

    async def _set(self, name: str, serves: bool) -> None:
        reply = health_pb2.HealthCheckResponse
        await self._checks.set(name, reply.SERVING if serves else reply.NOT_SERVING)


def _tell(error: Exception) -> None:
    _logger.error("the gateway's health can't be kept", exc_info=error)


def add_reflection(server: grpc.aio.Server, services: Collection[str], standing: StandingCalls) -> None:
    """Adds reflection, v1 and v1alpha, to a server. ``services``: the names to list."""
    servicer = reflection.aio.ReflectionServicer((*services, health.SERVICE_NAME, reflection.SERVICE_NAME))

    async def describe(
        requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        async with standing.counted(context):
            async for reply in servicer.ServerReflectionInfo(requests, context):
                yield reply

    method = grpc.stream_stream_rpc_method_handler(
        describe,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in _REFLECTION]
    )
