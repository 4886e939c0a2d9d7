"""The probes over real gRPC services of workers, in this process."""

import threading
from types import SimpleNamespace

import pytest

from farshore import rpc
from farshore.controller.loop.probes import WorkerProbes
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.proto import admin_pb2 as admin
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

from ...waiting import until

DENSE, SHARD = WorkerId("dense-0-aa"), WorkerId("attention-0-aa")
ABSENT = "127.0.0.1:1"


class Engine(pb_grpc.EngineServicer):
    """Counts the calls of Status, which wait while it is ``busy``."""

    def __init__(self):
        self.asked = 0
        self.is_free = threading.Event()
        self.is_free.set()
        self.readers = 1

    def Status(self, request, context):
        self.asked += 1
        self.is_free.wait(60)
        return pb.EngineStatus(
            worker=admin.WorkerStatus(worker_id=DENSE), readers={SHARD: self.readers}, shards={SHARD: True}
        )


@pytest.fixture
def engine(serve_engine):
    """An engine with one call slot."""
    made = serve_engine(Engine(), threads=1)
    yield made
    made.is_free.set()


@pytest.fixture
def directory():
    return EmbeddedDirectory()


@pytest.fixture
def clock():
    """Stands still unless the test changes ``now_s``."""
    return SimpleNamespace(now_s=0.0)


@pytest.fixture(autouse=True)
def often_and_patient(monkeypatch):
    """Probes follow one another quickly, and wait as long as a busy machine takes."""
    monkeypatch.setattr("farshore.controller.loop.probes.PERIOD_S", 0.02)
    monkeypatch.setattr("farshore.controller.loop.probes.DEADLINE_S", 60.0)


@pytest.fixture
def probes(directory, clock):
    made = WorkerProbes(directory, clock=lambda: clock.now_s)
    yield made
    made.stop()


def record(address):
    return WorkerRecord(
        worker=DENSE,
        kind="dense",
        slot="dense-0",
        address=address,
        host="127.0.0.1",
        process_id=1,
        state="serving",
    )


def test_a_worker_whose_call_slots_are_taken_is_not_silent(probes, engine, clock):
    suspects = {DENSE: engine.address, SHARD: ABSENT}
    engine.is_free.clear()
    with rpc.channel(engine.address, None) as channel:
        request = pb.EngineStatusRequest()
        pending = pb_grpc.EngineStub(channel).Status.future(request, wait_for_ready=True)
        until(lambda: engine.asked)
        clock.now_s = 1.0
        probes.silent_s(suspects)

        def silent():
            clock.now_s += 1.0
            return probes.silent_s(suspects)[SHARD] >= 5.0

        until(silent)
        assert probes.silent_s(suspects)[DENSE] == 0.0
        engine.is_free.set()
        assert pending.result(60)


def test_an_engine_that_is_not_listed_is_asked_at_its_last_address(probes, engine):
    known = {DENSE: engine.address}
    assert probes.readers(known) is None
    until(lambda: probes.readers(known))
    assert probes.readers(known) == {SHARD: 1, DENSE: 0}
    # Another one that does not answer may read, too.
    known = {DENSE: engine.address, WorkerId("dense-1-aa"): ABSENT}
    assert probes.readers(known) is None
    asked = engine.asked
    until(lambda: engine.asked > asked + 1)
    assert probes.readers(known) is None


class Newer(EmbeddedDirectory):
    """A directory whose records this version can't read, until it is told."""

    is_newer = True
    looks = 0

    def listing(self):
        self.looks += 1
        if self.is_newer:
            raise KeyError("a state of a newer version")
        return super().listing()


@pytest.fixture
def newer():
    return Newer()


def test_an_answer_of_another_version_ends_no_probe(newer, engine, clock, caplog):
    newer.renew(record(engine.address))
    probes = WorkerProbes(newer, clock=lambda: clock.now_s)
    try:
        until(lambda: newer.looks > 2)
        clock.now_s += 100.0
        assert probes.silent_s({SHARD: ABSENT}) == {SHARD: 0.0} and probes.readers({}) is None
        newer.is_newer = False
        until(lambda: probes.readers({}))
        assert [entry.message for entry in caplog.records] == [
            "the workers' answers make no sense; they are asked again"
        ]
    finally:
        probes.stop()


def test_connections_to_workers_that_are_gone_are_closed(probes, directory, engine):
    directory.renew(record(engine.address))
    until(lambda: probes.readers({}))
    assert probes._channels.keys() == {engine.address}
    directory.withdraw(DENSE)
    probes.silent_s({SHARD: ABSENT})
    until(lambda: probes._channels.keys() == {ABSENT})
