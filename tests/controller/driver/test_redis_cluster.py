"""A whole cluster with its directory in Redis, which hangs, restarts empty, and outlives the controller."""

import contextlib
import os
import signal
import threading
import time
from functools import partial

import pytest

from farshore.benchmarks.engines.redis_server import RedisServer
from farshore.client.sdk import Client
from farshore.errors import FarshoreError
from farshore.kvstore.directory.base import LEASE_S
from farshore.kvstore.directory.connect import open_redis

from .. import running
from ..running import processes

until = partial(running.until, deadline_s=90.0)
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


def controllers(server, but):
    return [pid for pid in processes(server, "ray::(controller:)?ControllerActor") if pid not in but]


HANGS_S = [pytest.param(3 * LEASE_S, marks=pytest.mark.heavy), pytest.param(30.0, marks=pytest.mark.soak)]


@pytest.mark.parametrize("hang_s", HANGS_S)
def test_a_cluster_outlasts_its_redis(serve, server_binary, tmp_path, hang_s):
    password = tmp_path / "password"
    password.write_text("a secret")
    redis = RedisServer(server_binary("redis"), tmp_path, "--requirepass", "a secret")
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
            until(lambda: ("answers", "directory") in events(client), "the directory was not reached again")
            requests.await_new(1)

            redis.kill()
            until(lambda: events(client).count(("unreachable", "directory")) == 2, "no word of the loss")
            requests.await_new(2)
            redis.start()
            # It started empty: the list settles, and the desired state is there again.
            assert until(lambda: client.scale(attention=2), "no scale") == {"dense": 1, "attention": 2}
            until(lambda: len(workers(client)) == 3, "no further worker")
            assert began.items() <= workers(client).items()
            assert not {kind for kind, _ in events(client)} & {"lost", "killed", "replaced", "retired"}

            before = workers(client).values()
            (controller,) = controllers(server, before)
            redis.freeze()
            os.kill(controller, signal.SIGKILL)
            until(lambda: controllers(server, before) not in ([], [controller]), "no new controller")
            requests.await_new(1)
            redis.thaw()
            assert until(stored.load_state, "no state")["counts"] == {"dense": 1, "attention": 2}
            assert len(until(lambda: workers(client), "no status")) == 3
            kinds = [kind for kind, _ in until(lambda: events(client), "no events")]
            assert "scaled" in kinds and "lost" not in kinds
        assert not requests.failures and len(set(requests.answers)) == 1
        assert server.end(signal.SIGTERM) == 0
        assert stored.listing().workers == ()
        stored.disconnect()


@pytest.mark.heavy
def test_a_redis_that_does_not_answer_is_named_before_anything_starts(marked, tmp_path, server_binary):
    password = tmp_path / "password"
    password.write_text("a secret")
    redis = RedisServer(server_binary("redis"), tmp_path)
    for state in ("away", "frozen"):
        if state == "frozen":
            redis.start()
            redis.freeze()
        done = marked.run("serve", "--redis-url", redis.url, "--redis-password-file", str(password))
        assert done.returncode == 3, done.stderr
        assert f"{redis.url}/0 does not answer" in done.stderr and "secret" not in done.stderr
    redis.kill()
