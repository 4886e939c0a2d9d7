"""The gateway follows the engine that the directory lists, and keeps the last one while that is away."""

import threading
import time

import pytest

from farshore import rpc
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

DEADLINE_S = 60.0


@pytest.fixture
def directory():
    """(an EmbeddedDirectory, its address, a function that ends its service)"""
    made = EmbeddedDirectory()
    server, address = rpc.serve(
        lambda server: pb_grpc.add_DirectoryServicer_to_server(DirectoryService(made), server),
        service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
        listen="127.0.0.1:0",
        threads=2,
        token=None,
    )
    yield made, address, lambda: server.stop(0).wait()
    server.stop(0).wait()


def listed(directory, name, address, *, state="serving"):
    directory.renew(
        WorkerRecord(
            worker=WorkerId(name),
            kind="dense",
            slot="dense-0",
            address=address,
            host="127.0.0.1",
            process_id=1,
            state=state,
        )
    )


def await_move(farshore, engine):
    """Waits until the gateway sends new requests to ``engine``, an EngineProcess."""
    end_s = time.monotonic() + DEADLINE_S
    while farshore.gateway._engine.address != engine.address:
        assert time.monotonic() < end_s
        threading.Event().wait(0.02)


def test_requests_go_to_the_listed_engine(start, engines, directory, monkeypatch):
    monkeypatch.setattr("farshore.gateway.engines.discovery.PERIOD_S", 0.05)
    embedded, address, end = directory
    first, second = engines(), engines()
    farshore = start(engine_address=first.address, controller=address)
    first.tell("finish")
    assert len(list(farshore.generate())) == 3
    listed(embedded, "dense-0-b", second.address, state="loading")
    listed(embedded, "dense-0-c", second.address)
    await_move(farshore, second)
    second.tell("finish")
    assert len(list(farshore.generate())) == 3
    end()
    first.kill()
    assert len(list(farshore.generate())) == 3  # The last known engine serves without the directory.
