"""Two gateway processes over engine processes that a real directory lists: kills, freezes, joins."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from farshore.client import events
from farshore.client.sdk import Client
from farshore.errors import TransportError
from farshore.model_spec import ModelSpec

DEADLINE_S = 60.0
SPEC = ModelSpec().to_json()


@pytest.fixture
def cluster(directory, engines, harness):
    """cluster(number) starts an engine process and lists it as dense-<number>."""

    def start(number):
        engine = engines()
        directory.embedded.renew(harness.dense(f"dense-{number}-a", engine.address, spec=SPEC))
        return engine

    return start


@pytest.fixture
def gateways(directory):
    """gateways(count) -> the processes of as many `farshore gateway`s with a closed stdin, and their
    addresses. Killed after the test."""
    started = []

    def start(count):
        command = [sys.executable, "-P", "-m", "farshore.client.cli.main", "gateway"]
        command += ["--directory", directory.url, "--listen", "127.0.0.1:0"]
        for _ in range(count):
            started.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            )
        lines = [process.stdout.readline() for process in started]
        assert all("gateway of smollm2 at 127.0.0.1:" in line for line in lines)
        addresses = [line.rpartition(" ")[2].strip() for line in lines]
        for address in addresses:
            with Client(address) as client:
                wait_until(client.is_serving)
        return started, addresses

    yield start
    for process in started:
        process.kill()
        process.wait(30)
        process.stdout.close()


def wait_until(condition):
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        threading.Event().wait(0.05)


def begun(client):
    """A stream whose first token has come."""
    stream = client.generate("Hi")
    assert [type(next(stream)) for _ in range(2)] == [events.Accepted, events.Token]
    return stream


def outcome(stream):
    """How the rest of a stream ends: the reason, or the error."""
    try:
        return [event.reason for event in stream if isinstance(event, events.Finished)]
    except TransportError as error:
        return error


@pytest.mark.heavy
def test_engines_are_killed_and_join_under_two_gateways(cluster, gateways):
    engines = [cluster(0), cluster(1)]
    processes, addresses = gateways(2)
    with Client(addresses[0]) as first, Client(addresses[1]) as second, Client(addresses) as both:
        # Each gateway sends one short prompt to each engine.
        streams = [begun(client) for client in (first, first, second, second)]
        engines[0].kill()
        engines[1].tell("finish")
        for own in (streams[:2], streams[2:]):
            ends = [outcome(stream) for stream in own]
            assert ends.count(["stop"]) == 1
            (failure,) = (end for end in ends if end != ["stop"])
            assert failure.retryable and "dense-0-a" in str(failure)
            assert "was lost" in str(failure) and "send the request again" in str(failure)
        # The list still has the killed engine. Nothing that comes now is lost.
        engines.append(cluster(2))
        engines[2].tell("finish")
        for client in (first, second):
            assert [outcome(client.generate("Hi")) for _ in range(20)] == [["stop"]] * 20
        # The new engine has got its share: when the other one freezes, it serves.
        engines[1].process.send_signal(signal.SIGSTOP)
        for client in (first, second):
            assert [outcome(client.generate("Hi")) for _ in range(4)] == [["stop"]] * 4
        engines[1].process.send_signal(signal.SIGCONT)
        engines[2].tell("hold")
        engines[1].tell("hold")
        stream = begun(both)
        assert both.address == addresses[0]
        processes[0].kill()
        assert isinstance(outcome(stream), TransportError)
        stream = begun(both)
        assert both.address == addresses[1]
        # The last gateway drains: what runs there may end.
        processes[1].send_signal(signal.SIGTERM)
        wait_until(lambda: not both.is_serving())
        engines[1].tell("finish")
        engines[2].tell("finish")
        assert outcome(stream) == ["stop"]
    assert processes[1].wait(30) == 0
