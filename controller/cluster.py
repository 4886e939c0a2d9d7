"""A cluster as its driver sees it: everything `farshore serve` starts, in order, and ends in reverse.

The embedded cluster of `farshore generate` is the same thing for one call.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray

from farshore.controller import listen
from farshore.controller.config import LOAD_DEADLINE_S, PLACE_DEADLINE_S, ClusterConfig
from farshore.controller.exits import how_an_actor_ended
from farshore.controller.gateway_process import GatewayProcess
from farshore.controller.parts import Ended
from farshore.controller.ray_runtime import RayRuntime
from farshore.errors import FarshoreError, ProcessEnded, StartupError
from farshore.ids import WorkerId
from farshore.models.config import ModelConfig, load_config
from farshore.models.source import DEMO, resolve

POLL_S = 0.5
START_DEADLINE_S = 120.0
"""For the controller's process to answer."""

MARGIN_S = 30.0
"""That the driver waits longer than the controller does, which knows what is missing and says so."""

STOP_DEADLINE_S = 30.0


class ControllerActor:
    """:class:`farshore.controller.controller.Controller` in the actor's process. Ray wants the actor's
    class in
    the driver; the controller's own imports PyTorch, which takes two seconds, so only the actor imports
    it."""

    def __init__(self, config: ClusterConfig, model: ModelConfig) -> None:
        from farshore.controller.controller import Controller

        self._controller = Controller(config, model)

    def address(self) -> str:
        return self._controller.address()

    def place(self) -> dict[Any, str]:
        return self._controller.place()

    def load(self) -> dict[Any, str]:
        return self._controller.load()

    def loading(self) -> tuple[int, int]:
        return self._controller.loading()

    def ended(self) -> list[Ended]:
        return self._controller.ended()

    def stop(self) -> None:
        self._controller.stop()


class Cluster:
    """Use :meth:`start`. ``address`` is the gateway's; ``endpoints`` names every part's."""

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
        """Start everything, or nothing: on any error what was started is ended again.

        Raises InvalidRequest (ModelError, PortInUse), StartupError; ``progress`` is told each stage in a few
        words.
        """
        listen.check(config.host, config.port)
        model = load_config(resolve(config.model))
        cluster = cls(config)
        try:
            cluster._start(model, progress)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def wait(self, *, warn: Callable[[str], None]) -> None:
        """Block until :meth:`stop`. Raises ProcessEnded, with its name and how, when a part has ended that
        nothing can be served without; ``warn`` is told of others, once each."""
        warned: set[WorkerId] = set()
        asked = None
        while not self._stopped.wait(POLL_S):
            self._check_processes()
            asked = asked or self._controller.ended.remote()
            if not ray.wait([asked], timeout=0)[0]:
                continue
            ended, asked = self._ended(asked), None
            if fatal := [f"{part.worker} {part.how}" for part in ended if part.fatal]:
                raise ProcessEnded("; ".join(fatal))
            for part in ended:
                if part.worker not in warned:
                    warned.add(part.worker)
                    warn(f"{part.worker} {part.how}: requests whose KV was there fail, the others go on")

    def stop(self) -> None:
        """End everything this cluster started. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._gateway is not None:
            self._gateway.stop()
        if self._controller is not None and self._ray.ended() is None:
            # Dead or stuck: killing it, and Ray's own end below, leaves nothing running either.
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
        # One thread for place and load, one to be asked how far they are, one to stop it all.
        controller_actor = ray.remote(ControllerActor).options(num_cpus=0, max_concurrency=3)
        self._controller = controller_actor.remote(_anywhere(config), model)
        controller = self._ask(self._controller.address.remote(), "the controller", START_DEADLINE_S)
        # It reads its tokenizer while the workers start.
        self._gateway = GatewayProcess(
            model=config.model,
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
        progress(f"loading {self._config.model}")
        told = (0, 0)

        def tell() -> None:
            nonlocal told
            done_total = self._ask(self._controller.loading.remote(), "the controller", START_DEADLINE_S)
            if done_total != told and done_total[1]:
                told = done_total
                progress(f"loading {self._config.model}: {told[0]} of {told[1]} tensors")

        loading = self._controller.load.remote()
        return self._ask(loading, "the controller", LOAD_DEADLINE_S + MARGIN_S, meanwhile=tell)

    def _ask(
        self, call: Any, who: str, deadline_s: float, *, meanwhile: Callable[[], None] = lambda: None
    ) -> Any:
        """The result, or the FarshoreError it ended with; Ray's own errors become StartupError."""
        until_s = time.monotonic() + deadline_s
        while not ray.wait([call], timeout=POLL_S)[0]:
            self._check_processes()
            if time.monotonic() > until_s:
                raise StartupError(f"{who} did not answer within {deadline_s:.0f} s: see Ray's logs")
            meanwhile()
        try:
            return ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FarshoreError):
                raise error.cause from None
            raise StartupError(f"{who} failed: {error.cause or error}") from error
        except ray.exceptions.RayActorError as error:
            raise StartupError(f"{who} {how_an_actor_ended(error)}") from error
        except ray.exceptions.RayError as error:
            raise StartupError(f"{who} did not answer: {error}") from error

    def _check_processes(self) -> None:
        """Raises ProcessEnded for what the driver started itself."""
        gone = self._ray.ended() or (self._gateway.ended() if self._gateway else None)
        if gone:
            raise ProcessEnded(gone)

    def _ended(self, asked: Any) -> list[Ended]:
        try:
            return ray.get(asked)
        except ray.exceptions.RayActorError as error:
            raise ProcessEnded(f"the controller {how_an_actor_ended(error)}") from error


def _anywhere(config: ClusterConfig) -> ClusterConfig:
    """Workers run in other directories: a relative path of the user's becomes an absolute one."""
    path = Path(config.model).expanduser()
    if config.model == DEMO or not path.exists():
        return config
    return replace(config, model=str(path.absolute()))
