"""Processes of a running `farshore serve` are killed or frozen: what must be is replaced, the rest ends."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.client.sdk import Client
from farshore.cluster_token import ClusterToken
from farshore.errors import TransportError

from ..running import ANSWER, DEADLINE_S, Reading, answer, begun, processes, until, workers_of


def _shown_once(words, marked, address):
    """What `farshore events` prints, once these words are in it."""
    shown = marked.run("events", "--server", address).stdout
    return shown if words in shown else ""


def _replaced(client, victim, *, count):
    """The workers of the victim's kind, when ``count`` are ready without it."""

    def ready():
        workers = workers_of(client, victim.kind)
        return len(workers) == count and victim.worker_id not in workers and workers

    return until(ready, f"{victim.worker_id} was not replaced")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("farshore.gateway", "the gateway (process {}) was killed by SIGKILL"),
        ("/raylet/raylet", "Ray's raylet (process {}) was killed by SIGKILL"),
        ("/gcs/gcs_server", "Ray's GCS (process {}) was killed by SIGKILL"),
    ],
)
def test_the_end_of_a_process_that_serving_needs(serve, pattern, message):
    server, _ = serve("--attention-workers", "1", "--kv-memory", "64MiB")
    (victim,) = processes(server, pattern)
    os.kill(victim, signal.SIGKILL)
    assert server.process.wait(DEADLINE_S) == 1
    server.err.await_match(re.escape(f"farshore: error: {message.format(victim)}"))


@pytest.mark.heavy
def test_workers_that_are_killed_or_frozen_are_replaced(serve):
    server, address = serve("--kv-memory", "64MiB", "--shard-grace", "2")
    with Client(address) as client:
        first, second = workers_of(client, "attention").values()
        os.kill(first.process_id, signal.SIGKILL)
        server.err.await_match(rf"{first.worker_id} lost: \(process {first.process_id}\) was killed")
        workers = _replaced(client, first, count=2)
        assert second.worker_id in workers
        (new,) = workers.keys() - {second.worker_id}
        assert new.rpartition("-")[0] == first.worker_id.rpartition("-")[0]  # the same slot
        server.err.await_match(f"{new} replaced")
        assert answer(client) == ANSWER

        (dense,) = workers_of(client, "dense").values()
        os.kill(dense.process_id, signal.SIGKILL)
        assert until(lambda: answer(client), "no engine answers") == ANSWER
        # Its lease may hold for a while.
        until(lambda: dense.worker_id not in workers_of(client, "dense"), "a killed worker stays listed")

        os.kill(second.process_id, signal.SIGSTOP)
        _replaced(client, second, count=2)
        until(lambda: not Path(f"/proc/{second.process_id}").exists(), "the frozen process was not killed")
        assert until(lambda: answer(client), "no answer") == ANSWER


@pytest.mark.heavy
def test_without_its_controller_the_cluster_goes_on_and_a_new_one_starts_nothing(serve):
    server, address = serve("--kv-memory", "64MiB", "--attention-workers", "1")
    with Client(address) as client:
        before = client.status().workers
        workers = {worker.process_id for worker in before}
        controllers = set(processes(server, "ray::ControllerActor")) - workers
        for controller in controllers:
            os.kill(controller, signal.SIGKILL)
        assert answer(client) == ANSWER
        server.err.await_match("the controller .*: it is started again, serving goes on")
        after = until(lambda: len(client.status().workers) == 2 and client.status().workers, "no status")
        assert [worker.worker_id for worker in after] == [worker.worker_id for worker in before]
        # The new controller replaces what dies from now on.
        (shard,) = workers_of(client, "attention").values()
        os.kill(shard.process_id, signal.SIGKILL)
        _replaced(client, shard, count=1)
        assert until(lambda: answer(client), "no answer") == ANSWER


@pytest.mark.heavy
def test_operators_scale_watch_and_end_a_cluster(marked, serve, tmp_path):
    token = ClusterToken.make(tmp_path / "token")
    options = ("--kv-memory", "64MiB", "--attention-workers", "1", "--token-file", str(tmp_path / "token"))
    server, address = serve(*options)
    with Client(address) as client:
        done = marked.run("scale", "--server", address, "attention=2")
        assert (done.returncode, done.stdout) == (0, "dense=1 attention=2\n"), done.stderr
        until(lambda: len(workers_of(client, "attention")) == 2, "no worker was added")
        done = marked.run("scale", "--server", address, "attention=0")
        assert done.returncode == 1 and "give at least 1" in done.stderr
        marked.run("scale", "--server", address, "attention=1")
        until(lambda: len(workers_of(client, "attention")) == 1, "no worker retired")
        assert answer(client) == ANSWER
    # A worker leaves the status when it has drained, and retires when its process has ended.
    shown = until(lambda: _shown_once("retired   attention-1", marked, address), "not told as retired")
    assert "joined    attention-1-" in shown
    with rpc.channel(server.out.await_match(r"  controller +(\S+)")[1], token) as channel:
        request = health_pb2.HealthCheckRequest()
        health = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=DEADLINE_S)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        assert marked.run("down", "--server", address).returncode == 0
        # Before the controller ends, and with it this stream.
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.process.wait(DEADLINE_S) == 0


@pytest.mark.heavy
def test_a_killed_serve_leaves_nothing(marked):
    server = marked.start("serve", "--port", "0", "--kv-memory", "64MiB", "--attention-workers", "1")
    server.out.await_match(r"serves \S+ at (\S+)")
    server.process.kill()
    server.process.wait(DEADLINE_S)
    marked.check_nothing_left()


@pytest.fixture
def gateway(marked):
    """gateway(option, …) -> (the running command, its address), when an engine takes its requests. Killed
    after the test."""
    started = []

    def start(*options):
        process = marked.start("gateway", *options, "--listen", "127.0.0.1:0")
        started.append(process)
        address = process.out.await_match(r"gateway of smollm2 at (\S+)")[1]
        process.out.await_match("an engine takes requests")
        return process, address

    yield start
    for process in started:
        process.end(signal.SIGKILL)


@pytest.mark.heavy
def test_two_gateways_go_on_without_an_engine_and_without_the_controller(serve, gateway, tmp_path):
    ClusterToken.make(tmp_path / "token")
    token = ("--token-file", str(tmp_path / "token"))
    # Enough for eight answers that do not end.
    options = ("--dense-workers", "2", "--attention-workers", "1", "--kv-memory", "1280MiB", *token)
    server, address = serve(*options)
    directory = "grpc://" + server.out.await_match(r"  controller +(\S+)")[1]
    second, other = gateway("--directory", directory, *token)
    with Client(address, resume_s=0) as first_client, Client(other, resume_s=0) as other_client:
        assert answer(first_client) == answer(other_client) == ANSWER
        victim, _ = workers_of(first_client, "dense").values()
        with contextlib.ExitStack() as ended:
            readings, placed = {first_client: [], other_client: []}, []
            # Until each gateway runs one on each engine: what it knows of the other one's is not the newest.
            while len(set(placed)) < 4:
                for client, own in readings.items():
                    own.append(ended.enter_context(Reading(client, begun(client, "One"))))
                placed = _placed(first_client, sum(map(len, readings.values())))
            on_victim = sum(engine == victim.worker_id for _, engine in placed)
            os.kill(victim.process_id, signal.SIGKILL)
            for client in readings:
                assert [answer(client) for _ in range(2)] == [ANSWER] * 2
            every = [each for own in readings.values() for each in own]
            until(lambda: sum(each.is_over for each in every) == on_victim, f"not {on_victim} are lost")
            for own in readings.values():
                lost = [each.end() for each in own if each.is_over]
                assert 0 < len(lost) < len(own)
                for error in lost:
                    assert isinstance(error, TransportError) and f"{victim.worker_id} " in str(error)
                    assert "was lost" in str(error) and "send the request again" in str(error)
                for each in own:
                    if not each.is_over:
                        each.cancel()
        _replaced(first_client, victim, count=2)
        (controller,) = processes(server, "ray::Controller")
        os.kill(controller, signal.SIGKILL)
        for client in (first_client, other_client):
            assert answer(client) == ANSWER
        assert until(lambda: workers_of(other_client, "dense"), "the controller is not back")
    assert second.end(signal.SIGTERM) == 0


def _placed(client, count):
    """(the gateway's part of its id, the engine) of each of ``count`` requests."""

    def placed():
        found = [(each.sequence_id.rpartition("-")[0], each.owner) for each in client.status().sequences]
        return len(found) == count and found

    return until(placed, f"not {count} requests run")
