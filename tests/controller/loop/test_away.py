"""The controller goes on while its directory does not answer."""

import pytest

from farshore.controller.events import REPEATED, Events
from farshore.controller.loop.probes import WorkerProbes
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

from ...waiting import until
from .test_loop import Cluster


class Engine(pb_grpc.EngineServicer):
    readers = 1

    def Status(self, request, context):
        return pb.EngineStatus(readers={"attention-0-aa": self.readers}, shards={"attention-0-aa": True})


class Directory(EmbeddedDirectory):
    away = False

    def listing(self):
        if self.away:
            raise TransportError("the directory does not answer")
        return super().listing()


@pytest.fixture
def engine(serve_engine):
    return serve_engine(Engine(), threads=2)


def test_the_last_known_engines_are_asked(engine, monkeypatch):
    monkeypatch.setattr("farshore.controller.loop.probes.PERIOD_S", 0.02)
    directory = Directory()
    directory.renew(
        WorkerRecord(
            worker=WorkerId("dense-0-bb"),
            kind="dense",
            slot="dense-0",
            address=engine.address,
            host="127.0.0.1",
            process_id=1,
            state="serving",
        )
    )
    probes = WorkerProbes(directory, token=None)
    try:
        until(lambda: (probes.readers({}) or {}).get("attention-0-aa") == 1)
        directory.away, engine.readers = True, 2
        until(lambda: (probes.readers({}) or {}).get("attention-0-aa") == 2)
    finally:
        probes.stop()


def test_the_loop_says_once_that_the_directory_is_away(monkeypatch):
    monkeypatch.setattr("farshore.controller.loop.loop.ROUND_S", 0.02)
    cluster = Cluster()
    cluster.directory = Directory()
    cluster.directory.away = True
    loop = cluster._loop()
    loop.start()
    try:
        until(lambda: cluster.events.since(0))
        cluster.directory.away = False
        until(lambda: len(cluster.events.since(0)) >= 2)
    finally:
        loop.stop()
    told = [(event.kind, event.subject) for event in cluster.events.since(0) if event.subject == "directory"]
    assert told == [("unreachable", "directory"), ("answers", "directory")]


def test_a_restarted_controller_continues_the_earlier_events():
    first = Events()
    for subject in ("a", "b"):
        first.add("started", subject)
    second = Events(first.since(0))
    second.add("joined", "c")
    assert [(event.number, event.subject) for event in second.since(1)] == [(2, "b"), (3, "c")]


def test_events_that_could_not_be_published_follow_later():
    published, away = [], True

    def publish(events):
        if away:
            raise TransportError("redis does not answer")
        published.append(events)

    earlier = Events()
    earlier.add("started", "a")
    events = Events(earlier.since(0), publish=publish)
    for subject in ("b", "c"):
        events.add("lost", subject)
    assert [event.subject for event in events.since(0)] == ["a", "b", "c"] and not published
    away = False
    events.add("joined", "d")
    assert published == [events.since(0)]


def test_the_newest_events_are_published_again_with_each_new_one():
    """A replica that took over may lack them."""
    published = []
    events = Events(publish=published.append)
    for number in range(1, REPEATED + 3):
        events.add("lost", str(number))
        assert published[-1] == events.since(0)[-REPEATED - 1 :]
