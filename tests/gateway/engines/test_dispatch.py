"""One gateway over several engines: refusals, epochs, losses, cancellation, draining."""

import asyncio
import contextlib

import grpc
import pytest
from grpc_health.v1 import health_pb2

from farshore.benchmarks.gateway.scripted import CallEnds
from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api

from ...waiting import until

LONG = list(range(1, 301))  # A whole block, so that an engine is preferred.
OVERLOADED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", "Overloaded")
BROKEN = CallEnds(grpc.StatusCode.UNAVAILABLE, "Socket closed")
LIMITS = Limits(probe_s=0.1, missed_probes=20, drain_s=0.1)
"""Engines that answer are not taken for frozen on a busy machine."""


@pytest.fixture
def cluster(start, harness, loop_thread):
    """(Harness, {worker: FakeEngine}) of a gateway over three engines."""
    with contextlib.ExitStack() as stack:
        engines = {f"dense-{i}-a": stack.enter_context(harness.engine(loop_thread)) for i in range(3)}
        records = [harness.dense(name, engine.address) for name, engine in engines.items()]
        directory = harness.ListedEngines(*records)
        farshore = start(directory=directory, limits=LIMITS)
        await_engines(farshore, engines)
        yield farshore, engines


def await_engines(farshore, names):
    """Waits until these take requests, and no other does."""
    until(lambda: {engine.worker for engine in farshore.gateway.engines.available()} == set(names))


def tokens(ids):
    return dict(text=None, tokens=api.TokenIds(ids=ids))


def await_sequence(engines):
    """(its engine's name, the sequence that arrived)"""
    until(lambda: not all(engine.idle for engine in engines.values()), "no sequence arrived")
    name = next(name for name, engine in engines.items() if not engine.idle)
    return name, engines[name].next_sequence()


def preferred(farshore, engines):
    """The engine that LONG prompts prefer."""
    call = farshore.generate(**tokens(LONG))
    name, sequence = await_sequence(engines)
    sequence.finish()
    list(call)
    return name


def test_equal_beginnings_share_an_engine_and_short_prompts_go_to_the_others(cluster):
    farshore, engines = cluster
    for engine in engines.values():
        engine.auto = ()
    first = preferred(farshore, engines)
    for last in range(10):
        list(farshore.generate(**tokens([*LONG, last + 1])))
    assert await_sequence({first: engines[first]})
    assert all(engine.idle for name, engine in engines.items() if name != first)
    for _ in range(9):
        assert engines[first].next_sequence()
    for _ in range(6):
        list(farshore.generate())
    assert [name for name, engine in engines.items() if engine.idle] == [first]


def test_an_engine_that_refuses_is_passed_over(cluster):
    farshore, engines = cluster
    full = preferred(farshore, engines)
    engines[full].refuses = OVERLOADED
    call = farshore.generate(**tokens(LONG))
    name, sequence = await_sequence(engines)
    assert name != full and sequence.request.epoch == 1
    sequence.tokens(10)
    sequence.finish()
    assert len(list(call)) == 3


def test_a_request_is_offered_to_a_bounded_number(cluster, harness, start):
    farshore, engines = cluster
    for engine in engines.values():
        engine.refuses = OVERLOADED
    failure = harness.failure_of(farshore.generate())
    assert (failure.code(), failure.details()) == OVERLOADED[:2]
    few = start(directory=farshore.directory, limits=Limits(engines_tried=2))
    await_engines(few, engines)
    engines["dense-2-a"].refuses = None
    engines["dense-2-a"].auto = ()
    ends = [failure_or_none(few) for _ in range(6)]
    assert OVERLOADED[0] in ends  # The two that refuse came first at least once.


def failure_or_none(farshore):
    try:
        list(farshore.generate())
    except grpc.RpcError as error:
        return error.code()
    return None


def test_a_connection_that_breaks_before_the_engine_confirms(cluster):
    """The engine may have taken the request all the same: the next one gets a later epoch."""
    farshore, engines = cluster
    broken = preferred(farshore, engines)
    engines[broken].refuses = BROKEN
    call = farshore.generate(**tokens(LONG))
    name, sequence = await_sequence(engines)
    assert name != broken
    assert sequence.request.epoch == 2 and list(sequence.request.prompt) == LONG
    sequence.finish()
    list(call)


def test_what_a_frozen_engine_has_not_confirmed_goes_elsewhere(cluster):
    """What it runs waits for it longer."""
    farshore, engines = cluster
    call = farshore.generate(**tokens(LONG))
    frozen, running = await_sequence(engines)
    engine = engines[frozen]
    thawed = asyncio.Event()

    async def late(request, context):
        await thawed.wait()
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    engine.confirms.clear()
    engine.health.answer = late
    other = farshore.generate(**tokens(LONG))
    _, sequence = await_sequence({name: e for name, e in engines.items() if name != frozen})
    assert sequence.request.epoch == 2
    sequence.finish()
    assert len(list(other)) == 2
    for event in (thawed, engine.confirms):
        farshore.loop_thread.loop.call_soon_threadsafe(event.set)
    running.tokens(10)
    running.finish()
    assert len(list(call)) == 3


def test_a_lost_engine_fails_what_it_has_taken_only(cluster, harness):
    farshore, engines = cluster
    calls = [farshore.generate(request_id=str(i)) for i in range(3)]
    running = dict(await_sequence(engines) for _ in range(3))
    assert running.keys() == engines.keys()
    lost, *others = running
    engines[lost].stop()
    failures = []
    for sequence in (running[name] for name in others):
        sequence.tokens(10)
        sequence.finish()
    for call in calls:
        try:
            assert len(list(call)) == 3
        except grpc.RpcError as error:
            failures.append(error)
    (failure,) = failures
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    assert lost in failure.details() and "was lost" in failure.details()
    assert failure.details().endswith("send the request again")
    for name in others:
        engines[name].auto = ()
    for _ in range(6):
        assert len(list(farshore.generate())) == 2


def test_cancel_reaches_the_engine_that_runs_the_request(cluster):
    farshore, engines = cluster
    calls = [farshore.generate(request_id=str(i)) for i in range(3)]
    running = dict(await_sequence(engines) for _ in range(3))
    for call in calls:
        next(call)
    for i in range(3):
        farshore.stub.Cancel(api.CancelRequest(request_id=str(i)), timeout=30)
    for name, sequence in running.items():
        assert {ended for ended, _ in engines[name].cancelled} == {sequence.request.sequence_id}
    for call in calls:
        assert [event.finished.choices[0].reason for event in call] == [api.FINISH_REASON_CANCELLED]


@pytest.mark.parametrize("how", ["closed", "draining", "loading"])
def test_a_closed_engine_keeps_what_it_has_and_gets_nothing_new(cluster, harness, how):
    farshore, engines = cluster
    name = preferred(farshore, engines)
    call = farshore.generate(**tokens(LONG))
    assert await_sequence(engines)[0] == name and next(call)
    sequence = engines[name].live.copy().popitem()[1]
    others = [harness.dense(other, engines[other].address) for other in engines if other != name]
    state = "serving" if how == "closed" else how
    shut = harness.dense(name, engines[name].address, state=state)
    farshore.directory.list(shut, *others, closed=[name] if how == "closed" else ())
    await_engines(farshore, engines.keys() - {name})
    for other in others:
        engines[other.worker].auto = ()
    for _ in range(4):
        assert len(list(farshore.generate(**tokens(LONG)))) == 2
    assert engines[name].idle
    sequence.tokens(10)
    sequence.finish()
    assert len(list(call)) == 2
