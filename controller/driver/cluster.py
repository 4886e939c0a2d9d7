"""Starts a whole cluster from its driver process, in order, and ends it in reverse order.

A cluster on a joined Ray outlives its drivers: a further driver finds its controller and adds a gateway only.
A driver without a gateway keeps the controller there, and applies changes of the configuration.

Called by ``farshore serve``, and by ``farshore generate`` for a cluster that lasts one call. The driver is on
no token's path.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.controller import listen
from farshore.controller.actors import ControllerActor
from farshore.controller.config import LOAD_DEADLINE_S, PLACE_DEADLINE_S, ClusterConfig
from farshore.controller.driver import finding, preparation, start_words
from farshore.controller.driver.gateway_process import GatewayProcess
from farshore.controller.driver.ray_runtime import RayRuntime
from farshore.controller.events import ClusterEvent
from farshore.controller.launch import resources
from farshore.controller.launch.exits import NOT_STARTED, actor_end_in_words
from farshore.controller.reconcile import Kind
from farshore.errors import (
    FarshoreError,
    ModelError,
    ProcessEnded,
    StartupError,
    TransportError,
    Unauthenticated,
)
from farshore.kvstore.directory.base import Directory, WorkerRecord
from farshore.kvstore.directory.connect import open_directory
from farshore.models.config.generation import load_generation
from farshore.models.config.load import load_spec
from farshore.models.config.model import ModelConfig

POLL_S = 0.5
"""How often the driver checks its child processes while it waits."""

START_DEADLINE_S = 120.0
"""For the controller's process to answer its first call."""

FAILURES_S = 2.0
"""How often the driver asks whether workers failed to start."""

START_POLL_S = 0.1
"""How often the driver looks for the workers while they start."""

CONTROLLER_CALLS = 8
"""Calls of the driver that the controller takes at once."""

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
        self._controller: Any = None
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
        self._ask_controller("join", config, preparation.given_kinds(given))

    def wait(self, *, warn: Callable[[str], None], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Blocks until :meth:`stop`, or until an operator ends the cluster. Raises ProcessEnded, with the
        process's name and how it ended, when the gateway or Ray has ended. ``warn`` is called with what
        happens to workers: they are lost, and replaced. ``meanwhile`` is called every POLL_S.
        """
        call, seen, is_away = None, self._last_event, False
        while not self._stopped.wait(POLL_S):
            self._check_processes()
            meanwhile()
            call = call or self._controller.events.remote(seen)
            if not ray.wait([call], timeout=0)[0]:
                continue
            pending, call = call, None
            try:
                events = ray.get(pending)
            except ray.exceptions.RayActorError as error:
                if finding.has_ended(self._controller):
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
                    ray.get(self._controller.down.remote(), timeout=STOP_DEADLINE_S)
                ray.kill(self._controller)
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
        self._controller = self._find_or_start_controller(config, model)
        controller = self._ask_controller("address")
        self._is_found = self._ask_controller("creator") != self._creator
        if self._is_found:
            progress(f"joining the cluster {config.name}")
            self._ask_controller("join", config, self._given)
        self.endpoints["controller"] = controller
        if self._has_gateway:
            self._start_gateway(config, controller, progress)
        self._last_event = max((event.number for event in self._events()), default=0)
        self._ray.note_processes()
        self._is_up = True
        if config.ray_address is not None:
            self.goes_on = (
                f"the cluster {config.name} goes on; `farshore down --ray-address {config.ray_address} --name"
                f" {config.name}` ends it, the same `farshore serve` adds a gateway"
            )

    def _start_gateway(self, config: ClusterConfig, controller: str, progress: Callable[[str], None]) -> None:
        """Starts the gateway, and blocks until it serves. ``controller``: HOST:PORT."""
        directory = self._ask_controller("directory")
        self._directory = open_directory(directory, token=ClusterToken.read(self._ray.token_file))
        # Started now, so that it loads its tokenizer while the workers start.
        self._gateway = GatewayProcess(
            spec=config.spec,
            listen=f"{listen.bracketed(config.host)}:{config.port}",
            http=None if config.http_port is None else f"{listen.bracketed(config.host)}:{config.http_port}",
            directory=directory,
            controller=controller,
            token_file=self._ray.token_file,
            drain_s=drain_s(config),
        )
        workers = self._await_workers(progress)
        progress("starting the gateway")
        self.address = self._gateway.serve()
        api = {"gateway": self.address}
        if self._gateway.http_address is not None:
            api["HTTP API"] = f"http://{self._gateway.http_address}/v1"
        self.endpoints = api | self.endpoints | {record.worker: record.address for record in workers}

    def _find_or_start_controller(self, config: ClusterConfig, model: ModelConfig) -> Any:
        """Finds the controller that runs, or starts one on this node, where its port, chosen here, and its
        state stay the same. If the node is lost, the workers go on; the next driver starts another one,
        which needs a directory in Redis to find them."""
        found = finding.controller(config.name)
        if found is not None:
            # Noted at once: what is found is not to be ended, also if it does not answer.
            self._is_found = True
            return found
        host = "127.0.0.1" if config.ray_address is None else finding.own_address()
        if not rpc.is_loopback(host):
            self.notices.append(
                f"controller and workers listen on their nodes' addresses, such as {host}: they take only "
                "callers with the cluster's token, but nothing is encrypted"
            )
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_concurrency": CONTROLLER_CALLS, "scheduling_strategy": node}
        return (
            ray.remote(ControllerActor)
            .options(
                name=finding.CONTROLLER,
                namespace=config.namespace,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                **options,
            )
            .remote(
                config,
                model,
                given=self._given,
                creator=self._creator,
                listen=f"{listen.bracketed(host)}:{config.controller_port or listen.free_port(host)}",
                state_folder=str(self._ray.state_folder(config.name, config.state_dir)),
            )
        )

    def _await_workers(self, progress: Callable[[str], None]) -> tuple[WorkerRecord, ...]:
        """Blocks until every dense worker serves and all attention workers have joined each of them; in a
        cluster that was found, one of each kind. Raises ModelError if one can't load the model, StartupError
        if workers find no room or a deadline passes."""
        counts = self._ask_controller("counts")
        if self._is_found:
            counts = {kind: min(count, 1) for kind, count in counts.items()}
        config = replace(self._config, dense_workers=counts["dense"], attention_workers=counts["attention"])
        began_s, began_unix_s, look_s = time.monotonic(), time.time(), 0.0
        told, lacking = "", None
        # A private Ray has one node; nodes of a joined Ray may still come.
        if config.ray_address is None and (problem := self._problem(free=False)):
            raise StartupError(problem)
        while True:
            self._check_processes()
            waited_s = time.monotonic() - began_s
            records = self._listed()
            attention = sum(record.kind == "attention" for record in records)
            dense = [record for record in records if record.kind == "dense"]
            placed = attention >= config.attention_workers
            needed = config.attention_workers if config.placement == "offload" else 0
            ready = sum(record.state == "serving" and record.shards >= needed for record in dense)
            if placed and ready >= config.dense_workers:
                return records
            if not (dense and placed) and waited_s >= look_s:
                look_s = waited_s + FAILURES_S
                self._check_starts(since_s=began_unix_s)
                lacking = self._problem(free=True) if waited_s > 5 * FAILURES_S else None
            for record in dense:
                if record.state == "failed":
                    raise ModelError(record.failure)
            if not (dense and placed) and waited_s > PLACE_DEADLINE_S:
                problem = self._problem(free=True) or "see the logs of Ray on its nodes"
                raise StartupError(f"workers are not started after {waited_s:.0f} s: {problem}")
            if waited_s > LOAD_DEADLINE_S:
                raise StartupError(f"not serving after {waited_s:.0f} s: see Ray's logs")
            told = start_words.tell(progress, told, config, dense, lacking, placed=placed)
            self._stopped.wait(START_POLL_S)

    def _check_starts(self, *, since_s: float) -> None:
        """Raises StartupError if a worker could not start, because of its options or its node's token."""
        for event in self._events():
            if event.kind == "lost" and event.unix_s >= since_s and NOT_STARTED in event.detail:
                raise StartupError(f"{event.subject} {event.detail}")

    def _problem(self, *, free: bool) -> str | None:
        return self._ask_controller("problem", free=free)

    def _listed(self) -> tuple[WorkerRecord, ...]:
        assert self._directory is not None
        try:
            return self._directory.listing().workers
        except Unauthenticated as error:
            raise StartupError(str(error)) from error
        except TransportError:
            return ()  # The controller restarts.

    def _events(self) -> list[ClusterEvent]:
        return self._ask_controller("events", 0)

    def _ask_controller(self, method: str, *arguments: Any, **named: Any) -> Any:
        call = getattr(self._controller, method).remote(*arguments, **named)
        return self._ask(call, "the controller", START_DEADLINE_S)

    def _ask(self, call: Any, callee: str, deadline_s: float) -> Any:
        """Blocks for the call's result. ``callee``: the called process, for messages. Raises the call's
        FarshoreError; Ray's errors and a missed deadline become StartupError. Raises ProcessEnded if the
        gateway or Ray ends meanwhile."""
        until_s = time.monotonic() + deadline_s
        while not ray.wait([call], timeout=POLL_S)[0]:
            self._check_processes()
            if time.monotonic() > until_s:
                raise StartupError(f"{callee} did not answer within {deadline_s:.0f} s: see Ray's logs")
        try:
            return ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FarshoreError):
                raise error.cause from None
            raise StartupError(f"{callee} failed: {error.cause or error}") from error
        except ray.exceptions.RayActorError as error:
            raise StartupError(f"{callee} {actor_end_in_words(error)}") from error
        except ray.exceptions.RayError as error:
            raise StartupError(f"{callee} did not answer: {error}") from error

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
