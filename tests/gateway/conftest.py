import importlib.util
import sys
from pathlib import Path

import pytest

from farshore.gateway.served import Served


def _load_harness():
    # Test folders are no packages and not on sys.path (import-mode importlib): load the helper by its path.
    name = "farshore_gateway_harness"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("harness.py"))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def harness():
    """The module harness.py."""
    return _load_harness()


@pytest.fixture(scope="session")
def served():
    return Served.load("smollm2")


@pytest.fixture(scope="session")
def loop_thread(harness):
    thread = harness.LoopThread()
    yield thread
    thread.stop()


@pytest.fixture
def start(harness, loop_thread, served):
    """``start(limits=…)`` starts a gateway with its own engine; all are stopped after the test."""
    with harness.contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(harness.gateway(loop_thread, served, **options))


@pytest.fixture
def farshore(start):
    return start()


@pytest.fixture
def engines(harness):
    """``engines(port)`` starts one; all are killed after the test."""
    started = []

    def start(port=0):
        started.append(harness.EngineProcess(port))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()
