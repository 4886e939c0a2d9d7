"""Fixtures that run the installed `farshore` command, and check that it leaves no process behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from functools import cache
from pathlib import Path

import psutil
import pytest

from farshore.cluster_token import VARIABLE, ClusterToken
from farshore.controller.launch.ray_settings import QUICK_VERDICT
from farshore.controller.listen import free_port

COMMAND = Path(sys.executable).parent / "farshore"
REPOSITORY = Path(__file__).parents[2]
START_DEADLINE_S = 300.0
END_DEADLINE_S = 180.0
MARK = "FARSHORE_TEST_MARK"


@cache
def token_folder():
    """A folder with the token of the Rays that tests start, and of the clusters that join them."""
    return tempfile.TemporaryDirectory(prefix="farshore-tests-")


def token_file():
    path = Path(token_folder().name) / "token"
    if not path.exists():
        ClusterToken.make(path)
    return str(path)


class Marked:
    """Runs commands and finds their descendants, which inherit an environment variable. A command that joins
    a Ray gets the token of :func:`token_file`."""

    def __init__(self, state_home):
        """``state_home``: where clusters on a Ray that they join keep their state."""
        self.mark = uuid.uuid4().hex
        # Unset, since a private Ray must be private without these variables, too.
        unset = ("PYTHONSAFEPATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", VARIABLE)
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        # In the checkout, whose folders would be imported if the current directory were on sys.path.
        environment |= {MARK: self.mark, "XDG_STATE_HOME": state_home}
        self._options = {"env": environment, "cwd": REPOSITORY, "text": True}
        self._started = []
        self._shared_memory = _shared_memory()

    def run(self, *arguments):
        return subprocess.run(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_DEADLINE_S,
            **self._options_of(arguments),
        )

    def set_environment(self, **variables):
        """Sets variables of the commands that are started later."""
        self._options["env"] |= variables

    def start(self, *arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([COMMAND, *arguments], **pipes, **self._options_of(arguments))
        self._started.append(Background(process))
        return self._started[-1]

    def _options_of(self, arguments):
        """The options of the process; a command that joins a Ray gets the token of the tests' Rays."""
        options = dict(self._options)
        if "--ray-address" in arguments:
            options["env"] = {VARIABLE: token_file()} | options["env"]
        return options

    def check_nothing_left(self):
        """Asserts that no marked process and no new shared-memory file remains."""
        _await_none(lambda: [*self._processes().values(), *sorted(_shared_memory() - self._shared_memory)])

    def check_gone(self, process_ids):
        """Asserts that these processes have ended. For processes without the mark, such as a joined Ray's."""
        _await_none(lambda: [pid for pid in process_ids if Path(f"/proc/{pid}").exists()])

    def close(self):
        """Kills what a test that failed has left, which would disturb the next ones."""
        for server in self._started:
            server.kill()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self):
        """Process id -> command line of each marked process."""
        variable = f"{MARK}={self.mark}".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if variable in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return {pid: command for pid, command in found.items() if command}


class Background:
    """A command in the background; its output is collected line by line."""

    def __init__(self, process):
        self.process = process
        self.out, self.err = _Lines(process.stdout), _Lines(process.stderr)

    def end(self, number):
        """Sends a signal and waits for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(END_DEADLINE_S)

    def kill(self):
        """Ends it by force. Idempotent."""
        self.process.kill()
        self.process.wait()


class _Lines:
    def __init__(self, stream):
        self._seen, self._more = [], threading.Condition()
        self._closed = False
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def await_match(self, pattern):
        with self._more:
            self._more.wait_for(lambda: self._closed or self._find(pattern), START_DEADLINE_S)
            found = self._find(pattern)
        assert found, f"{pattern!r} is not in {self._seen}"
        return found

    def find(self, pattern):
        """The match in the lines so far, or None."""
        with self._more:
            return self._find(pattern)

    def _find(self, pattern):
        return next((m for line in self._seen if (m := re.search(pattern, line))), None)

    def _read(self, stream):
        with stream:
            for line in stream:
                with self._more:
                    self._seen.append(line)
                    self._more.notify_all()
        with self._more:
            self._closed = True
            self._more.notify_all()


def _await_none(leftovers):
    """Waits until there are none: a killed process may need a moment to disappear."""
    deadline = time.monotonic() + END_DEADLINE_S
    while (left := leftovers()) and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    assert not left


def _shared_memory():
    return {str(path) for path in Path("/dev/shm").iterdir()}


@contextlib.contextmanager
def ray_node(*options):
    """A Ray node as a Background, which has started, and which ends with the context. It declares nothing of
    what it takes: see test_three_nodes for nodes that do."""
    options = ("--block", "--object-store-memory=80000000", *options)
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    # At SIGTERM a node with work would wait 30 s for its end, and no test needs that.
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    # Gauges appear after this time, 10 s by default.
    environment["RAY_metrics_report_interval_ms"] = "1000"
    environment["RAY_AUTH_TOKEN_PATH"] = token_file()
    node = Background(
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | QUICK_VERDICT | environment,
            cwd=COMMAND.parent,
        )
    )
    try:
        node.out.await_match("Ray runtime started")
        yield node
        if node.process.poll() is None:
            node.end(signal.SIGTERM)
    finally:
        if node.process.poll() is None:
            kill_all(node.process.pid)
            node.process.wait()


def kill_all(pid):
    """Kills a process and all its descendants at once."""
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            each.kill()


@contextlib.contextmanager
def ray_head():
    """The address of a Ray of one node, with :func:`token_file`. It must run until the end."""
    port = free_port("127.0.0.1")
    with ray_node("--head", "--include-dashboard=false", "--port", str(port)) as head:
        yield f"127.0.0.1:{port}"
        assert head.process.poll() is None


@pytest.fixture
def ray_address():
    """Address of a Ray that runs on, with :func:`token_file`. Request this fixture before `marked`, so that
    its processes are not checked as leftovers."""
    with ray_head() as address:
        yield address


@pytest.fixture
def start_ray():
    """start_ray() -> (the address of a Ray with this process's environment, its token's file). Request this
    fixture after `marked`, so that it has ended when leftovers are checked."""
    with contextlib.ExitStack() as heads:
        yield lambda: (heads.enter_context(ray_head()), token_file())


@pytest.fixture
def two_nodes():
    """(address of a Ray, the Background of its second node, the second's metrics port): 127.0.0.2 and
    127.0.0.3 of this machine."""
    port, metrics_port = free_port("127.0.0.2"), free_port("0.0.0.0")
    address = f"127.0.0.2:{port}"
    common = ("--memory", str(5 << 30), "--num-cpus", "2")
    first = ("--head", "--include-dashboard=false", "--node-ip-address=127.0.0.2", "--port", str(port))
    second = ("--address", address, "--node-ip-address=127.0.0.3")
    second += (f"--metrics-export-port={metrics_port}", "--min-worker-port=19000", "--max-worker-port=19999")
    with ray_node(*first, *common, "--max-worker-port=18999"), ray_node(*second, *common) as node:
        yield address, node, metrics_port


@pytest.fixture
def marked(tmp_path):
    """A Marked, which is checked for leftovers after the test."""
    made = Marked(str(tmp_path / "state"))
    try:
        yield made
        made.check_nothing_left()
    finally:
        made.close()


@pytest.fixture
def serve(marked):
    """serve(option, …) -> (the running command, its gateway's address). Ended by SIGTERM after the test."""
    started = []

    def start(*options):
        server = marked.start("serve", "--port", "0", *options)
        started.append(server)
        # Its end without an address is an error of its own, which tells why.
        server.err.await_match("starting the gateway|farshore: error: .*")
        assert (found := server.err.find("farshore: error: .*")) is None, found[0]
        return server, server.out.await_match(r"serves \S+ at (\S+)")[1]

    yield start
    for server in started:
        if server.process.poll() is None:
            assert server.end(signal.SIGTERM) == 0
