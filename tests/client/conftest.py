"""Fixtures for the SDK and the command line; harness, served and loop_thread are in tests/conftest.py."""

import codecs
import contextlib
import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
from types import ModuleType, SimpleNamespace

import pytest

from farshore.client.cli.main import main
from farshore.controller.config import ClusterConfig


@pytest.fixture
def gateway(harness, loop_thread, served):
    """gateway(…) -> a Harness with a gateway and an engine of its own. Stopped after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(harness.gateway(loop_thread, served, **options))


@pytest.fixture
def farshore(gateway):
    """A Harness: a gateway and its engine."""
    return gateway()


@pytest.fixture
def absent():
    """An address where nothing listens: its port is bound, so that no other process can use it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def run(capsys):
    """run("generate", …) -> code, out and err of the command, which runs in this process."""

    def run_command(*arguments):
        code = main(list(arguments))
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


class FakeCluster:
    """Replaces driver.cluster.Cluster in tests of options. Records its configuration and starts nothing;
    its methods may be called only in the states in which the real ones may.

    Real clusters are tested in tests/controller.
    """

    def __init__(self, address):
        self.address = address
        self.endpoints = {"gateway": address, "attention-0": "127.0.0.1:7"}
        self.notices = []
        self.goes_on = ""
        self.given = None
        self.config = None
        self.stops = 0
        self.shortened = False
        self.on_start = lambda: None
        self.on_wait = lambda warn: None
        self.on_reconfigure = lambda config: None
        self._running = False

    def start(self, config, *, given=(), has_gateway=True, progress):
        assert isinstance(config, ClusterConfig) and not self._running
        self.config, self.given, self.has_gateway = config, given, has_gateway
        progress("starting workers")
        self.on_start()
        self._running = True
        return self

    def reconfigure(self, config, given):
        assert isinstance(config, ClusterConfig) and self._running
        self.on_reconfigure(config)
        self.config, self.given = config, given

    def wait(self, *, warn, meanwhile=lambda: None):
        """Always raises; the real one returns when it is stopped."""
        assert self._running
        self.on_wait(warn)
        meanwhile()
        raise KeyboardInterrupt

    def end_now(self):
        self.shortened = True

    def __enter__(self):
        assert self._running
        return self

    def __exit__(self, *_):
        self._running = False
        self.stops += 1


@pytest.fixture
def cluster(monkeypatch):
    """The FakeCluster that the commands start. The test may set its address."""
    fake = FakeCluster("127.0.0.1:1")
    module = ModuleType("farshore.controller.driver.cluster")
    module.Cluster = fake
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


@pytest.fixture
def nothing_listens(monkeypatch):
    """Makes the default address one where nothing listens, even if a gateway runs on this machine."""
    monkeypatch.setattr("farshore.client.cli.connect.DEFAULT_SERVER", "127.0.0.1:1")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Commands see a terminal that knows escape sequences, whatever runs the tests."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "INPUTRC", "LC_ALL", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)


COMMAND = (sys.executable, "-P", "-m", "farshore.client.cli.main")
WAIT_S = 60


@pytest.fixture
def process():
    """process("generate", …, stdin=b"…", LC_ALL="C") -> the CompletedProcess, with bytes. Its output is
    piped. Capital names set variables of the environment."""

    def run_process(*arguments, stdin=b"", **variables):
        return subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            timeout=WAIT_S,
            env=os.environ | variables,
        )

    return run_process


class TerminalProcess:
    """A command on a terminal of its own, which is also its controlling terminal."""

    _START = (
        "import fcntl, runpy, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "sys.argv[0] = 'farshore'\n"
        "runpy.run_module('farshore.client.cli.main', run_name='__main__')"
    )

    def __init__(self, arguments, variables, rows=24, columns=100):
        self._master, slave = pty.openpty()
        self.resize(rows, columns)
        self.settings = termios.tcgetattr(self._master)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", self._START, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"INPUTRC": os.devnull} | variables,
        )
        os.close(slave)
        self._written, self._read, self._ended = "", 0, False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self):
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # Linux's end of a terminal that no process has open.
                data = b""
            with self._more:
                self._written += decode(data)
                self._ended = not data
                self._more.notify_all()
            if not data:
                return

    def expect(self, text, wait_s=WAIT_S):
        """Waits until ``text`` is written, after what was expected before. Returns what came before it."""
        with self._more:
            self._more.wait_for(lambda: text in self._written[self._read :] or self._ended, wait_s)
            before, found, _ = self._written[self._read :].partition(text)
            assert found, f"{text!r} did not come: {before!r}"
            self._read += len(before) + len(text)
            return before

    def send(self, text):
        os.write(self._master, text.encode())

    def resize(self, rows, columns):
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def settings_now(self):
        return termios.tcgetattr(self._master)

    def end(self):
        """Waits until the command has ended. Returns its exit code, and what was not expected yet."""
        self._reader.join(WAIT_S)
        return self.process.wait(WAIT_S), self._written[self._read :]

    def close(self):
        self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        os.close(self._master)


@pytest.fixture
def terminal():
    """terminal("chat", …, NO_COLOR="1") -> a TerminalProcess, killed after the test."""
    started = []

    def start(*arguments, **variables):
        started.append(TerminalProcess(arguments, variables))
        return started[-1]

    yield start
    for each in started:
        each.close()
