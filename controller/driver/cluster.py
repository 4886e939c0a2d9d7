"""Starts a whole cluster from its driver process, in order, and ends it in reverse order.

A cluster on a joined Ray outlives its drivers: a further driver finds its controller and adds a gateway only.
A driver without a gateway keeps the controller there, and applies changes of the configuration.

Called by ``farshore serve``, and by ``farshore generate`` for a cluster that lasts one call. The driver is on
no token's path.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace
from types import TracebackType
from typing import Self

import ray

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.controller import listen
from farshore.controller.config import ClusterConfig
from farshore.controller.driver import finding, preparation
from farshore.controller.driver.gateway_process import GatewayProcess
from farshore.controller.driver.ray_runtime import RayRuntime
from farshore.controller.driver.remote_controller import START_DEADLINE_S, RemoteController, start_controller
from farshore.controller.driver.worker_start import await_workers
from farshore.controller.launch import resources
from farshore.controller.launch.exits import actor_end_in_words
from farshore.controller.reconcile import Kind
from farshore.errors import (
    ProcessEnded,
)
from farshore.kvstore.directory.base import Directory
from farshore.kvstore.directory.connect import open_directory
from farshore.models.config.generation import load_generation
from farshore.models.config.load import load_spec
from farshore.models.config.model import ModelConfig

POLL_S = 0.5
"""How often the driver checks its child processes while it serves."""

STOP_DEADLINE_S = 30.0

PRIVATE_DRAIN_S = 3.0
"""How long requests go on when a cluster on a private Ray ends, at most: an operator waits at a terminal."""


class Cluster:
    """Made by :meth:`start`; a context manager that stops the cluster. ``address``: the gateway's.
    ``endpoints``: name -> address of the gateway, the controller and each worker. ``notices``:
    what an operator should know; may be empty. ``goes_on``: what remains after :meth:`stop`, and how to end
    it; empty if nothing does."""

    def __init__(
        self, config: ClusterConfig, model: ModelConfig, given: Collection[Kind], *, has_gateway: bool
    ) -> None:
        self._config = config
        self._has_gateway = has_gateway
        self._is_up = False
        self._model = model
        self._given = given
        self._creator = uuid.uuid4().hex
        self._is_found = False
        self._ray = RayRuntime(
            config.ray_address,
            dashboard=config.dashboard,
            token_file=config.token_file,
            worker_bytes=resources.worker_bytes(config, model),
            gpu=config.gpu_index,
            # In a pod the launcher and Ray start at the same time.
            patience_s=0.0 if has_gateway else START_DEADLINE_S,
        )
        self._controller: RemoteController | None = None
        self._gateway: GatewayProcess | None = None
        self._directory: Directory | None = None
        self._last_event = 0
        self._stopped = threading.Event()
        self.endpoints: dict[str, str] = {}
        self.address = ""
        self.notices: list[str] = []
        self.goes_on = ""

    @classmethod
    def start(
        cls,
        config: ClusterConfig,
        *,
        given: Collection[str] = (),
        has_gateway: bool = True,
        progress: Callable[[str], None],
    ) -> Self:
        """Starts a cluster, or finds the one of this name. On any error, everything that was started is ended
        again. ``given``: the fields of ``config`` that an operator chose: numbers of workers among them go
        before those that a running cluster has. ``has_gateway``: without one, which needs a joined Ray, the
        workers are not awaited. ``progress`` is called with a few words at each stage.

        Raises InvalidRequest (also ModelError, PortInUse), StartupError, ProcessEnded; TransportError if
        Redis does not answer.
        """
        if has_gateway:
            listen.check(config.host, config.port)
            if config.http_port is not None:
                listen.check(config.host, config.http_port, option="--http-port")
        # A download happens now, before anything is started; the cluster's processes find the cache filled.
        config = preparation.prepared(config, progress)
        source, model = load_spec(config.spec)
        load_generation(config.spec, source, vocab=model.vocab)
        cluster = cls(config, model, preparation.given_kinds(given), has_gateway=has_gateway)
        try:
            cluster._start(progress)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def reconfigure(self, config: ClusterConfig, given: Collection[str]) -> None:
        """Applies a changed configuration, as another driver that starts with it would: numbers of workers
        that changed are in force. Raises InvalidRequest if anything else did, StartupError if the controller
        does not answer."""
        config = replace(preparation.prepared(config, lambda _: None), token_file=self._ray.token_file)
        self._running_controller.join(config, preparation.given_kinds(given))

    def wait(self, *, warn: Callable[[str], None], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Blocks until :meth:`stop`, or until an operator ends the cluster. Raises ProcessEnded, with the
        process's name and how it ended, when the gateway or Ray has ended. ``warn`` is called with what
        happens to workers: they are lost, and replaced. ``meanwhile`` is called every POLL_S.
        """
        actor, call, seen, is_away = self._running_controller.actor, None, self._last_event, False
        while not self._stopped.wait(POLL_S):
            self._check_processes()
            meanwhile()
            call = call or actor.events.remote(seen)
            if not ray.wait([call], timeout=0)[0]:
                continue
            pending, call = call, None
            try:
                events = ray.get(pending)
            except ray.exceptions.RayActorError as error:
                if finding.has_ended(actor):
                    self.goes_on = ""
                    raise ProcessEnded(f"the controller {actor_end_in_words(error)}, for good") from error
                if not is_away:
                    warn(f"the controller {actor_end_in_words(error)}: it is started again, serving goes on")
                # In Redis the events outlive it, and so do their numbers.
                seen, is_away = 0 if self._config.redis is None else seen, True
                continue
            is_away = False
            for event in events:
                seen = event.number
                if event.kind == "down":
                    self.goes_on = ""
                    return
                if (event.kind != "started" and event.subject not in self.endpoints) or event.kind == "lost":
                    warn(f"{event.subject} {event.kind}{': ' if event.detail else ''}{event.detail}")

    def stop(self) -> None:
        """Ends everything that this cluster started, except what :attr:`goes_on` says; then its gateway's
        requests may go on for the configuration's ``drain_timeout_s``. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._gateway is not None:
            self._gateway.stop(drains=bool(self.goes_on))
        if self._directory is not None:
            self._directory.disconnect()
        if self._controller is not None and self._ray.ended() is None:
            if self._config.ray_address is None:
                # If the controller is dead or stuck, the end of a private Ray still ends all workers.
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(self._controller.actor.down.remote(), timeout=STOP_DEADLINE_S)
                ray.kill(self._controller.actor)
            elif not (self._is_found or self._is_up):
                finding.end(self._config.name)
        self._ray.stop()

    def end_now(self) -> None:
        """Makes a :meth:`stop` in progress wait for no request. A signal handler may call it."""
        if self._stopped.is_set() and self._gateway is not None:
            self._gateway.end_now()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self, progress: Callable[[str], None]) -> None:
        config, model = self._config, self._model
        self.notices += [model.length_warning] if model.length_warning else []
        progress(f"joining Ray at {config.ray_address}" if config.ray_address else "starting Ray")
        self._ray.start()
        self._ray.note_processes()
        if config.ray_address is not None:
            self.notices += resources.warnings(resources.all_nodes())
        config = replace(config, token_file=self._ray.token_file)
        progress("starting the controller")
        self._controller = controller = self._find_or_start_controller(config, model)
        address = controller.address()
        self._is_found = controller.creator() != self._creator
        if self._is_found:
            progress(f"joining the cluster {config.name}")
            controller.join(config, self._given)
        self.endpoints["controller"] = address
        if self._has_gateway:
            self._start_gateway(config, controller, progress)
        self._last_event = max((event.number for event in controller.events()), default=0)
        self._ray.note_processes()
        self._is_up = True
        if config.ray_address is not None:
            self.goes_on = (
                f"the cluster {config.name} goes on; `farshore down --ray-address {config.ray_address} --name"
                f" {config.name}` ends it, the same `farshore serve` adds a gateway"
            )

    def _start_gateway(
        self, config: ClusterConfig, controller: RemoteController, progress: Callable[[str], None]
    ) -> None:
        """Starts the gateway, and blocks until it serves."""
        directory = controller.directory()
        self._directory = open_directory(directory, token=ClusterToken.read(self._ray.token_file))
        # Started now, so that it loads its tokenizer while the workers start.
        self._gateway = GatewayProcess(
            spec=config.spec,
            listen=f"{listen.bracketed(config.host)}:{config.port}",
            http=None if config.http_port is None else f"{listen.bracketed(config.host)}:{config.http_port}",
            directory=directory,
            controller=self.endpoints["controller"],
            token_file=self._ray.token_file,
            drain_s=drain_s(config),
        )
        workers = await_workers(
            self._config,
            controller,
            self._directory,
            is_found=self._is_found,
            check=self._check_processes,
            pause=self._stopped.wait,
            progress=progress,
        )
        progress("starting the gateway")
        self.address = self._gateway.serve()
        api = {"gateway": self.address}
        if self._gateway.http_address is not None:
            api["HTTP API"] = f"http://{self._gateway.http_address}/v1"
        self.endpoints = api | self.endpoints | {record.worker: record.address for record in workers}

    def _find_or_start_controller(self, config: ClusterConfig, model: ModelConfig) -> RemoteController:
        actor = finding.controller(config.name)
        if actor is not None:
            # Noted at once: what is found is not to be ended, also if it does not answer.
            self._is_found = True
        else:
            host = "127.0.0.1" if config.ray_address is None else finding.own_address()
            if not rpc.is_loopback(host):
                self.notices.append(
                    f"controller and workers listen on their nodes' addresses, such as {host}: they take "
                    "only callers with the cluster's token, but nothing is encrypted"
                )
            actor = start_controller(
                config,
                model,
                given=self._given,
                creator=self._creator,
                host=host,
                state_folder=str(self._ray.state_folder(config.name, config.state_dir)),
            )
        return RemoteController(actor, check=self._check_processes)

    @property
    def _running_controller(self) -> RemoteController:
        assert self._controller is not None
        return self._controller

    def _check_processes(self) -> None:
        """Raises ProcessEnded if a process that the driver itself started has ended, the gateway or Ray, or
        the error that the gateway reported instead of serving."""
        if self._gateway is not None:
            self._gateway.check_start()
        gone = self._ray.ended() or (self._gateway.ended() if self._gateway else None)
        if gone:
            raise ProcessEnded(gone)


def drain_s(config: ClusterConfig) -> float:
    """How long the requests of a driver's own gateway go on after the driver was told to end."""
    private = config.ray_address is None
    return min(config.drain_timeout_s, PRIVATE_DRAIN_S) if private else config.drain_timeout_s
