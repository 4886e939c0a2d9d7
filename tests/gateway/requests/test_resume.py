"""Readers that reconnect, connect late, or never reconnect."""

import threading

import grpc
import pytest

from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api

from ...waiting import until


def _read(call, count):
    return [next(call) for _ in range(count)]


def test_reconnect_goes_on_where_it_was(farshore, harness):
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10, 11, 12)
    _read(call, 4)
    call.cancel()
    resumed = farshore.generate(None, request_id="a", resume_from=2)
    assert next(resumed).accepted.request_id == "a"
    assert next(resumed).token.index == 2
    sequence.tokens(13)
    assert next(resumed).token.index == 3
    sequence.finish()
    assert next(resumed).finished.usage.completion_tokens == 4
    assert farshore.engine.idle


def test_two_readers_see_the_same(farshore):
    first = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10, 11)
    _read(first, 3)
    second = farshore.generate(request_id="a")
    sequence.tokens(12)
    sequence.finish()
    assert [event.token.token_id for event in second if event.HasField("token")] == [10, 11, 12]
    assert [event.token.token_id for event in first if event.HasField("token")] == [12]


def test_replay_after_the_end(farshore, harness):
    farshore.engine.auto = (10, 11, 12)
    events = list(farshore.generate(request_id="a"))
    assert list(farshore.generate(None, request_id="a")) == events
    assert list(farshore.generate(request_id="a", resume_from=3)) == [events[0], events[-1]]
    farshore.engine.next_sequence()
    assert farshore.engine.idle


def test_ended_requests_are_forgotten_with_time(start, harness):
    now_s = [1000.0]
    farshore = start(limits=Limits(replay_s=60), clock=lambda: now_s[0])
    farshore.engine.auto = (10,)
    list(farshore.generate(request_id="a"))
    now_s[0] += 59
    list(farshore.generate(None, request_id="a"))
    now_s[0] += 2
    failure = harness.failure_of(farshore.generate(None, request_id="a"))
    assert failure.code() == grpc.StatusCode.NOT_FOUND
    assert "resume_from 0" in failure.details()


@pytest.mark.parametrize("limits", [Limits(replay_requests=1), Limits(replay_bytes=400)])
def test_ended_requests_are_bounded(start, harness, limits):
    farshore = start(limits=limits)
    farshore.engine.auto = (10, 11)
    list(farshore.generate(request_id="a"))
    list(farshore.generate(request_id="b"))
    assert harness.failure_of(farshore.generate(None, request_id="a")).code() == grpc.StatusCode.NOT_FOUND
    assert harness.indices_of(farshore.generate(None, request_id="b")) == [0, 1]


@pytest.mark.parametrize("ended", [False, True])
def test_resume_beyond_the_last_token(farshore, harness, ended):
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10)
    _read(call, 2)
    if ended:
        sequence.finish()
        list(call)
    failure = harness.failure_of(farshore.generate(request_id="a", resume_from=2))
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "has 1 tokens" in failure.details()


@pytest.mark.parametrize(
    "fields",
    [dict(text="Another"), dict(sampling=dict(seed=1)), dict(text=None, tokens=api.TokenIds(ids=[5]))],
)
def test_an_id_names_one_prompt(farshore, harness, fields):
    call = farshore.generate(request_id="a")
    next(call)
    failure = harness.failure_of(farshore.generate(request_id="a", **fields))
    assert failure.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "choose a new id" in failure.details()


def test_unknown_id_to_resume(farshore, harness):
    for fields in (dict(text=None), dict(resume_from=1)):
        failure = harness.failure_of(farshore.generate(request_id="x", **fields))
        assert failure.code() == grpc.StatusCode.NOT_FOUND


def test_anonymous_request_ends_with_its_client(farshore):
    call = farshore.generate()
    sequence = farshore.engine.next_sequence()
    next(call)
    call.cancel()
    assert sequence.ended.wait(30)


def test_named_request_ends_after_its_grace(start):
    farshore = start(limits=Limits(grace_s=0.01))
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    next(call)
    call.cancel()
    assert sequence.ended.wait(30)


def test_an_abandoned_request_is_forgotten(start, harness):
    """Its part of an answer would be taken for the whole."""
    farshore = start(limits=Limits(grace_s=0.01))
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10, 11)
    _read(call, 3)
    call.cancel()
    assert sequence.ended.wait(30)
    for fields in (dict(text=None), dict(resume_from=2), dict(text=None, resume_from=2)):
        failure = harness.failure_of(farshore.generate(request_id="a", **fields))
        assert failure.code() == grpc.StatusCode.NOT_FOUND
    again = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10, 11, 12)
    sequence.finish()
    assert harness.indices_of(again) == [0, 1, 2]


def test_a_request_that_is_being_abandoned_can_be_sent_again(start, harness):
    farshore = start(limits=Limits(grace_s=0.01, cancel_s=0.5))
    farshore.engine.ignores_cancel = True
    call = farshore.generate(request_id="a")
    first = farshore.engine.next_sequence()
    next(call)
    call.cancel()
    until(lambda: farshore.engine.cancelled)
    again = farshore.generate(request_id="a")
    second = farshore.engine.next_sequence()
    assert first.ended.wait(30)
    second.tokens(10)
    second.finish()
    list(again)
    assert harness.indices_of(farshore.generate(None, request_id="a")) == [0]


def test_a_second_reader_keeps_a_request_alive(start):
    farshore = start(limits=Limits(grace_s=0.01))
    first, second = farshore.generate(request_id="a"), farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    next(first)
    next(second)
    first.cancel()
    sequence.tokens(10)
    sequence.finish()
    assert [event.WhichOneof("kind") for event in second] == ["token", "finished"]


def test_the_same_request_twice_at_once_runs_once(farshore):
    farshore.engine.auto = (10,)
    calls = [farshore.generate("word " * 500, request_id="a") for _ in range(4)]
    counts = []
    readers = [threading.Thread(target=lambda c=call: counts.append(len(list(c)))) for call in calls]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert counts == [3] * 4
    farshore.engine.next_sequence()
    assert farshore.engine.idle
