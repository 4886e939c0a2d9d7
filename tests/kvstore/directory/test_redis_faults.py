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
from .test_conformance import OTHER, RECORD, announce, holders

LEASE_S = 1.0


class Worker:
    """Renews its lease and announces its blocks, as a worker does: with all of them when the directory does
    not know the last number."""

    def __init__(self, directory, record, blocks):
        self.directory, self.record, self.blocks = directory, record, blocks
        self._since = 0

    def renew(self):
        with contextlib.suppress(TransportError):
            self.directory.renew(self.record)
            added = self.blocks if self._since == 0 else ()
            known = announce(self.directory, self.record, self._since, 1, added=added)
            self._since = 1 if known == 1 else 0


class Watcher:
    """Looks at the directory as the controller and the engines do. ``lost``: a worker was missing from a
    settled list. After each look the workers renew their leases, in the same thread: on a busy machine a
    lease runs out only where there is a gap between two looks, too, which unsettles the list."""

    def __init__(self, directory, workers):
        self.directory, self._workers = directory, workers
        self._expected = {worker.record.worker for worker in workers}
        self.forget()

    def forget(self):
        """Forgets what it has seen."""
        self.lost = self.unreachable = self.unsettled = False

    def look(self):
        """Whether everything is listed, and settled."""
        try:
            listing = self.directory.listing()
            complete = {record.worker for record in listing.workers} == self._expected
            self.unsettled |= not listing.settled
            self.lost |= listing.settled and not complete
            return complete and listing.settled
        except TransportError:
            self.unreachable = True
            return False
        finally:
            for worker in self._workers:
                worker.renew()

    def await_well(self):
        """Waits until everything is listed, settled, and announced again."""
        until(pause, lambda: self.look() and answered(lambda: rebuilt(self.directory)))


def answered(call):
    """What ``call`` returns, once it is answered: on a busy machine Redis may take longer than a client
    waits."""
    found = []

    def ask():
        with contextlib.suppress(TransportError):
            found.append(call())
        return found

    until(pause, ask)
    return found[0]


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
            workers = [Worker(connect(url), each, BLOCKS[each.worker]) for each in (RECORD, OTHER)]
            watcher = Watcher(connect(url), workers)
            answered(watcher.directory.claim)
            watcher.await_well()
            watcher.forget()
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
        answered(lambda: watcher.directory.store_state({"counts": {"dense": 2}}))
        server.kill()
        until(pause, lambda: not watcher.look() and watcher.unreachable)
        server.start()
        watcher.await_well()
        assert answered(watcher.directory.load_state) == {"counts": {"dense": 2}}
        assert watcher.unsettled and not watcher.lost


@pytest.mark.heavy
def test_a_redis_that_hangs(cluster, binary, tmp_path):
    with RedisServer(binary, tmp_path) as server:
        watcher = cluster(server.url)
        server.freeze()
        end_s = time.monotonic() + 1.5 * LEASE_S
        until(pause, lambda: not watcher.look() and watcher.unreachable and time.monotonic() >= end_s)
        server.thaw()
        watcher.await_well()
        assert watcher.unsettled and not watcher.lost


def test_a_redis_that_hangs_misleads_no_new_client(cluster, binary, tmp_path):
    """It did not see the gap itself."""
    with RedisServer(binary, tmp_path) as server:
        watcher = cluster(server.url)
        server.freeze()
        threading.Event().wait(1.5 * LEASE_S)
        server.thaw()
        newcomer = RedisDirectory(watcher.directory._address, lease_s=LEASE_S)
        assert not answered(newcomer.listing).settled
        newcomer.disconnect()


def test_a_state_that_could_not_be_stored_is_not_in_force_later(binary, tmp_path):
    """A Redis that hangs has received it, and runs the call when it goes on."""
    with RedisServer(binary, tmp_path) as server, contextlib.ExitStack() as ended:
        directory, other = (RedisDirectory(RedisAddress.parse(server.url), lease_s=LEASE_S) for _ in range(2))
        for each in (directory, other):
            ended.callback(each.disconnect)
        answered(lambda: directory.store_state({"counts": {"dense": 1}}))
        server.freeze()
        with pytest.raises(TransportError):
            directory.store_state({"counts": {"dense": 2}})
        server.thaw()
        until(pause, lambda: answered(other.load_state) == {"counts": {"dense": 2}})
        answered(directory.listing)
        assert answered(other.load_state) == {"counts": {"dense": 1}}


@pytest.mark.heavy
def test_a_failover_to_a_replica(cluster, binary, tmp_path):
    """The old primary comes back as a replica that nothing may write to: connections to it are given up."""
    with RedisServer(binary, tmp_path) as first, RedisServer(binary, tmp_path) as second:
        name = Forwarder(first.port)
        try:
            watcher = cluster(f"redis://{name.address}")
            answered(lambda: watcher.directory.store_state({"counts": {"dense": 2}}))
            client = {server: RedisDirectory(RedisAddress.parse(server.url)) for server in (first, second)}
            answered(lambda: command(client[second], "REPLICAOF", "127.0.0.1", first.port))
            # Replication keeps the order: all that came before the mark is there.
            answered(lambda: command(client[first], "SET", "mark", "1"))
            until(pause, lambda: answered(lambda: command(client[second], "GET", "mark")))
            answered(lambda: command(client[second], "REPLICAOF", "NO", "ONE"))
            answered(lambda: command(client[first], "REPLICAOF", "127.0.0.1", second.port))
            # Connections lead to the old one still.
            until(pause, lambda: not watcher.look() and watcher.unreachable)
            name.port_of_server = second.port
            watcher.await_well()
            assert answered(watcher.directory.load_state) == {"counts": {"dense": 2}}
            assert not watcher.lost
            for directory in client.values():
                directory.disconnect()
        finally:
            name.close()


def command(directory, *words):
    return directory._client.call(lambda redis: redis.execute_command(*words))


@pytest.mark.heavy
def test_a_redis_that_comes_back_with_an_old_copy(cluster, binary, tmp_path):
    """Or with the data of another one: leases in it have run out, or are of workers that are no more."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    with RedisServer(binary, new) as server:
        watcher = cluster(server.url)
        answered(lambda: watcher.directory.store_state({"counts": {"dense": 2}}))
        answered(lambda: command(watcher.directory, "SAVE"))
        answered(lambda: watcher.directory.store_state({"counts": {"dense": 3}}))
        shutil.move(new / "dump.rdb", old / "dump.rdb")
        until(pause, watcher.look)
        server.kill()
        threading.Event().wait(1.5 * LEASE_S)
        with RedisServer(binary, old, port=server.port):
            watcher.await_well()
            assert answered(watcher.directory.load_state) == {"counts": {"dense": 3}}
            assert watcher.unsettled and not watcher.lost
