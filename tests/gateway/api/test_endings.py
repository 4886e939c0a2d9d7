"""Requests that end early: cancelled, failed, stalled."""

import grpc
import pytest

from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api


def _cancel(farshore, request_id):
    farshore.stub.Cancel(api.CancelRequest(request_id=request_id), timeout=30)


@pytest.mark.parametrize("ignores_cancel", [False, True])
def test_cancel_ends_the_stream(start, ignores_cancel):
    """The stream is cut if the engine ignores the Cancel."""
    farshore = start(limits=Limits(cancel_s=0.2))
    farshore.engine.ignores_cancel = ignores_cancel
    call = farshore.generate()
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10)
    request_id = next(call).accepted.request_id
    next(call)
    _cancel(farshore, request_id)
    done = list(call)[-1].finished
    assert done.choices[0].reason == api.FINISH_REASON_CANCELLED
    assert done.usage.completion_tokens == 1
    assert sequence.ended.wait(30)
    _cancel(farshore, request_id)


def test_cancel_unknown(farshore):
    with pytest.raises(grpc.RpcError) as failure:
        _cancel(farshore, "unknown")
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND
    assert "unknown or was forgotten" in failure.value.details()


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL]
)
def test_engine_failure_reaches_every_reader(farshore, harness, code):
    first = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10)
    second = farshore.generate(request_id="a")
    assert next(second).HasField("accepted")
    sequence.fail(code, "the pool has 5 tokens: shorten the prompt")
    for call in (first, second, farshore.generate(None, request_id="a")):
        failure = harness.failure_of(call)
        assert failure.code() == code
        assert failure.details() == "the pool has 5 tokens: shorten the prompt"


def test_a_failed_request_can_be_sent_again(farshore, harness):
    call = farshore.generate(request_id="a")
    farshore.engine.next_sequence().fail(grpc.StatusCode.UNAVAILABLE, "shard lost")
    assert "shard lost" in harness.failure_of(call).details()
    farshore.engine.auto = (10,)
    assert len(list(farshore.generate(request_id="a"))) == 3


def test_engine_ends_without_finishing(farshore, harness):
    call = farshore.generate()
    farshore.engine.next_sequence().close()
    failure = harness.failure_of(call)
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    assert "without finishing" in failure.details()


def test_engine_goes_away(farshore, harness):
    call = farshore.generate()
    farshore.engine.next_sequence()
    next(call)
    farshore.stop_engine()
    failure = harness.failure_of(call)
    assert failure.code() == grpc.StatusCode.UNAVAILABLE
    assert f"({farshore.engine_address}) was lost" in failure.details()
    assert failure.details().endswith("send the request again")


def test_engine_that_stalls(start, harness):
    farshore = start(limits=Limits(stall_s=0.05))
    failure = harness.failure_of(farshore.generate())
    assert failure.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "sent nothing for 0.05 s" in failure.details()
    assert farshore.engine.next_sequence().ended.wait(30)


def test_stopping_the_gateway_fails_live_requests(harness, loop_thread, served):
    """The failure tells how many tokens came and how to send the request again; it is no normal end."""
    with harness.gateway(loop_thread, served) as farshore:
        call = farshore.generate()
        sequence = farshore.engine.next_sequence()
        sequence.tokens(10, 11)
        assert [next(call).WhichOneof("kind") for _ in range(3)] == ["accepted", "token", "token"]
        loop_thread.run(farshore.gateway.stop())
        failure = harness.failure_of(call)
        assert failure.code() == grpc.StatusCode.UNAVAILABLE
        assert "2 tokens" in failure.details() and "send the prompt again" in failure.details()
        assert "request_id" in failure.details() and "resume_from 0" in failure.details()
        assert sequence.ended.wait(30)
