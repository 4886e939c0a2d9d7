"""Readers that read slowly or not at all, and the bounds of readers, calls and their memory."""

import grpc
import pytest

from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api
from farshore.proto import inference_pb2_grpc

from ...waiting import until

# Many times the number of events that fit into the buffers between gateway and reader, if these don't grow.
MANY = 2000


def _overflow_buffers(sequence):
    for _ in range(MANY // 1000):
        sequence.tokens(*[10] * 1000)


@pytest.fixture
def small_window():
    """small_window(address) -> a stub whose connection buffers at most 4 KiB of unread data."""
    channels = []

    def connect(address):
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        channels.append(grpc.insecure_channel(address, options=options))
        return inference_pb2_grpc.InferenceServiceStub(channels[-1])

    yield connect
    for channel in channels:
        channel.close()


def test_a_reader_that_stalls_is_cut_off_and_others_are_not(start, harness, small_window):
    farshore = start(limits=Limits(reader_stall_s=2, readers_per_request=2, drain_s=0.1))
    asked = api.GenerateRequest(text="Hello", request_id="a", sampling=api.Sampling(max_tokens=MANY))
    stalled = small_window(farshore.address).Generate(asked, timeout=30)
    sequence = farshore.engine.next_sequence()
    next(stalled)
    other = farshore.generate(None, request_id="a")
    _overflow_buffers(sequence)
    sequence.finish()
    assert harness.indices_of(other) == list(range(MANY))
    until(lambda: not farshore.gateway.calls)
    failure = harness.failure_of(stalled)
    assert failure.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "nothing was read for 2 s" in failure.details() and "resume_from" in failure.details()


def test_a_shutdown_does_not_wait_for_a_stalled_reader(harness, loop_thread, served, small_window):
    """The reader gets a failure when it reads on."""
    limits = Limits(drain_s=0.1, shutdown_s=0.1)
    with harness.gateway(loop_thread, served, limits=limits) as farshore:
        asked = api.GenerateRequest(text="Hello", sampling=api.Sampling(max_tokens=MANY))
        stalled = small_window(farshore.address).Generate(asked, timeout=30)
        sequence = farshore.engine.next_sequence()
        next(stalled)
        _overflow_buffers(sequence)
        loop_thread.run(farshore.gateway.stop())
        assert sequence.ended.wait(30)
        assert harness.failure_of(stalled).code() == grpc.StatusCode.UNAVAILABLE


def test_a_shutdown_does_not_wait_for_requests_without_readers(harness, loop_thread, served):
    limits = Limits(drain_s=600)  # More than the test would wait for.
    with harness.gateway(loop_thread, served, limits=limits) as farshore:
        call = farshore.generate(request_id="a")
        sequence = farshore.engine.next_sequence()
        next(call)
        call.cancel()
        until(lambda: not farshore.gateway.calls)
        loop_thread.run(farshore.gateway.stop())
        assert sequence.ended.wait(30)


def test_a_slow_reader_gets_everything(start, harness):
    farshore = start()
    call = farshore.generate(request_id="a", sampling=dict(max_tokens=MANY))
    sequence = farshore.engine.next_sequence()
    _overflow_buffers(sequence)
    sequence.finish()
    fast = list(farshore.generate(None, request_id="a"))
    assert list(call) == fast
    assert len(fast) == MANY + 2


def test_readers_of_one_request_are_bounded(start, harness):
    farshore = start(limits=Limits(readers_per_request=2, drain_s=0.1))
    calls = [farshore.generate(request_id="a") for _ in range(2)]
    for call in calls:
        next(call)
    failure = harness.failure_of(farshore.generate(None, request_id="a"))
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 readers" in failure.details()
    assert dict(failure.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    farshore.engine.next_sequence().finish()
    assert [len(list(call)) for call in calls] == [1, 1]
    assert len(list(farshore.generate(None, request_id="a"))) == 2


@pytest.mark.parametrize("ended", [False, True])
def test_readers_of_all_requests_are_bounded(start, harness, small_window, ended):
    """A reader whose buffers are full is one, even after the request's end."""
    farshore = start(limits=Limits(max_readers=1, max_live_requests=8, drain_s=0.1))
    asked = api.GenerateRequest(text="Hello", request_id="a", sampling=api.Sampling(max_tokens=MANY))
    call = small_window(farshore.address).Generate(asked, timeout=60)
    sequence = farshore.engine.next_sequence()
    _overflow_buffers(sequence)
    next(call)
    if ended:
        sequence.finish()
    for text in ("Hello", None):
        failure = harness.failure_of(farshore.generate(text, request_id="a"))
        assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 calls are open" in failure.details()
    if not ended:
        sequence.finish()
    assert len(list(call)) == MANY + 1
    assert harness.indices_of(farshore.generate(None, request_id="a")) == list(range(MANY))


def test_messages_of_open_calls_are_bounded(start, harness):
    farshore = start(limits=Limits(open_bytes=50_000, drain_s=0.1))
    call = farshore.generate("word " * 6000)
    next(call)
    failure = harness.failure_of(farshore.generate("word " * 6000))
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "bytes of prompts" in failure.details()
    farshore.engine.next_sequence().finish()
    list(call)
    farshore.engine.auto = ()
    assert len(list(farshore.generate("word " * 6000))) == 2


def test_values_of_live_requests_are_bounded(start, harness):
    farshore = start(limits=Limits(live_values=1000, drain_s=0.1))
    call = farshore.generate(sampling=dict(max_tokens=100, logprobs=4))
    next(call)
    refused = dict(max_tokens=101, logprobs=4)
    failure = harness.failure_of(farshore.generate(sampling=refused))
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "500 tokens and alternatives" in failure.details()
    farshore.engine.next_sequence().finish()
    list(call)
    farshore.engine.auto = ()
    assert len(list(farshore.generate(sampling=refused))) == 2


def test_ended_requests_are_forgotten_by_a_timer(start):
    """Without any further call."""
    farshore = start(limits=Limits(replay_s=0.05, drain_s=0.1))
    farshore.engine.auto = (10, 11)
    for name in "abc":
        list(farshore.generate(request_id=name))
    until(lambda: not farshore.gateway._log.ended_bytes)
