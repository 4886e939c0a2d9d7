"""Fixtures that start gateways and engine processes; harness, served and loop_thread are in
tests/conftest.py."""

import types

import pytest

from farshore import rpc
from farshore.controller.listen import free_port
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc


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
    """engines(port=None) -> an EngineProcess; None: any free port, where another one may follow it. Killed
    after the test."""
    started = []

    def start(port=None):
        started.append(harness.EngineProcess(port or free_port("127.0.0.1")))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


@pytest.fixture
def directory():
    """A real directory behind gRPC whose leases never run out: its ``embedded`` side, its ``address``, its
    ``url``, and ``stop()``."""
    embedded = EmbeddedDirectory(clock=lambda: 0.0)
    server, address = rpc.serve(
        lambda server: pb_grpc.add_DirectoryServicer_to_server(DirectoryService(embedded), server),
        service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
        listen="127.0.0.1:0",
        threads=8,
        token=None,
    )
    yield types.SimpleNamespace(
        embedded=embedded, address=address, url=f"grpc://{address}", stop=lambda: server.stop(0).wait()
    )
    server.stop(0).wait()
