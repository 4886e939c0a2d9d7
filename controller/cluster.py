"""Starts a whole cluster from its driver process, in order, and ends it in reverse order.

Called by ``farshore serve``, and by ``farshore generate`` for a cluster that lasts one call. The driver is on
no token's path.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray

from farshore.controller import listen
from farshore.controller.config import LOAD_DEADLINE_S, PLACE_DEADLINE_S, ClusterConfig
from farshore.controller.exits import actor_end_in_words
from farshore.controller.gateway_process import GatewayProcess
from farshore.controller.liveness import EndedWorker
from farshore.controller.ray_runtime import RayRuntime
from farshore.errors import FarshoreError, ProcessEnded, StartupError
from farshore.ids import WorkerId
from farshore.models.config.load import load_spec
from farshore.models.config.model import ModelConfig
from farshore.models.files.source import pinned

POLL_S = 0.5
"""How often the driver checks its child processes while it waits."""

START_DEADLINE_S = 120.0
"""For the controller's process to answer its first call."""

MARGIN_S = 30.0
"""The driver waits this much longer than the controller, whose own error names what is missing."""

STOP_DEADLINE_S = 30.0


class ControllerActor:
    """:class:`farshore.controller.controller.Controller` as a Ray actor. Ray needs the actor's class in the
    driver. This class wraps the controller so that only the actor's process imports it: its imports include
    PyTorch, which takes two seconds."""

    def __init__(self, config: ClusterConfig, model: ModelConfig) -> None:
        from farshore.controller.controller import Controller

        self._controller = Controller(config, model)

    def address(self) -> str:
        return self._controller.address()

    def place(self) -> dict[Any, str]:
        return self._controller.place()

    def load(self) -> dict[Any, str]:
        return self._controller.load()

    def loading(self) -> str:
        return self._controller.loading()

    def ended(self) -> list[EndedWorker]:
        return self._controller.ended()

    def stop(self) -> None:
        self._controller.stop()


class Cluster:
    """Made by :meth:`start`; a context manager that stops the cluster. ``address``: the gateway's.
    ``endpoints``: name -> address of the gateway, the controller and each worker."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._ray = RayRuntime(config.ray_address, dashboard=config.dashboard)
        self._controller: Any = None
        self._gateway: GatewayProcess | None = None
        self._stopped = threading.Event()
        self.endpoints: dict[str, str] = {}
        self.address = ""

    @classmethod
    def start(cls, config: ClusterConfig, *, progress: Callable[[str], None]) -> Self:
        """Starts a cluster. On any error, everything that was started is ended again. ``progress`` is called
        with a few words at each stage.

        Raises InvalidRequest (also ModelError, PortInUse), StartupError, ProcessEnded.
        """
        listen.check(config.host, config.port)
        # A download happens now, before anything is started; the cluster's processes find the cache filled.
        config = replace(config, spec=pinned(config.spec, progress=progress))
        _, model = load_spec(config.spec)
        cluster = cls(config)
        try:
            cluster._start(model, progress)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def wait(self, *, warn: Callable[[str], None]) -> None:
        """Blocks until :meth:`stop`. Raises ProcessEnded, with the process's name and how it ended, when the
        cluster can serve nothing without it. ``warn`` is called once for each other worker that ends."""
        warned: set[WorkerId] = set()
        call = None
        while not self._stopped.wait(POLL_S):
            self._check_processes()
            call = call or self._controller.ended.remote()
            if not ray.wait([call], timeout=0)[0]:
                continue
            workers, call = self._ended_workers(call), None
            if fatal := [f"{ended.worker} {ended.how}" for ended in workers if ended.fatal]:
                raise ProcessEnded("; ".join(fatal))
            for ended in workers:
                if ended.worker not in warned:
                    warned.add(ended.worker)
                    warn(f"{ended.worker} {ended.how}: requests whose KV was there fail, the others go on")

    def stop(self) -> None:
        """Ends everything that this cluster started. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._gateway is not None:
            self._gateway.stop()
        if self._controller is not None and self._ray.ended() is None:
            # If the controller is dead or stuck, the kill below and the end of Ray still end all workers.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._controller.stop.remote(), timeout=STOP_DEADLINE_S)
            ray.kill(self._controller)
        self._ray.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self, model: ModelConfig, progress: Callable[[str], None]) -> None:
        config = self._config
        progress(f"joining Ray at {config.ray_address}" if config.ray_address else "starting Ray")
        self._ray.start()
        progress("starting the controller")
        # Three calls at once: place or load, loading, and stop.
        controller_actor = ray.remote(ControllerActor).options(num_cpus=0, max_concurrency=3)
        self._controller = controller_actor.remote(config, model)
        controller = self._ask(self._controller.address.remote(), "the controller", START_DEADLINE_S)
        # Started now, so that it loads its tokenizer while the workers start.
        self._gateway = GatewayProcess(
            spec=config.spec,
            listen=f"{listen.bracketed(config.host)}:{config.port}",
            controller=controller,
        )
        progress(f"starting {config.attention_workers} attention workers")
        placing = self._controller.place.remote()
        attention = self._ask(placing, "the controller", PLACE_DEADLINE_S + MARGIN_S)
        dense = self._load(progress)
        progress("starting the gateway")
        self.address = self._gateway.serve(engine=next(iter(dense.values())))
        self._ray.note_processes()
        self.endpoints = {"gateway": self.address, "controller": controller, **dense, **attention}

    def _load(self, progress: Callable[[str], None]) -> dict[str, str]:
        name = self._config.spec.name
        progress(f"loading {name}")
        reported = ""

        def report() -> None:
            nonlocal reported
            words = self._ask(self._controller.loading.remote(), "the controller", START_DEADLINE_S)
            if words not in ("", reported):
                reported = words
                progress(f"loading {name}: {words}")

        loading = self._controller.load.remote()
        return self._ask(loading, "the controller", LOAD_DEADLINE_S + MARGIN_S, meanwhile=report)

    def _ask(
        self, call: Any, callee: str, deadline_s: float, *, meanwhile: Callable[[], None] = lambda: None
    ) -> Any:
        """Blocks for the call's result; calls ``meanwhile`` every POLL_S. ``callee``: the called process, for
        messages. Raises the call's FarshoreError; Ray's errors and a missed deadline become StartupError.
        Raises ProcessEnded if the gateway or Ray ends meanwhile."""
        until_s = time.monotonic() + deadline_s
        while not ray.wait([call], timeout=POLL_S)[0]:
            self._check_processes()
            if time.monotonic() > until_s:
                raise StartupError(f"{callee} did not answer within {deadline_s:.0f} s: see Ray's logs")
            meanwhile()
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

    def _ended_workers(self, call: Any) -> list[EndedWorker]:
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError as error:
            raise ProcessEnded(f"the controller {actor_end_in_words(error)}") from error
