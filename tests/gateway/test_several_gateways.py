"""Two gateway processes over engine processes that a real directory lists: kills, freezes, joins."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from farshore.client import events
from farshore.client.sdk import Client
from farshore.controller.listen import free_port
from farshore.errors import TransportError
from farshore.model_spec import ModelSpec

from ..waiting import until

DEADLINE_S = 300.0
SPEC = ModelSpec().to_json()
ANY = "127.0.0.1:0"


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
    """gateways("HOST:PORT", …) -> the processes of as many `farshore gateway`s with a closed stdin, and their
    addresses. Killed after the test."""
    started = []

    def start(*listen):
        command = [sys.executable, "-P", "-m", "farshore.client.cli.main", "gateway"]
        command += ["--directory", directory.url, "--listen"]
        processes = [
            subprocess.Popen([*command, at], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            for at in listen
        ]
        started.extend(processes)
        lines = [process.stdout.readline() for process in processes]
        assert all("gateway of smollm2 at 127.0.0.1:" in line for line in lines)
        addresses = [line.rpartition(" ")[2].strip() for line in lines]
        for address in addresses:
            with Client(address) as client:
                until(client.is_serving)
        return processes, addresses

    yield start
    for process in started:
        process.kill()
        process.wait(60)
        process.stdout.close()


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
    processes, addresses = gateways(ANY, ANY)
    first, second, both = (Client(at, resume_s=0) for at in (addresses[0], addresses[1], addresses))
    with first, second, both:
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
        until(lambda: not both.is_serving())
        engines[1].tell("finish")
        engines[2].tell("finish")
        assert outcome(stream) == ["stop"]
    assert processes[1].wait(60) == 0


@pytest.mark.heavy
def test_answers_go_on_when_gateways_are_killed(cluster, gateways, both_sdks):
    """At another gateway, or at their own once it runs again: no token is lost, and none comes twice. The
    streams of both clients."""
    engine = cluster(0)
    processes, addresses = gateways(f"127.0.0.1:{free_port('127.0.0.1')}", ANY)
    elsewhere = [begun(sdk(addresses)) for sdk in both_sdks]
    # A gateway may take a while to start on a busy machine.
    waiting = [begun(sdk(addresses[0], resume_s=DEADLINE_S)) for sdk in both_sdks]
    engine.tell("more")
    assert [next(stream).token_id for stream in elsewhere + waiting] == [6] * 4
    processes[0].kill()
    processes[0].wait(60)
    engine.tell("more")
    assert [next(stream).token_id for stream in elsewhere] == [7, 7]
    with ThreadPoolExecutor(2) as pool:
        rest = [pool.submit(stream.result) for stream in waiting]
        gateways(addresses[0])
        processes[1].kill()
        engine.tell("more")
        assert [next(stream).token_id for stream in elsewhere] == [8, 8]
        engine.tell("finish")
        answers = [stream.result() for stream in elsewhere]
        answers += [result.result(DEADLINE_S) for result in rest]
    assert [answer.choices[0].token_ids for answer in answers] == [[5, 6, 7, 8]] * 4
    assert [answer.reason for answer in answers] == ["stop"] * 4
    assert [stream.losses for stream in elsewhere + waiting] == [2, 2, 1, 1]
