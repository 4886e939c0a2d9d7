"""BatchGenerate: whole answers, a status for each request, and limits."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api


def _asked(text="Hello", **fields):
    return api.GenerateRequest(text=text, sampling=api.Sampling(**fields.pop("sampling", {})), **fields)


@pytest.fixture
def batch(start):
    """batch(*requests, limits=…) -> the future response, and the Harness."""
    started = []

    def send(*requests, limits=None):
        if not started or limits is not None:
            started.append(start(**({} if limits is None else dict(limits=limits))))
        farshore = started[-1]
        request = api.BatchGenerateRequest(requests=requests)
        return farshore.stub.BatchGenerate.future(request, timeout=30), farshore

    return send


def _name(detail):
    return detail.type_url.rpartition(".")[2]


def _refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    return caught.value


def test_answers_are_whole_and_in_the_order_of_the_requests(batch, served):
    call, farshore = batch(_asked("One"), _asked("Two", sampling=dict(n=2, temperature=1.0, logprobs=1)))
    # Threads tokenize the prompts, so either may come first.
    arrived = [farshore.engine.next_sequence() for _ in range(2)]
    one, two = sorted(arrived, key=lambda sequence: sequence.request.sampling.n)
    paris, rome = served.tokenizer.encode(" Paris"), served.tokenizer.encode(" Rome")
    for choice, ids in enumerate((rome, paris)):
        for token_id in ids:
            two.token(token_id=token_id, choice=choice, logprob=-0.5)
        two.finish(api.FINISH_REASON_LENGTH, choice=choice)
    one.tokens(*paris)
    one.finish()
    first, second = call.result().results
    (choice,) = first.answer.choices
    assert (choice.text, list(choice.token_ids)) == (" Paris", paris)
    assert choice.reason == api.FINISH_REASON_STOP and not choice.tokens
    assert first.answer.usage.prompt_tokens == len(one.request.prompt)
    assert first.answer.usage.completion_tokens == len(paris)
    assert [shard.process_id for shard in first.answer.shards] == [7]
    assert [choice.text for choice in second.answer.choices] == [" Rome", " Paris"]
    assert {choice.reason for choice in second.answer.choices} == {api.FINISH_REASON_LENGTH}
    assert [[token.logprob for token in choice.tokens] for choice in second.answer.choices] == [
        [-0.5] * len(rome),
        [-0.5] * len(paris),
    ]


def test_a_request_that_fails_leaves_the_others_alone(batch, served):
    """Refused before and after its prompt is tokenized, and by the engine."""
    call, farshore = batch(
        _asked(sampling=dict(top_p=3.0)),
        _asked(None, tokens=api.TokenIds(ids=[served.config.vocab])),
        _asked("fails"),
        _asked("runs"),
    )
    for _ in range(2):
        sequence = farshore.engine.next_sequence()
        if list(sequence.request.prompt) == served.tokenizer.encode("fails"):
            sequence.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", kind="Overloaded")
        else:
            sequence.tokens(10)
            sequence.finish()
    *failed, last = call.result().results
    assert list(last.answer.choices[0].token_ids) == [10]
    # A reader of google.rpc.Status reads them too.
    statuses = [status_pb2.Status.FromString(result.error.SerializeToString()) for result in failed]
    invalid, full = grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert [status.code for status in statuses] == [invalid, invalid, full]
    details = [{_name(detail): detail for detail in status.details} for status in statuses]
    assert [set(found) for found in details] == [
        {"ErrorInfo", "BadRequest"},
        {"ErrorInfo", "BadRequest"},
        {"ErrorInfo", "RetryInfo"},
    ]
    wrong = [error_details_pb2.BadRequest(), error_details_pb2.BadRequest()]
    for found, unpacked in zip(details, wrong, strict=False):
        found["BadRequest"].Unpack(unpacked)
    assert [bad.field_violations[0].field for bad in wrong] == ["sampling.top_p", "prompt"]


def test_what_is_beyond_the_live_requests_is_told_to_come_again(batch):
    call, farshore = batch(_asked(), _asked(), limits=Limits(max_live_requests=1, drain_s=0.1))
    sequence = farshore.engine.next_sequence()
    sequence.finish()
    first, second = call.result().results
    assert first.HasField("answer")
    assert second.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "RetryInfo" in map(_name, second.error.details)


@pytest.mark.parametrize("count", [0, 3])
def test_the_number_of_requests_is_bounded(batch, count):
    call, farshore = batch(*[_asked()] * count, limits=Limits(batch_requests=2, drain_s=0.1))
    error = _refused(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{count} requests: give 1 to 2" in error.details()
    assert farshore.engine.idle


def test_the_size_of_the_answers_is_bounded(batch):
    limits = Limits(batch_values=100, drain_s=0.1)
    asked = [_asked(sampling=dict(max_tokens=tokens)) for tokens in (60, 41, 40)]
    call, farshore = batch(*asked, limits=limits)
    for _ in range(2):
        farshore.engine.next_sequence().finish()
    first, second, third = call.result().results
    assert first.HasField("answer") and third.HasField("answer")
    assert "41 tokens and alternatives and its batch has room for 40" in second.error.message


@pytest.mark.parametrize("raw", [b"\xff" * 10, b"\x0a\x05ab", b"\x0a\x00" * 300_000])
def test_bytes_that_are_no_batch(start, raw):
    farshore = start()
    call = farshore.channel.unary_unary("/farshore.inference.v1.InferenceService/BatchGenerate", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        call(raw, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert farshore.engine.idle


def test_one_that_is_no_request_is_refused_alone(batch):
    call, farshore = batch(
        _asked(sampling=dict(stop=["x"] * 17)), _asked(resume_from=1, request_id="a"), _asked()
    )
    farshore.engine.next_sequence().finish()
    assert [result.WhichOneof("outcome") for result in call.result().results] == ["error", "error", "answer"]


def test_a_request_to_go_on_with_is_refused_before_it_runs(batch):
    resume = api.Resume(received=[api.TokenIds(ids=[10])], seed=1)
    call, farshore = batch(_asked(resume=resume), _asked(text="Another"))
    sequence = farshore.engine.next_sequence()
    sequence.finish()
    refused, answered = call.result().results
    assert "resume" in refused.error.message and answered.WhichOneof("outcome") == "answer"
    assert farshore.engine.idle


def test_the_requests_end_with_the_call(batch):
    call, farshore = batch(_asked(), _asked())
    sequences = [farshore.engine.next_sequence() for _ in range(2)]
    call.cancel()
    for sequence in sequences:
        assert sequence.ended.wait(30)


def test_a_repeated_batch_gets_the_answers_of_its_named_requests(batch):
    asked = [_asked(request_id="a"), _asked(request_id="b")]
    call, farshore = batch(*asked)
    for _ in asked:
        sequence = farshore.engine.next_sequence()
        sequence.tokens(10)
        sequence.finish()
    again, _ = batch(*asked)
    assert again.result().results == call.result().results
    assert farshore.engine.idle


def test_log_probabilities_of_prompts_are_refused(batch):
    call, _ = batch(_asked(sampling=dict(prompt_logprobs=1)))
    (result,) = call.result().results
    assert result.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "use Generate" in result.error.message
