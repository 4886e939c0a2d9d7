import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from farshore.client.cli.main import main
from farshore.controller.config import ClusterConfig
from farshore.gateway.served import Served


@pytest.fixture(scope="session")
def harness():
    """tests/gateway/harness.py: a real gateway in this process, over an engine that does as it is told."""
    name = "farshore_gateway_harness"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "gateway" / "harness.py"
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def served():
    return Served.load("smollm2")


@pytest.fixture(scope="session")
def loop_thread(harness):
    thread = harness.LoopThread()
    yield thread
    thread.stop()


@pytest.fixture
def farshore(harness, loop_thread, served):
    with harness.gateway(loop_thread, served) as running:
        yield running


@pytest.fixture
def run(capsys):
    """``run("generate", …)``: exit code, stdout and stderr of the command."""

    def run_command(*arguments):
        code = main(list(arguments))
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


class FakeCluster:
    """Stands in for controller.cluster.Cluster where options are tested: remembers what was asked of it,
    starts nothing, and is as strict as the real one about when it may be used.

    What a cluster does is tested with real ones: tests/controller.
    """

    def __init__(self, address):
        self.address = address
        self.endpoints = {"gateway": address, "attention-0": "127.0.0.1:7"}
        self.config = None
        self.stops = 0
        self.on_start = lambda: None
        self.on_wait = lambda warn: None
        self._running = False

    def start(self, config, *, progress):
        assert isinstance(config, ClusterConfig) and not self._running
        self.config = config
        progress("starting workers")
        self.on_start()
        self._running = True
        return self

    def wait(self, *, warn):
        """The real one returns when it is stopped, and else raises."""
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
    """The commands start this one; its address is the test's to set."""
    fake = FakeCluster("127.0.0.1:1")
    module = ModuleType("farshore.controller.cluster")
    module.Cluster = fake
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


@pytest.fixture
def nothing_listens(monkeypatch):
    """Whatever else runs on this machine: no gateway at the default address."""
    monkeypatch.setattr("farshore.client.cli.generate.DEFAULT_SERVER", "127.0.0.1:1")
