"""Builds a gateway: the gRPC server with its services, channels and threads.

Called by ``__main__``, and by tests within their process. Must not know about processes and signals.
"""

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.errors import Internal
from farshore.gateway.api import admin
from farshore.gateway.api.admin import AdminProxy
from farshore.gateway.api.http import HttpListener
from farshore.gateway.api.introspection import ServingState, StandingCalls, add_reflection
from farshore.gateway.api.listening import bind_error, split_address
from farshore.gateway.api.openai.endpoints import Endpoints
from farshore.gateway.api.service import InferenceService
from farshore.gateway.engines.discovery import EngineDiscovery
from farshore.gateway.engines.dispatch import Dispatcher
from farshore.gateway.engines.known import KnownEngines
from farshore.gateway.engines.router import Router
from farshore.gateway.limits import Limits
from farshore.gateway.page.page import Page
from farshore.gateway.page.watch import Watch
from farshore.gateway.requests.intake import Intake
from farshore.gateway.requests.log import RequestLog
from farshore.gateway.served import Served
from farshore.interpreter import make_nicer
from farshore.kvstore.directory.base import Directory
from farshore.proto import inference_pb2

NICENESS = 10
"""Added to the niceness of tokenizing threads, so that the event loop's threads run first."""

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Gateway:
    """A running gateway that accepts calls at ``address`` until ``stop``. Made by ``create``."""

    def __init__(
        self,
        *,
        address: str,
        listener: HttpListener | None,
        server: grpc.aio.Server,
        state: ServingState,
        log: RequestLog,
        engines: KnownEngines,
        discovery: EngineDiscovery,
        controller: grpc.aio.Channel,
        tokenizing: ThreadPoolExecutor,
        limits: Limits,
    ) -> None:
        self.address = address
        self.engines = engines
        self.http_address = listener.address if listener is not None else None
        self._listener = listener
        self._server = server
        self._state = state
        self._log = log
        self._discovery = discovery
        self._controller = controller
        self._tokenizing = tokenizing
        self._limits = limits
        self._watching = [
            asyncio.create_task(state.follow(engines), name="health"),
            asyncio.create_task(state.follow_controller(controller), name="controller's health"),
            asyncio.create_task(discovery.watch(), name="engine discovery"),
        ]

    @property
    def calls(self) -> int:
        """The number of open Generate calls."""
        return self._log.calls

    async def await_serving(self) -> None:
        """Returns when an engine takes requests. The caller bounds the wait."""
        await self._state.serving.wait()

    async def await_failure(self) -> NoReturn:
        """Waits until a part has ended that must run until :meth:`stop`, and raises Internal. The gateway
        can't go on then: stop it. Cancel this before stop()."""
        parts = {*self._watching}
        if self._listener is not None and self._listener.serving is not None:
            parts.add(self._listener.serving)
        ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        part = ended.pop()
        raise Internal(f"the gateway's {part.get_name()} ended: {part.exception()!r}") from part.exception()

    async def stop(self) -> None:
        """Sets the health to NOT_SERVING, lets live requests go on for ``drain_s``, fails those that remain,
        and closes everything. Call once."""
        await self._state.stop()
        # The log is closed first, which ends its readers, so that the server has no calls to wait for.
        await self._log.close()
        await self._server.stop(self._limits.shutdown_s)
        if self._listener is not None:
            await self._listener.stop(self._limits.shutdown_s)
        for task in self._watching:
            task.cancel()
        await asyncio.wait(self._watching)
        self._discovery.stop()
        await self.engines.close()
        await self._controller.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)


async def create(
    served: Served,
    *,
    listen: str,
    directory: Directory,
    controller: str,
    token: ClusterToken | None = None,
    announced_spec: str | None = None,
    limits: Limits | None = None,
    http: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Gateway:
    """Starts a gateway on the running event loop. ``listen``, of gRPC, and ``http``, of HTTP (None: off):
    HOST:PORT, port 0 for any free one. ``directory`` lists the engines; it stays the caller's.
    ``controller``: its address, for operators' calls. Neither must answer yet. ``token``: the cluster's,
    which this gateway proves to engines and controller; its own clients prove nothing.
    ``announced_spec``: see ``KnownEngines``. The gateway's health says whether an engine takes requests.

    Raises PortInUse, or InvalidRequest, if the gateway can't listen on ``listen`` or ``http``, and
    StartupError if it can't serve HTTP there.
    """
    limits = limits or Limits()
    host, _ = split_address(listen)
    server = grpc.aio.server(
        options=_options(limits, max_positions=served.config.max_positions),
        maximum_concurrent_rpcs=limits.open_calls,
    )
    port = _bind(server, listen)
    standing = StandingCalls(limits.standing_calls)
    state = ServingState(inference=SERVICE, operators=admin.NAME, standing=standing)
    engines = KnownEngines(limits=limits, token=token, spec=announced_spec, changed=state.changed)
    discovery = EngineDiscovery(directory, engines)
    tokenizing = ThreadPoolExecutor(
        limits.tokenizer_threads,
        thread_name_prefix="tokenizing",
        initializer=make_nicer,
        initargs=(NICENESS,),
    )
    log = RequestLog(
        Dispatcher(
            Router(engines.available, lambda: engines.problem), tokenizer=served.tokenizer, limits=limits
        ),
        limits,
        preparing=tokenizing,
        engine_problem=lambda: engines.problem,
        clock=clock,
    )
    intake = Intake(served=served, log=log, limits=limits, clock=clock)
    in_thread = functools.partial(asyncio.get_running_loop().run_in_executor, tokenizing)
    service = InferenceService(intake, in_thread=in_thread)
    channel = rpc.aio_channel(controller, token)
    operators = AdminProxy(channel, controller, limits)
    server.add_generic_rpc_handlers((service.handler(), operators.handler()))
    state.register(server)
    add_reflection(server, (SERVICE, admin.NAME), standing)
    listener = None
    if http is not None:
        page = Page(Watch(operators, clock=clock))
        endpoints = Endpoints(intake, problem=lambda: engines.problem, in_thread=in_thread, page=page)
        connections = limits.open_calls * limits.connections_per_call
        listener = HttpListener(endpoints.application(), listen=http, most_connections=connections)
    await discovery.look()
    await engines.probe()
    await state.tell(engines)
    await server.start()
    if listener is not None:
        await listener.start()
    return Gateway(
        address=f"{host}:{port}",
        listener=listener,
        server=server,
        state=state,
        log=log,
        engines=engines,
        discovery=discovery,
        controller=channel,
        tokenizing=tokenizing,
        limits=limits,
    )


def _options(limits: Limits, *, max_positions: int) -> list[tuple[str, int]]:
    """The options of every server, with the gateway's own limits on messages and pings."""
    changed = {
        # A message up to twice the limit is received, so that the refusal says how to go on.
        "grpc.max_receive_message_length": 2 * limits.message_bytes_for(max_positions),
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": limits.ping_interval_ms,
    }
    return list((dict(rpc.OPTIONS) | changed).items())


def _bind(server: grpc.aio.Server, listen: str) -> int:
    try:
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise bind_error(listen) from error
