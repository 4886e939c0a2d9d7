"""Directories of every kind, on a clock that tests move or on a server that tests can freeze."""

import threading
import time
from dataclasses import replace

import pytest

from farshore import rpc
from farshore.benchmarks.engines.redis_server import RedisServer
from farshore.kvstore.directory.base import LEASE_S
from farshore.kvstore.directory.connect import open_directory
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.redis import client
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.kvstore.directory.redis.directory import RedisDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

DEADLINE_S = 60.0
QUICK_LEASE_S = 0.5
"""Of a directory on real time, in tests that wait for leases to run out. Others use a long one."""
LONG_LEASE_S = 60.0
VALKEY = pytest.param("valkey", marks=pytest.mark.heavy)


@pytest.fixture(scope="session")
def servers(tmp_path_factory, server_binary):
    """servers(name) -> a RedisServer that runs for all tests, with empty databases."""
    running = {}

    def get(name):
        if name not in running:
            running[name] = RedisServer(server_binary(name), tmp_path_factory.mktemp(name))
            running[name].start()
        emptied = RedisDirectory(RedisAddress.parse(running[name].url))._client
        emptied.call(lambda redis: redis.flushall())
        emptied.close()
        return running[name]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture
def patient(monkeypatch):
    """Clients of Redis wait as long as a busy machine takes. Not for tests of a Redis that hangs."""
    for name in ("CONNECT_S", "ANSWER_S"):
        monkeypatch.setattr(client, name, DEADLINE_S)


def through_grpc(directory):
    server, address = rpc.serve(
        lambda server: pb_grpc.add_DirectoryServicer_to_server(DirectoryService(directory), server),
        service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
        listen="127.0.0.1:0",
        threads=2,
        token=None,
    )
    return server, open_directory(f"grpc://{address}")


class _Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


class FakeTime:
    """A directory in this process, or the same behind gRPC, on a clock that the test moves."""

    def __init__(self, kind, *, restarted):
        self._clock = _Clock()
        self.directory = EmbeddedDirectory(clock=self._clock, restarted=restarted)
        self._server = None
        if kind == "remote":
            self._server, self.directory = through_grpc(self.directory)

    def step(self):
        self._clock.now_s += LEASE_S / 4

    def pause(self):
        """The directory's process does nothing for more than a lease."""
        self._clock.now_s += 30

    def renew_briefly(self, record):
        """Renews a worker's lease for the last time: steps let it run out."""
        self.directory.renew(record)

    def end(self):
        self.directory.disconnect()
        if self._server is not None:
            self._server.stop(0).wait()


class RealTime:
    """A directory in a server."""

    def __init__(self, server, *, restarted, lease_s):
        self._server, self._lease_s = server, lease_s
        self.address = RedisAddress.parse(server.url)
        self.directory = RedisDirectory(self.address, lease_s=lease_s)
        if not restarted:
            self.directory.claim()

    def other(self, **changes):
        """Another client's directory."""
        return RedisDirectory(replace(self.address, **changes), lease_s=self._lease_s)

    def step(self):
        threading.Event().wait(0.02)

    def pause(self):
        self._server.freeze()
        threading.Event().wait(1.5 * self._lease_s)
        self._server.thaw()

    def renew_briefly(self, record):
        brief = RedisDirectory(self.address, lease_s=QUICK_LEASE_S)
        brief.renew(record)
        brief.disconnect()

    def end(self):
        self.directory.disconnect()


@pytest.fixture(params=["embedded", "remote", "redis", VALKEY])
def place(request, patient):
    """place(restarted=…, expires=…) -> an object with a ``directory``, and ``until(check)``, which lets time
    pass until ``check()`` is true. ``expires``: whether the test waits for leases to run out."""
    made = []

    def make(*, restarted=False, expires=False):
        if request.param in ("embedded", "remote"):
            made.append(FakeTime(request.param, restarted=restarted))
        else:
            server = request.getfixturevalue("servers")(request.param)
            lease_s = QUICK_LEASE_S if expires else LONG_LEASE_S
            made.append(RealTime(server, restarted=restarted, lease_s=lease_s))
        made[-1].until = lambda check: until(made[-1].step, check)
        return made[-1]

    yield make
    for one in made:
        one.end()


def until(step, check):
    end_s = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < end_s
        step()
