"""Fixtures that start gateways and engine processes; harness, served and loop_thread are in
tests/conftest.py."""

import pytest


@pytest.fixture
def start(harness, loop_thread, served):
    """start(limits=…, …) -> a Harness with a gateway and its own engine. Stopped after the test."""
    with harness.contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(harness.gateway(loop_thread, served, **options))


@pytest.fixture
def farshore(start):
    """A Harness with default limits."""
    return start()


@pytest.fixture
def engines(harness):
    """engines(port=0) -> an EngineProcess. Killed after the test."""
    started = []

    def start(port=0):
        started.append(harness.EngineProcess(port))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()
