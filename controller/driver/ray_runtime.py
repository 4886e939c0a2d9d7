"""Starts a private Ray for one cluster, or joins a running Ray.

Used by ``cluster``. Must not know what runs on Ray.

A private Ray listens on the loopback device only and requires a token that is made for it, because a client
that may start actors can run any code as this user. A joined Ray must require a token, too; it is used as its
owner configured it, and never stopped. If the program has already connected to a Ray, no cluster is started:
a process can have only one Ray.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from farshore.controller.launch.ray_settings import ENVIRONMENT, OBJECT_STORE_BYTES

# Ray reads these when it is imported or started.
os.environ.update(ENVIRONMENT | os.environ)

import ray

# isort: split
# Ray's copy, which importing Ray puts on sys.path.
import psutil
from ray._private import ray_constants
from ray._private.utils import estimate_available_memory
from ray._raylet import AuthenticationTokenLoader, Config

from farshore.cluster_token import VARIABLE, ClusterToken
from farshore.controller.driver import ray_access
from farshore.controller.driver.reaper import Reaper
from farshore.controller.launch.exits import exit_in_words
from farshore.errors import StartupError

ESSENTIAL = {"raylet": "Ray's raylet", "gcs_server": "Ray's GCS"}
"""Ray's processes that place actors and notice their end. Its other processes only display and log."""

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""Ray counts the GPUs that this names, and sets it for each actor to the GPUs that it gives to it."""

END_DEADLINE_S = 2.0
"""How long Ray's processes may take to end before they are killed."""


class RayRuntime:
    """Call :meth:`start`, then :meth:`stop`. At most one per process at a time. Not thread-safe."""

    def __init__(
        self,
        address: str | None,
        *,
        dashboard: bool,
        token_file: str | None = None,
        worker_bytes: Mapping[str, int] | None = None,
        gpu: int | None = None,
        patience_s: float = 0.0,
    ) -> None:
        """``address``: join the Ray at this HOST:PORT; None: start a private Ray. ``token_file``: the
        cluster's token, needed to join; None: that of a private Ray, which :attr:`token_file` names.
        ``worker_bytes``: custom resource -> memory of a process that asks for 1 of it; a private Ray declares
        as many as its memory holds. ``gpu``: the only GPU of a private Ray, as an index among those that this
        process shows; None: all of these. ``patience_s``: how long to wait for a Ray to join that does not
        answer yet."""
        self._address = address
        self._token_file = token_file
        self._worker_bytes = worker_bytes or {}
        self._gpu = gpu
        self._dashboard = dashboard
        self._patience_s = patience_s
        self._connected = False
        self._private: Path | None = None  # the folder of a private Ray's token; None for a joined Ray
        self._processes: set[psutil.Process] = set()
        self._reaper: Reaper | None = None

    def start(self) -> None:
        """Starts or joins Ray. Raises StartupError with the fix; nothing that it started runs on then."""
        if ray.is_initialized():
            raise StartupError(
                "this program uses Ray already, and a process has one Ray: run `farshore serve` as a command"
                " of its own (with --ray-address to run on the same Ray), or call ray.shutdown() first"
            )
        if self._address is None:
            self._start_private()
        else:
            self._join(self._address)

    @property
    def token_file(self) -> str:
        """The file of the cluster's token. Call it after :meth:`start`."""
        return self._token_file or str(self._private_token)

    def state_folder(self, name: str, state_dir: str | None) -> Path:
        """Where the cluster ``name`` stores what a restarted controller needs: a private Ray's own folder, or
        one for this cluster of this Ray in ``state_dir``, which a joined Ray needs."""
        if self._private is not None:
            return self._private
        assert state_dir is not None, "a joined Ray's state has a folder"
        folder = Path(state_dir) / f"{name}@{ray.get_runtime_context().gcs_address}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def ended(self) -> str | None:
        """Which essential process of a private Ray ended, and how; None if all run. Always None for a joined
        Ray, whose processes are not ours to watch: the end of its actors is noticed elsewhere."""
        if self._private is None or not self._connected:
            return None
        for kind, process in ray._private.worker._global_node.dead_processes():
            if kind in ESSENTIAL:
                return f"{ESSENTIAL[kind]} (process {process.pid}) {exit_in_words(process.returncode)}"
        return None

    def note_processes(self) -> None:
        """Records the processes of a private Ray, to end them in :meth:`stop`, or after this process was
        killed. Call it when everything has started: the children of a process can't be found any more after
        it has died."""
        node = ray._private.worker._global_node
        if self._private is not None and node is not None:
            self._processes |= _family(node)
            self._reaper = self._reaper or Reaper()
            self._reaper.note(process.pid for process in self._processes)

    def stop(self) -> None:
        """Ends what :meth:`start` started, or disconnects from a joined Ray. Idempotent."""
        if self._connected:
            self.note_processes()
            ray.shutdown()
            _end(self._processes)
            self._processes.clear()
            self._connected = False
            _reread()
        if self._reaper is not None:
            self._reaper.dismiss()
            self._reaper = None
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    @property
    def _private_token(self) -> Path:
        assert self._private is not None, "no private Ray runs"
        return self._private / "token"

    def _join(self, address: str) -> None:
        assert self._token_file is not None, "a Ray is joined with a token"
        ray_access.check(address, self._token_file, patience_s=self._patience_s)
        with _environment(ray_access.settings(self._token_file)):
            self._init({"address": address}, f"check --ray-address {address}, and that Ray runs there")

    def _start_private(self) -> None:
        self._private = Path(tempfile.mkdtemp(prefix="farshore-"))  # mode 0700
        ClusterToken.make(self._private_token)
        memory_bytes = estimate_available_memory() - OBJECT_STORE_BYTES
        options = {
            "address": "local",
            "include_dashboard": self._dashboard,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_memory": memory_bytes,
            "resources": {name: memory_bytes // each for name, each in self._worker_bytes.items()},
        }
        # Set only while Ray's processes start: other children of this program, and a Ray that it starts
        # later, must not inherit them.
        secured = {
            ray_access.MODE: "token",
            ray_access.TOKEN_PATH: str(self._private_token),
            ray_access.TOKEN: None,
            VARIABLE: None,  # The workers' file is the configuration's.
        }
        if self._gpu is not None:
            secured[VISIBLE_GPUS] = visible_gpu(self._gpu, os.environ.get(VISIBLE_GPUS))
        try:
            with _environment(secured), _loopback_only():
                self._init(options, "see Ray's log under /tmp/ray")
        except BaseException:
            self.stop()
            raise

    def _init(self, options: Mapping[str, Any], fix: str) -> None:
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            # Ray puts the current directory first on its workers' sys.path. In a checkout, the repository's
            # folders would hide the installed package; the interpreter's folder contains no modules.
            with contextlib.chdir(Path(sys.executable).parent):
                # Ray prints the end of each worker's process on stdout, where answers go.
                ray._private.worker.print_to_stdstream = lambda *_, **__: None
                self._connected = True  # before the call: ray.init may connect and then fail
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
            if on_term is not None and threading.current_thread() is threading.main_thread():
                # Ray's handler would abort the process after 3 s, in the middle of cleaning up.
                signal.signal(signal.SIGTERM, on_term)
        except Exception as error:
            # Of any class: a node that takes longer than Ray waits is a plain Exception.
            self.stop()
            # The first line gives the reason; the rest may be pages long.
            why = str(error).strip().partition("\n")[0]
            raise StartupError(f"Ray did not start ({why}): {fix}") from error


def visible_gpu(index: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for one GPU alone, the one with this index where ``visible`` is in force."""
    return visible.split(",")[index] if visible else str(index)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Sets environment variables (None: unsets) for the duration of the context, and makes Ray's core, which
    caches its settings, read them again."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    _reread()
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _reread() -> None:
    """Makes Ray's core read its settings and the token from the environment again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Makes Ray's processes listen on loopback only, which they do if the node's address is 127.0.0.1. On
    Linux Ray replaces that address by the network's, unless clusters of several nodes are disabled."""
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


def _family(node: Any) -> set[psutil.Process]:
    """Ray's processes on this node and all their descendants."""
    found: set[psutil.Process] = set()
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(info.process.pid)
                found |= {process, *process.children(recursive=True)}
    return found


def _end(processes: set[psutil.Process]) -> None:
    """Waits for END_DEADLINE_S, then kills the remaining processes: Ray's agents outlive a killed GCS, and
    frozen workers outlive their raylet."""
    _, alive = psutil.wait_procs(processes, timeout=END_DEADLINE_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=END_DEADLINE_S)
