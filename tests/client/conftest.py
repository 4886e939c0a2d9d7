"""Fixtures for the SDK and the command line; harness, served and loop_thread are in tests/conftest.py."""

import contextlib
import socket
import sys
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
        self.on_start = lambda: None
        self.on_wait = lambda warn: None
        self._running = False

    def start(self, config, *, given=(), progress):
        assert isinstance(config, ClusterConfig) and not self._running
        self.config, self.given = config, given
        progress("starting workers")
        self.on_start()
        self._running = True
        return self

    def wait(self, *, warn):
        """Always raises; the real one returns when it is stopped."""
        assert self._running
        self.on_wait(warn)
        raise KeyboardInterrupt

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
    monkeypatch.setattr("farshore.client.cli.generate.DEFAULT_SERVER", "127.0.0.1:1")
