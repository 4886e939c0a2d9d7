"""Redis restarts empty, hangs, and is replaced: no worker counts as lost, and all that matters comes back."""

import contextlib
import shutil
import threading
import time

import pytest

from farshore.benchmarks.engines.redis_server import RedisServer
from farshore.errors import TransportError
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.kvstore.directory.redis.directory import RedisDirectory

from ...forwarder import Forwarder
from .conftest import VALKEY, until
from .test_conformance import OTHER, RECORD, announce, holders, names

LEASE_S = 3.0
"""Long enough for a busy machine to renew in time."""


class Worker:
    """Renews its lease and announces its blocks, as a worker does: again and again, with all of them when the
    directory does not know the last number."""

    def __init__(self, directory, record, blocks):
        self.directory, self.record, self.blocks = directory, record, blocks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self):
        self._ended.set()
        self._thread.join()

    def _run(self):
        since = 0
        while not self._ended.is_set():
            with contextlib.suppress(TransportError):
                self.directory.renew(self.record)
                added = self.blocks if since == 0 else ()
                known = announce(self.directory, self.record, since, 1, added=added)
                since = 1 if known == 1 else 0
            self._ended.wait(LEASE_S / 4)


class Watcher:
    """Looks at the directory as the controller and the engines do. ``lost``: a worker was missing from a
    settled list."""

    def __init__(self, directory, expected):
        self.directory, self.expected = directory, expected
        self.lost = self.unreachable = self.unsettled = False

    def look(self):
        """Whether everything is listed, and settled."""
        try:
            listing = self.directory.listing()
        except TransportError:
            self.unreachable = True
            return False
        complete = {record.worker for record in listing.workers} == self.expected
        self.unsettled |= not listing.settled
        self.lost |= listing.settled and not complete
        return complete and listing.settled


BLOCKS = {RECORD.worker: [1 << 200, 2 << 200], OTHER.worker: [2 << 200]}


@pytest.fixture(params=["redis", VALKEY])
def binary(request, server_binary):
    return server_binary(request.param)


@pytest.fixture
def cluster(binary, tmp_path):
    """cluster(URL) -> a Watcher of two workers, which are all listed."""
    with contextlib.ExitStack() as ended:

        def connect(url):
            directory = RedisDirectory(RedisAddress.parse(url), lease_s=LEASE_S)
            ended.callback(directory.disconnect)
            return directory

        def start(url):
            watcher = Watcher(connect(url), {RECORD.worker, OTHER.worker})
            watcher.directory.claim()
            for record in (RECORD, OTHER):
                worker = Worker(connect(url), record, BLOCKS[record.worker])
                ended.callback(worker.end)
            until(pause, lambda: names(watcher.directory) == [RECORD.worker, OTHER.worker])
            until(pause, lambda: rebuilt(watcher.directory))
            return watcher

        yield start


def pause():
    threading.Event().wait(0.02)


def rebuilt(directory):
    found = holders(directory, 1 << 200, 2 << 200, 3 << 200)
    return found == [{RECORD.worker}, {RECORD.worker, OTHER.worker}, set()]


def test_a_redis_that_restarts_empty(cluster, binary, tmp_path):
    server = RedisServer(binary, tmp_path)
    with server:
        watcher = cluster(server.url)
        watcher.directory.store_state({"counts": {"dense": 2}})
        server.kill()
        until(pause, lambda: not watcher.look() and watcher.unreachable)
        server.start()
        until(pause, watcher.look)
        assert watcher.directory.load_state() == {"counts": {"dense": 2}}
        until(pause, lambda: rebuilt(watcher.directory))
        assert watcher.unsettled and not watcher.lost


@pytest.mark.heavy
def test_a_redis_that_hangs(cluster, binary, tmp_path):
    with RedisServer(binary, tmp_path) as server:
        watcher = cluster(server.url)
        server.freeze()
        end_s = time.monotonic() + 1.5 * LEASE_S
        until(pause, lambda: not watcher.look() and watcher.unreachable and time.monotonic() >= end_s)
        server.thaw()
        until(pause, watcher.look)
        until(pause, lambda: rebuilt(watcher.directory))
        assert watcher.unsettled and not watcher.lost


def test_a_redis_that_hangs_misleads_no_new_client(cluster, binary, tmp_path):
    """It did not see the gap itself."""
    with RedisServer(binary, tmp_path) as server:
        watcher = cluster(server.url)
        server.freeze()
        threading.Event().wait(1.5 * LEASE_S)
        server.thaw()
        newcomer = RedisDirectory(watcher.directory._address, lease_s=LEASE_S)
        assert not newcomer.listing().settled
        newcomer.disconnect()


def test_a_state_that_could_not_be_stored_is_not_in_force_later(binary, tmp_path):
    """A Redis that hangs has received it, and runs the call when it goes on."""
    with RedisServer(binary, tmp_path) as server, contextlib.ExitStack() as ended:
        directory, other = (RedisDirectory(RedisAddress.parse(server.url), lease_s=LEASE_S) for _ in range(2))
        for each in (directory, other):
            ended.callback(each.disconnect)
        directory.store_state({"counts": {"dense": 1}})
        server.freeze()
        with pytest.raises(TransportError):
            directory.store_state({"counts": {"dense": 2}})
        server.thaw()
        until(pause, lambda: other.load_state() == {"counts": {"dense": 2}})
        directory.listing()
        assert other.load_state() == {"counts": {"dense": 1}}


@pytest.mark.heavy
def test_a_failover_to_a_replica(cluster, binary, tmp_path):
    """The old primary comes back as a replica that nothing may write to: connections to it are given up."""
    with RedisServer(binary, tmp_path) as first, RedisServer(binary, tmp_path) as second:
        name = Forwarder(first.port)
        try:
            watcher = cluster(f"redis://{name.address}")
            watcher.directory.store_state({"counts": {"dense": 2}})
            client = {server: RedisDirectory(RedisAddress.parse(server.url)) for server in (first, second)}
            command(client[second], "REPLICAOF", "127.0.0.1", first.port)
            until(pause, lambda: client[second].load_state() is not None)
            command(client[second], "REPLICAOF", "NO", "ONE")
            command(client[first], "REPLICAOF", "127.0.0.1", second.port)
            # Connections lead to the old one still.
            until(pause, lambda: not watcher.look() and watcher.unreachable)
            name.port_of_server = second.port
            until(pause, watcher.look)
            until(pause, lambda: rebuilt(watcher.directory))
            assert watcher.directory.load_state() == {"counts": {"dense": 2}}
            assert not watcher.lost
            for directory in client.values():
                directory.disconnect()
        finally:
            name.close()


def command(directory, *words):
    directory._client.call(lambda redis: redis.execute_command(*words))


@pytest.mark.heavy
def test_a_redis_that_comes_back_with_an_old_copy(cluster, binary, tmp_path):
    """Or with the data of another one: leases in it have run out, or are of workers that are no more."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    with RedisServer(binary, new) as server:
        watcher = cluster(server.url)
        watcher.directory.store_state({"counts": {"dense": 2}})
        command(watcher.directory, "SAVE")
        watcher.directory.store_state({"counts": {"dense": 3}})
        shutil.move(new / "dump.rdb", old / "dump.rdb")
        until(pause, watcher.look)
        server.kill()
        threading.Event().wait(1.5 * LEASE_S)
        with RedisServer(binary, old, port=server.port):
            until(pause, watcher.look)
            until(pause, lambda: rebuilt(watcher.directory))
            assert watcher.directory.load_state() == {"counts": {"dense": 3}}
            assert watcher.unsettled and not watcher.lost
