"""The real `farshore` command, as a user runs it, and the proof that it leaves nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "farshore"
REPOSITORY = Path(__file__).parents[2]
START_DEADLINE_S = 180.0
END_DEADLINE_S = 60.0
MARK = "FARSHORE_TEST_MARK"


class Marked:
    """Runs commands whose every descendant can be found again: they inherit a variable."""

    def __init__(self):
        self.mark = uuid.uuid4().hex
        # Without what would hide a mistake: our own Ray must be private whatever is set, or not.
        unset = ("PYTHONSAFEPATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        # From the checkout, where our own folders lie in wait for a sys.path with the current directory.
        self._options = {"env": environment | {MARK: self.mark}, "cwd": REPOSITORY, "text": True}
        self._shared_memory = _shared_memory()

    def run(self, *arguments):
        return subprocess.run(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_DEADLINE_S,
            **self._options,
        )

    def set_environment(self, **variables):
        """For the commands to come."""
        self._options["env"] |= variables

    def start(self, *arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return Background(subprocess.Popen([COMMAND, *arguments], **pipes, **self._options))

    def check_nothing_left(self):
        """No process and no shared-memory file."""
        _await_none(lambda: self._processes() + sorted(_shared_memory() - self._shared_memory))

    def check_gone(self, process_ids):
        """For processes that somebody else started for us: they carry no mark."""
        _await_none(lambda: [pid for pid in process_ids if Path(f"/proc/{pid}").exists()])

    def _processes(self):
        variable = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if variable in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return [command for command in found if command]


class Background:
    """A command that runs on; its output is collected line by line."""

    def __init__(self, process):
        self.process = process
        self.out, self.err = _Lines(process.stdout), _Lines(process.stderr)

    def end(self, number):
        """Send a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(END_DEADLINE_S)


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
    """The kernel may take a moment to bury what was killed."""
    deadline = time.monotonic() + END_DEADLINE_S
    while (left := leftovers()) and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    assert not left


def _shared_memory():
    return {str(path) for path in Path("/dev/shm").iterdir()}


@pytest.fixture
def ray_address():
    """A Ray that another user keeps running, with auth off; ask for it before `marked`, whose leftovers it is
    not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--head", "--block", "--include-dashboard=false", "--object-store-memory=80000000"]
    head = Background(
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *options, "--port", port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
            cwd=COMMAND.parent,
        )
    )
    head.out.await_match("Ray runtime started")
    yield f"127.0.0.1:{port}"
    running = head.process.poll() is None
    head.end(signal.SIGTERM)
    assert running


@pytest.fixture
def marked():
    made = Marked()
    yield made
    made.check_nothing_left()


@pytest.fixture
def serve(marked):
    """serve(option, …) -> (the running command, its gateway's address); ended by SIGTERM if it still runs."""
    started = []

    def start(*options):
        server = marked.start("serve", "--port", "0", *options)
        started.append(server)
        return server, server.out.await_match(r"serves \S+ at (\S+)")[1]

    yield start
    for server in started:
        if server.process.poll() is None:
            assert server.end(signal.SIGTERM) == 0
