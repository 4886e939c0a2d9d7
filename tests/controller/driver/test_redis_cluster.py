"""A whole cluster with its directory in Redis or Valkey, which hangs, restarts empty, is replaced by its
replica, and outlives the controller."""

import contextlib
import os
import signal
import threading
import time

import pytest
import redis as redis_py

from farshore.benchmarks.engines.redis_server import RedisServer
from farshore.client.sdk import Client
from farshore.errors import FarshoreError
from farshore.kvstore.directory.base import LEASE_S
from farshore.kvstore.directory.connect import open_redis

from ...forwarder import Forwarder
from ..running import processes, until

PROMPT = "The capital of France is"
SMALL = ("--kv-memory", "64MiB", "--attention-workers", "1")


class Requests:
    """Sends one request after the other, from a thread."""

    def __init__(self, address):
        self.answers, self.failures = [], []
        self._client = Client(address)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def await_new(self, count):
        """Waits until ``count`` requests that begin after now have been answered."""
        before = len(self.answers) + 1
        until(lambda: len(self.answers) >= before + count or self.failures, "no request is answered")

    def close(self):
        self._ended.set()
        self._thread.join()
        self._client.close()

    def _run(self):
        while not self._ended.is_set():
            try:
                events = self._client.generate(PROMPT, max_tokens=24, temperature=0.0)
                self.answers.append("".join(getattr(event, "text", "") for event in events))
            except FarshoreError as error:
                self.failures.append(error)


def events(client):
    return [(event.kind, event.subject) for event in client.watch_events()]


def workers(client):
    return {worker.worker_id: worker.process_id for worker in client.status().workers}


def await_workers(client, count):
    """Waits until there are so many workers. After a directory was away, each must renew its lease first."""
    return until(lambda: len(found := workers(client)) == count and found, f"not {count} workers")


def await_directory(client, kind):
    """Waits until the newest word on the directory is this one. A busy machine may lose and find it at any
    time."""
    until(lambda: [kind for kind, subject in events(client) if subject == "directory"][-1:] == [kind], kind)


def replace_controller(server, but):
    """Kills the controller and waits for the next one. ``but``: other processes that may look like it."""

    def controllers():
        return [pid for pid in processes(server, "ray::(controller:)?ControllerActor") if pid not in but]

    (controller,) = controllers()
    os.kill(controller, signal.SIGKILL)
    until(lambda: controllers() not in ([], [controller]), "no new controller")


@pytest.mark.parametrize(
    ("program", "hang_s"),
    [
        pytest.param("redis", 3 * LEASE_S, marks=pytest.mark.heavy),
        pytest.param("redis", 30.0, marks=pytest.mark.soak),
        pytest.param("valkey", 30.0, marks=pytest.mark.soak),
    ],
)
def test_a_cluster_outlasts_its_redis(serve, server_binary, tmp_path, program, hang_s):
    password = tmp_path / "password"
    password.write_text("a secret")
    redis = RedisServer(server_binary(program), tmp_path, "--requirepass", "a secret")
    with redis:
        options = ("--redis-url", redis.url, "--redis-password-file", str(password))
        server, address = serve(*SMALL, *options)
        stored = open_redis(f"{redis.url}?password_file={password}")
        requests = Requests(address)
        with contextlib.closing(requests), Client(address) as client:
            began = workers(client)
            requests.await_new(1)

            redis.freeze()
            frozen_s = time.monotonic()
            server.err.await_match(r"directory unreachable: redis://127.0.0.1:\d+/0 does not answer")
            with pytest.raises(FarshoreError, match=r"redis://127.0.0.1:\d+/0 does not answer"):
                client.scale(attention=2)
            until(lambda: time.monotonic() - frozen_s >= hang_s, "time stands still")
            requests.await_new(2)
            redis.thaw()
            await_directory(client, "answers")
            requests.await_new(1)

            redis.kill()
            await_directory(client, "unreachable")
            requests.await_new(2)
            redis.start()
            # It started empty: the list settles, and the desired state is there again.
            assert until(lambda: client.scale(attention=2), "no scale") == {"dense": 1, "attention": 2}
            before = await_workers(client, 3)
            assert began.items() <= before.items()
            assert not {kind for kind, _ in events(client)} & {"lost", "killed", "replaced", "retired"}

            redis.freeze()
            replace_controller(server, before.values())
            requests.await_new(1)
            redis.thaw()
            assert until(stored.load_state, "no state")["counts"] == {"dense": 1, "attention": 2}
            assert await_workers(client, 3) == before
            kinds = [kind for kind, _ in until(lambda: events(client), "no events")]
            assert "scaled" in kinds and "lost" not in kinds
        assert not requests.failures and len(set(requests.answers)) == 1
        assert server.end(signal.SIGTERM) == 0
        assert stored.listing().workers == ()
        stored.disconnect()


class Replicated:
    """A primary, and a replica that can take its place, behind one address. A context manager."""

    def __init__(self, binary, folder):
        self.primary, self.replica = RedisServer(binary, folder), RedisServer(binary, folder)
        self._forwarder = Forwarder(self.primary.port)
        self.url = f"redis://{self._forwarder.address}"

    def __enter__(self):
        try:
            self.primary.start()
            self.follow()
        except BaseException:
            self.__exit__()
            raise
        return self

    def follow(self):
        """Starts the replica, as one of the primary, and waits until it has all that is there."""
        self.replica.kill()
        self.replica.start("--replicaof", "127.0.0.1", str(self.primary.port))
        until(lambda: ask(self.replica, "ROLE")[3] == b"connected", "the replica does not follow")

    def promote(self):
        """Ends replication: from now on the replica lacks what is written, until it takes the place."""
        ask(self.replica, "REPLICAOF", "NO", "ONE")

    def switch(self):
        self.primary, self.replica = self.replica, self.primary
        self._forwarder.move(self.primary.port)

    def __exit__(self, *_):
        self._forwarder.close()
        self.primary.kill()
        self.replica.kill()


def ask(server, *words):
    with redis_py.Redis(port=server.port) as client:
        return client.execute_command(*words)


def announced(server):
    """Names of the blocks that workers have announced."""
    return set(ask(server, "HKEYS", "farshore:{default}:holders"))


def seal(client, name):
    """Runs a request with a prompt of some blocks of its own."""
    story = " ".join(f"On day {day} the keeper of {name} saw {day * 13 % 50} ships." for day in range(40))
    assert any(hasattr(event, "text") for event in client.generate(story, max_tokens=2))


@pytest.mark.parametrize(
    "program",
    [pytest.param("valkey", marks=pytest.mark.heavy), pytest.param("redis", marks=pytest.mark.soak)],
)
def test_a_cluster_outlasts_failovers(serve, server_binary, tmp_path, program):
    """The first primary is killed, the second one hangs. Neither has replicated its last writes."""
    with Replicated(server_binary(program), tmp_path) as pair:
        server, address = serve(*SMALL, "--redis-url", pair.url)
        stored = open_redis(pair.url)
        requests = Requests(address)
        with contextlib.closing(requests), Client(address) as client:
            began = workers(client)
            seal(client, "Farshore")
            until(lambda: announced(pair.replica), "nothing is announced, or not replicated")

            # At once: no call fails, and the list stays settled.
            pair.promote()
            assert client.scale(attention=2) == {"dense": 1, "attention": 2}
            pair.primary.kill()
            pair.switch()
            until(lambda: stored.load_state()["counts"]["attention"] == 2, "the new number is lost")
            until(lambda: "scaled" in [event.kind for event in stored.events()], "an event is lost")
            await_workers(client, 3)
            requests.await_new(1)

            pair.follow()
            pair.promote()
            seal(client, "Nearshore")
            until(lambda: announced(pair.primary) > announced(pair.replica), "nothing more is announced")
            names = sorted(announced(pair.primary))
            pair.primary.freeze()
            await_directory(client, "unreachable")
            requests.await_new(1)
            pair.switch()
            await_directory(client, "answers")
            until(lambda: all(stored.find_prefix(names)), "not all is announced again")
            requests.await_new(1)

            before = await_workers(client, 3)
            assert began.items() <= before.items()
            replace_controller(server, before.values())
            assert await_workers(client, 3) == before
            assert until(lambda: client.scale(attention=2), "no scale") == {"dense": 1, "attention": 2}
            kinds = [kind for kind, _ in events(client)]
            assert "scaled" in kinds and not {"lost", "killed", "replaced", "retired"} & set(kinds)
        assert not requests.failures and len(set(requests.answers)) == 1
        assert server.end(signal.SIGTERM) == 0
        assert stored.listing().workers == ()
        stored.disconnect()


@pytest.mark.heavy
def test_a_redis_that_does_not_answer_is_named_before_anything_starts(marked, tmp_path, server_binary):
    password = tmp_path / "password"
    password.write_text("a secret")
    redis = RedisServer(server_binary("redis"), tmp_path)
    with contextlib.ExitStack() as ended:
        for state in ("away", "frozen"):
            if state == "frozen":
                ended.enter_context(redis)
                redis.freeze()
            done = marked.run("serve", "--redis-url", redis.url, "--redis-password-file", str(password))
            assert done.returncode == 3, done.stderr
            assert f"{redis.url}/0 does not answer" in done.stderr and "secret" not in done.stderr
