"""The gateway's health follows the engine's: a real process that fails, is killed, freezes and returns."""

import re
import signal
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore.gateway.limits import Limits

from ...waiting import until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "farshore.inference.v1.InferenceService")


@pytest.fixture
def watched(start, engines):
    """(Harness, its EngineProcess, wait_for(status), which waits for the status of both health services)"""
    engine = engines()
    # An engine that answers is not taken for frozen on a busy machine, and none is lost here.
    limits = Limits(probe_s=0.1, missed_probes=20, lost_s=600, cancel_s=0.5, drain_s=0.1)
    farshore = start(engine_address=engine.address, limits=limits)
    stub = health_pb2_grpc.HealthStub(farshore.channel)

    def wait_for(status):
        for service in SERVICES:
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert any(reply.status == status for reply in watch)
            watch.cancel()

    wait_for(SERVING)
    return farshore, engine, wait_for


def _refused(harness, farshore):
    failure = harness.failure_of(farshore.generate())
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    assert farshore.engine_address in failure.details() and "dense worker" in failure.details()
    return failure.details()


def test_an_engine_that_cannot_go_on(watched, harness):
    farshore, engine, wait_for = watched
    engine.tell("failed")
    wait_for(NOT_SERVING)
    assert "takes nothing new" in _refused(harness, farshore)
    engine.tell("serving")
    wait_for(SERVING)
    engine.tell("finish")
    assert len(list(farshore.generate())) == 3


def test_a_probe_that_fails_ends_no_watch(watched, monkeypatch, caplog):
    farshore, engine, wait_for = watched
    (known,) = farshore.gateway.engines.available()
    failed = []

    async def ask():
        monkeypatch.undo()
        failed.append(None)
        raise KeyError("dreaming")

    monkeypatch.setattr(known.health, "_ask", ask)
    until(lambda: failed)
    engine.tell("failed")
    wait_for(NOT_SERVING)
    assert [entry.message for entry in caplog.records] == [f"{known.client.name} can't be probed"]


def test_a_killed_engine_and_its_successor(watched, harness, engines):
    farshore, engine, wait_for = watched
    call = farshore.generate(request_id="a")
    assert next(call).HasField("accepted") and next(call).HasField("token")
    engine.kill()
    failure = harness.failure_of(call)
    assert failure.code() == grpc.StatusCode.UNAVAILABLE and engine.address in failure.details()
    wait_for(NOT_SERVING)
    assert "is gone" in _refused(harness, farshore)
    engines(engine.port).tell("finish")
    wait_for(SERVING)
    assert len(list(farshore.generate(request_id="a"))) == 3


def test_a_frozen_engine_keeps_what_it_runs(watched, harness):
    farshore, engine, wait_for = watched
    call = farshore.generate(request_id="a")
    assert next(call).HasField("accepted") and next(call).HasField("token")
    engine.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(NOT_SERVING)
        assert re.search(r"has not answered for \d+(\.\d)? s", _refused(harness, farshore))
        reader = farshore.generate(None, request_id="a")
        assert next(reader).HasField("accepted") and next(reader).HasField("token")
    finally:
        engine.process.send_signal(signal.SIGCONT)
    wait_for(SERVING)
    engine.tell("finish")
    for stream in (call, reader):
        assert [event.WhichOneof("kind") for event in stream] == ["finished"]


def test_a_frozen_engine_is_lost_in_the_end(start, engines, harness):
    engine = engines()
    limits = Limits(probe_s=0.1, missed_probes=20, lost_s=2, cancel_s=0.5, drain_s=0.1)
    farshore = start(engine_address=engine.address, limits=limits)
    until(lambda: farshore.gateway.engines.problem is None)
    call = farshore.generate(request_id="a")
    assert next(call).HasField("accepted") and next(call).HasField("token")
    engine.process.send_signal(signal.SIGSTOP)
    try:
        failure = harness.failure_of(call)
        assert failure.code() == grpc.StatusCode.UNAVAILABLE
        assert "was lost (it answered nothing for 2 s): send the request again" in failure.details()
    finally:
        engine.process.send_signal(signal.SIGCONT)
    assert any(
        reply.status == SERVING
        for reply in health_pb2_grpc.HealthStub(farshore.channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=60
        )
    )
    engine.tell("finish")
    assert len(list(farshore.generate(request_id="a"))) == 3


def test_a_gateway_whose_engine_never_ran(start, harness):
    farshore = start(engine_address="127.0.0.1:1")
    stub = health_pb2_grpc.HealthStub(farshore.channel)
    for service in SERVICES:
        assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status == NOT_SERVING
    _refused(harness, farshore)


def test_an_engine_that_refuses_probes_is_alive(start, harness, loop_thread):
    """An engine's server refuses all calls, health probes too, while its threads are busy."""
    farshore = start(limits=Limits(probe_s=0.1, missed_probes=1000, drain_s=0.1))
    refused = threading.Semaphore(0)

    async def refuse(request, context):
        refused.release()
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")

    farshore.engine.health.answer = refuse
    for _ in range(2):  # The gateway has read the first refusal before it asks again.
        assert refused.acquire(timeout=60)
    farshore.engine.auto = ()
    assert len(list(farshore.generate())) == 2
