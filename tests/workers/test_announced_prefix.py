"""Engines find each other's prefixes over real connections, while the directory comes and goes."""

import threading
import time

import pytest

from farshore import rpc
from farshore.errors import TransportError
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService, RemoteDirectory
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.sampling import Sampling
from farshore.workers import announcer
from farshore.workers.announcer import Announcer
from farshore.workers.lease import Lease

GREEDY = Sampling(max_tokens=6, temperature=0.0)
DEADLINE_S = 60.0
PERIOD_S = 0.02
SERVICE = cluster_pb2.DESCRIPTOR.services_by_name["Directory"].full_name


class Served:
    """A directory behind gRPC. It can end, and start again empty at the same address."""

    def __init__(self):
        self.address = "127.0.0.1:0"
        self.start()

    def start(self):
        directory = EmbeddedDirectory(clock=lambda: 0.0)  # No lease runs out.
        self._server, self.address = rpc.serve(
            lambda server: cluster_pb2_grpc.add_DirectoryServicer_to_server(
                DirectoryService(directory), server
            ),
            service=SERVICE,
            listen=self.address,
            token=None,
            threads=8,
        )

    def stop(self):
        assert self._server.stop(None).wait(DEADLINE_S)


@pytest.fixture
def cluster(tiny_model, rig, serve_store, connect, monkeypatch):
    """A rig whose shards are served over gRPC and announce to ``directory``; ``join()`` -> a new engine."""
    monkeypatch.setattr(announcer, "PROBE_S", PERIOD_S)
    made = rig(tiny_model, shards=2, memory_bytes=32 << 20)
    made.served = Served()
    made.directory = RemoteDirectory(made.served.address)
    addresses, ends = {}, []
    for worker in made.targets:
        addresses[worker] = serve_store(made.stores[worker], worker).address
        record = WorkerRecord(
            worker=worker,
            kind="attention",
            slot=worker,
            address=addresses[worker],
            host="127.0.0.1",
            process_id=1,
            state="serving",
        )
        announces = Announcer(made.directory, worker, made.stores[worker].names, period_s=PERIOD_S)
        announces.start()
        ends.append(announces.end)
        ends.append(Lease(made.directory, lambda record=record: record, period_s=PERIOD_S).end)

    def join():
        for worker, address in addresses.items():
            made.clients[worker] = connect(address, model=made.attention)
        return made.start(find_prefix=made.directory.find_prefix)

    made.join = join
    yield made
    for end in ends:
        end()
    made.directory.disconnect()
    made.served.stop()


def await_announced(cluster):
    """Waits until the directory knows all names of all shards."""
    end_s, pause = time.monotonic() + DEADLINE_S, threading.Event()

    def knows_all(worker):
        try:
            found = cluster.directory.find_prefix(list(cluster.stores[worker].names.names()))
        except TransportError:
            return False
        return all(worker in workers for workers in found)

    while not all(map(knows_all, cluster.targets)):
        assert time.monotonic() < end_s, "names were not announced"
        pause.wait(PERIOD_S)


def test_prefixes_are_found_with_the_directory_and_without_it(cluster, submit):
    first, second = cluster.join(), cluster.join()
    answers = {}
    prompts = [[(n * k) % 90 for n in range(600)] for k in (3, 7, 11)]

    def ask(engine, number, *, cached_tokens):
        collected = submit(engine, f"s{number}", prompts[number], GREEDY)
        assert collected.result().cached_tokens == cached_tokens
        assert answers.setdefault(number, collected.tokens) == collected.tokens
        cluster.settle()

    ask(first, 0, cached_tokens=0)
    await_announced(cluster)
    ask(second, 0, cached_tokens=512)
    cluster.served.stop()
    ask(first, 1, cached_tokens=0)
    ask(second, 1, cached_tokens=512)
    cluster.served.start()
    await_announced(cluster)
    ask(first, 2, cached_tokens=0)
    await_announced(cluster)
    ask(second, 2, cached_tokens=512)
    ask(second, 1, cached_tokens=512)
