"""Builds a gateway: the gRPC server with its services, channels and threads.

Called by ``__main__``, and by tests within their process. Must not know about processes and signals.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from farshore import rpc
from farshore.gateway.api import admin
from farshore.gateway.api.admin import AdminProxy
from farshore.gateway.api.http import HttpListener
from farshore.gateway.api.listening import bind_error, split_address
from farshore.gateway.api.openai.endpoints import Endpoints
from farshore.gateway.api.service import InferenceService
from farshore.gateway.engines.discovery import EngineDiscovery
from farshore.gateway.engines.engine_client import GrpcEngineClient
from farshore.gateway.engines.health import EngineHealth
from farshore.gateway.limits import Limits
from farshore.gateway.requests.intake import Intake
from farshore.gateway.requests.log import RequestLog
from farshore.gateway.served import Served
from farshore.interpreter import make_nicer
from farshore.proto import inference_pb2

NICENESS = 10
"""Added to the niceness of tokenizing threads, so that the event loop's threads run first."""

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Gateway:
    """A running gateway that accepts calls at ``address`` until ``stop``. Made by ``create``."""

    def __init__(
        self,
        *,
        address: str,
        listener: HttpListener | None,
        server: grpc.aio.Server,
        health_state: health.aio.HealthServicer,
        log: RequestLog,
        engine: GrpcEngineClient,
        watching: Sequence[asyncio.Task[None]],
        controller: grpc.aio.Channel,
        tokenizing: ThreadPoolExecutor,
        limits: Limits,
    ) -> None:
        self.address = address
        self.http_address = listener.address if listener is not None else None
        self._listener = listener
        self._server = server
        self._health = health_state
        self._log = log
        self._engine = engine
        self._watching = watching
        self._controller = controller
        self._tokenizing = tokenizing
        self._limits = limits

    @property
    def calls(self) -> int:
        """The number of open Generate calls."""
        return self._log.calls

    @property
    def remembered_bytes(self) -> int:
        """Bytes of the events of ended requests that can still be read."""
        return self._log.ended_bytes

    async def stop(self) -> None:
        """Sets the health to NOT_SERVING, lets live requests go on for ``drain_s``, fails those that remain,
        and closes everything. Call once."""
        await self._health.enter_graceful_shutdown()
        # The log is closed first, which ends its readers, so that the server has no calls to wait for.
        await self._log.close()
        await self._server.stop(self._limits.shutdown_s)
        if self._listener is not None:
            await self._listener.stop(self._limits.shutdown_s)
        for task in self._watching:
            task.cancel()
        await asyncio.wait(self._watching)
        await self._engine.close()
        await self._controller.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


async def create(
    served: Served,
    *,
    listen: str,
    engine: str,
    controller: str,
    limits: Limits | None = None,
    http: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Gateway:
    """Starts a gateway on the running event loop. ``listen``, of gRPC, and ``http``, of HTTP (None: off):
    HOST:PORT, port 0 for any free one. ``engine``
    and ``controller``: their addresses; neither must answer yet. The gateway's health follows the engine's.

    Raises PortInUse, or InvalidRequest, if the gateway can't listen on ``listen``.
    """
    limits = limits or Limits()
    host, _ = split_address(listen)
    server = grpc.aio.server(
        options=_options(limits.message_bytes_for(served.config.max_positions)),
        maximum_concurrent_rpcs=limits.max_readers + limits.other_calls,
    )
    port = _bind(server, listen)
    engine_client = GrpcEngineClient(engine, served=served, limits=limits)
    health_state = health.aio.HealthServicer()
    engine_health = EngineHealth(engine_client, limits=limits, changed=functools.partial(_tell, health_state))
    tokenizing = ThreadPoolExecutor(
        limits.tokenizer_threads,
        thread_name_prefix="tokenizing",
        initializer=make_nicer,
        initargs=(NICENESS,),
    )
    log = RequestLog(
        engine_client,
        limits,
        preparing=tokenizing,
        engine_problem=lambda: engine_health.problem,
        clock=clock,
    )
    controller_channel = grpc.aio.insecure_channel(controller, options=rpc.OPTIONS)
    discovery = EngineDiscovery(engine_client, controller_channel)
    intake = Intake(served=served, log=log, limits=limits, clock=clock)
    service = InferenceService(intake)
    operators = AdminProxy(controller_channel, controller, limits)
    server.add_generic_rpc_handlers((service.handler(), operators.handler()))
    health_pb2_grpc.add_HealthServicer_to_server(health_state, server)
    reflection.enable_server_reflection(
        (SERVICE, admin.NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    await engine_health.probe()
    await server.start()
    listener = None
    if http is not None:
        endpoints = Endpoints(
            intake,
            problem=lambda: engine_health.problem,
            in_thread=functools.partial(asyncio.get_running_loop().run_in_executor, tokenizing),
        )
        listener = HttpListener(
            endpoints.application(), listen=http, most_connections=limits.max_readers + limits.other_calls
        )
        await listener.start()
    return Gateway(
        address=f"{host}:{port}",
        listener=listener,
        server=server,
        health_state=health_state,
        log=log,
        engine=engine_client,
        watching=[asyncio.create_task(engine_health.watch()), asyncio.create_task(discovery.watch())],
        controller=controller_channel,
        tokenizing=tokenizing,
        limits=limits,
    )


async def _tell(health_state: health.aio.HealthServicer, serving: bool) -> None:
    reply = health_pb2.HealthCheckResponse
    for name in ("", SERVICE):
        await health_state.set(name, reply.SERVING if serving else reply.NOT_SERVING)


def _options(message_bytes: int) -> list[tuple[str, int]]:
    """The options of every channel, with the gateway's own limit on received messages."""
    changed = {"grpc.max_receive_message_length": message_bytes}
    return list((dict(rpc.OPTIONS) | changed).items())


def _bind(server: grpc.aio.Server, listen: str) -> int:
    try:
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise bind_error(listen) from error
