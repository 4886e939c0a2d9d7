"""Ray as the driver uses it: started for one cluster and on this machine alone, or joined and left running.

Used by ``cluster``. Must not know what runs on it.

A Ray of our own listens on the loopback device alone and answers only to a token that is made for it: a
client that may start actors runs any code as this user. A joined Ray is what its owner made it: the
environment's settings are obeyed, and it is never ended. A Ray that the program uses already is left alone:
a process has one Ray, so no cluster is started there.
"""

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Read by Ray when it is imported or started.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray starts its workers at niceness 15: an engine then gets 3% of a core that anything else wants. A gateway
# that tokenized long prompts stopped every answer for two seconds.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray

# isort: split
# Ray's own copy, which importing Ray puts on sys.path.
import psutil
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config

from farshore.controller.exits import how_it_ended
from farshore.errors import StartupError

OBJECT_STORE_BYTES = 80 << 20
"""KV and frames never pass through Ray's object store: the least that Ray allows, not its 30% of memory."""

ESSENTIAL = {"raylet": "Ray's raylet", "gcs_server": "Ray's GCS"}
"""Without one of these Ray places nothing and notices no end; its other processes only show and log."""

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
END_DEADLINE_S = 2.0
"""For Ray's processes to end by themselves when they are to; the rest is killed."""


class RayRuntime:
    """:meth:`start`, then :meth:`stop`; one in a process at a time."""

    def __init__(self, address: str | None, *, dashboard: bool) -> None:
        """``address``: join the Ray there; None: start one."""
        self._address = address
        self._dashboard = dashboard
        self._connected = False
        self._private: Path | None = None  # the folder of our token, while we have a Ray of our own
        self._processes: set[psutil.Process] = set()

    def start(self) -> None:
        """Raises StartupError, with what is to be done. Nothing runs on then that did not before."""
        if ray.is_initialized():
            raise StartupError(
                "this program uses Ray already, and a process has one Ray: run `farshore serve` as a command"
                " of its own (with --ray-address to run on the same Ray), or call ray.shutdown() first"
            )
        if self._address is None:
            self._start_own()
        else:
            fix = f"check --ray-address {self._address}, that Ray runs there, and RAY_AUTH_MODE and its token"
            self._init({"address": self._address}, fix)

    def ended(self) -> str | None:
        """What has ended of a Ray of our own, and how; None while it lives. Of a joined one nothing is known
        but what becomes of the actors on it."""
        if self._private is None or not self._connected:
            return None
        for kind, process in ray._private.worker._global_node.dead_processes():
            if kind in ESSENTIAL:
                return f"{ESSENTIAL[kind]} (process {process.pid}) {how_it_ended(process.returncode)}"
        return None

    def note_processes(self) -> None:
        """Call it when everything has started: what a process leaves when it dies can't be found later."""
        node = ray._private.worker._global_node
        if self._private is not None and node is not None:
            self._processes |= _family(node)

    def stop(self) -> None:
        """End what :meth:`start` started, and nothing else. Idempotent."""
        if self._connected:
            self.note_processes()
            ray.shutdown()
            _bury(self._processes)
            self._processes.clear()
            self._connected = False
            _reread()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    def _start_own(self) -> None:
        self._private = Path(tempfile.mkdtemp(prefix="farshore-"))  # mode 0700
        token = self._private / "token"
        descriptor = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        options = {
            "address": "local",
            "include_dashboard": self._dashboard,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        # Only Ray's processes get these, as they start: this program's own children, and a Ray that it starts
        # later, do not.
        secured = {"RAY_AUTH_MODE": "token", TOKEN_PATH: str(token), "RAY_AUTH_TOKEN": None}
        try:
            with _environment(secured), _loopback_only():
                self._init(options, "see Ray's log under /tmp/ray")
        except BaseException:
            self.stop()
            raise

    def _init(self, options: Mapping[str, Any], fix: str) -> None:
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            # Ray puts the current directory first on its workers' sys.path: in a checkout, our own folders
            # would hide the installed package. The interpreter's holds no modules.
            with contextlib.chdir(Path(sys.executable).parent):
                self._connected = True  # in part, even where it fails
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
            if on_term is not None and threading.current_thread() is threading.main_thread():
                # Ray's handler would abort the process 3 s later, in the middle of cleaning up.
                signal.signal(signal.SIGTERM, on_term)
        except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self.stop()
            # Its first line says what; some of the rest is pages long.
            why = str(error).strip().partition("\n")[0]
            raise StartupError(f"Ray did not start ({why}): {fix}") from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set these (None: unset) meanwhile. Ray's core remembers what it reads, and reads it again at once."""
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
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray's processes listen on loopback alone where the node's address is 127.0.0.1. On Linux Ray replaces
    that by the network's address, unless clusters of several nodes are off, as they are on other systems."""
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


def _family(node: Any) -> set[psutil.Process]:
    """Ray's own processes and all that these started."""
    found: set[psutil.Process] = set()
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(info.process.pid)
                found |= {process, *process.children(recursive=True)}
    return found


def _bury(processes: set[psutil.Process]) -> None:
    """Ray's agents outlive a GCS that was killed, and frozen workers their raylet."""
    _, alive = psutil.wait_procs(processes, timeout=END_DEADLINE_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=END_DEADLINE_S)
