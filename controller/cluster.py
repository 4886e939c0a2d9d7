"""A cluster as its driver sees it: everything `farshore serve` starts, in order, and ends in reverse.

The embedded cluster of `farshore generate` is the same thing for one call.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Read by Ray when it is imported or started; set here, once, for the driver and everything it starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from farshore.controller.actor import ControllerActor
from farshore.controller.config import ClusterConfig
from farshore.controller.gateway_process import GatewayProcess
from farshore.errors import FarshoreError, PortInUse, StartupError
from farshore.models.config import ModelConfig, load_config
from farshore.models.source import DEMO, resolve

OBJECT_STORE_BYTES = 80 << 20
"""KV and frames never pass through Ray's object store: the least that Ray allows, not its 30% of memory."""

POLL_S = 0.5
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0


class Cluster:
    """Use :meth:`start`. ``address`` is the gateway's; ``endpoints`` names every part's."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._own_ray = False
        self._controller: Any = None
        self._gateway: GatewayProcess | None = None
        self._stopped = threading.Event()
        self.endpoints: dict[str, str] = {}
        self.address = ""

    @classmethod
    def start(cls, config: ClusterConfig, *, progress: Callable[[str], None]) -> Self:
        """Start everything, or nothing: on any error what was started is ended again.

        Raises ModelError, PortInUse, StartupError; ``progress`` is told each stage in a few words.
        """
        _check_port(config)
        model = load_config(resolve(config.model))
        cluster = cls(config)
        try:
            cluster._start(model, progress)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def wait(self) -> None:
        """Block until :meth:`stop`, or raise FarshoreError when a part that cannot be missed has died."""
        while not self._stopped.wait(POLL_S):
            code = self._gateway.exit_code() if self._gateway else None
            if code is not None:
                raise StartupError(f"the gateway ended with code {code}")

    def stop(self) -> None:
        """End everything this cluster started. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._gateway is not None:
            self._gateway.stop()
        if self._controller is not None:
            # Dead or stuck: killing it, and Ray's own end below, leaves nothing running either.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._controller.stop.remote(), timeout=STOP_DEADLINE_S)
            ray.kill(self._controller)
        if ray.is_initialized():
            ray.shutdown()

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
        self._start_ray()
        progress("starting the controller")
        # One thread for place and load, one to be asked how far they are, one to stop it all.
        controller_actor = ray.remote(ControllerActor).options(num_cpus=0, max_concurrency=3)
        self._controller = controller_actor.remote(_anywhere(config), model)
        controller = self._ask(self._controller.address.remote(), "the controller")
        # It reads its tokenizer while the workers start.
        self._gateway = GatewayProcess(
            model=config.model, listen=f"{config.host}:{config.port}", controller=controller
        )
        progress(f"starting {config.attention_workers} attention workers")
        attention = self._ask(self._controller.place.remote(), "the attention workers")
        dense = self._load(progress)
        progress("starting the gateway")
        self.address = self._gateway.serve(engine=next(iter(dense.values())))
        self.endpoints = {"gateway": self.address, "controller": controller, **dense, **attention}

    def _start_ray(self) -> None:
        config = self._config
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if config.ray_address:
            options["address"] = config.ray_address
        else:
            options |= {
                "address": "local",
                "include_dashboard": config.dashboard,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            # Ray puts the current directory first on its workers' sys.path: in a checkout, our own folders
            # would hide the installed package. The interpreter's holds no modules.
            with contextlib.chdir(Path(sys.executable).parent):
                ray.init(**options)
            if on_term is not None and threading.current_thread() is threading.main_thread():
                # Ray's handler would abort the process 3 s later, in the middle of cleaning up.
                signal.signal(signal.SIGTERM, on_term)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            fix = "check --ray-address" if config.ray_address else "see Ray's log under /tmp/ray"
            raise StartupError(f"Ray did not start ({error}): {fix}") from error

    def _load(self, progress: Callable[[str], None]) -> dict[str, str]:
        progress(f"loading {self._config.model}")
        loading = self._controller.load.remote()
        told = (0, 0)
        while not ray.wait([loading], timeout=POLL_S)[0]:
            done_total = self._ask(self._controller.loading.remote(), "the dense worker")
            if done_total != told and done_total[1]:
                told = done_total
                progress(f"loading {self._config.model}: {told[0]} of {told[1]} tensors")
        return self._ask(loading, "the dense worker")

    def _ask(self, reference: Any, who: str) -> Any:
        """The result, or the FarshoreError it ended with; Ray's own errors become StartupError."""
        try:
            return ray.get(reference, timeout=START_DEADLINE_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FarshoreError):
                raise error.cause from None
            raise StartupError(f"{who} failed: {error.cause or error}") from error
        except ray.exceptions.RayError as error:
            raise StartupError(f"{who} did not answer: {error}") from error


def _anywhere(config: ClusterConfig) -> ClusterConfig:
    """Workers run in other directories: a relative path of the user's becomes an absolute one."""
    path = Path(config.model).expanduser()
    if config.model == DEMO or not path.exists():
        return config
    return replace(config, model=str(path.absolute()))


def _check_port(config: ClusterConfig) -> None:
    """Fail in a millisecond, before anything is started; the gateway's own bind has the last word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise PortInUse(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}):"
                " choose another --port, or 0"
            ) from error
