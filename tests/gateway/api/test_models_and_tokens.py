"""Tokenize, Detokenize, ListModels, GetModel, and the details of errors."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from farshore.proto import inference_pb2 as api

MESSAGES = [{"role": "user", "content": "Hi"}]


def details(error):
    """The details of a failed call, by the names of their types."""
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest)
    found = {}
    for detail in rpc_status.from_call(error).details:
        for kind in kinds:
            if detail.Is(kind.DESCRIPTOR):
                found[kind.DESCRIPTOR.name] = message = kind()
                detail.Unpack(message)
    return found


def test_tokens_of_texts_and_chats(farshore, served, encode_chat):
    stub = farshore.stub
    assert list(stub.Tokenize(api.TokenizeRequest(text="Hello world")).ids) == served.tokenizer.encode(
        "Hello world"
    )
    chat = api.Chat(messages=[api.Message(**message) for message in MESSAGES])
    assert list(stub.Tokenize(api.TokenizeRequest(chat=chat)).ids) == encode_chat(MESSAGES)
    ids = served.tokenizer.encode("Hello world")
    assert stub.Detokenize(api.DetokenizeRequest(ids=ids)).text == "Hello world"
    assert farshore.engine.idle


@pytest.mark.parametrize(
    "call",
    [
        lambda stub: stub.Tokenize(api.TokenizeRequest()),
        lambda stub: stub.Tokenize(api.TokenizeRequest(text="x" * 3_000_000)),
        lambda stub: stub.Tokenize(api.TokenizeRequest(text="a", model="other")),
        lambda stub: stub.Detokenize(api.DetokenizeRequest(ids=[1 << 20])),
        lambda stub: stub.Detokenize(api.DetokenizeRequest(ids=[1], model="other")),
    ],
)
def test_what_is_too_large_or_unknown_is_refused(farshore, call):
    with pytest.raises(grpc.RpcError) as caught:
        call(farshore.stub)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_models_by_each_name(farshore, served):
    models = farshore.stub.ListModels(api.ListModelsRequest()).models
    assert [model.name for model in models] == list(served.spec.names)
    model = farshore.stub.GetModel(api.GetModelRequest(name="smollm2"))
    assert (model.max_positions, model.vocabulary) == (served.config.max_positions, served.config.vocab)
    with pytest.raises(grpc.RpcError) as caught:
        farshore.stub.GetModel(api.GetModelRequest(name="gpt-9"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)["ErrorInfo"].reason == "NOT_FOUND"


def test_a_wrong_field_is_named_in_the_details(farshore, harness):
    error = harness.failure_of(farshore.generate("Hi", sampling={"top_p": 3.0}))
    found = details(error)
    (violation,) = found["BadRequest"].field_violations
    assert violation.field == "sampling.top_p" and "top_p 3" in violation.description
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == ("INVALID_REQUEST", "farshore")
    assert "RetryInfo" not in found


def test_an_overload_says_when_to_try_again(start, harness):
    from farshore.gateway.limits import Limits

    farshore = start(limits=Limits(max_live_requests=1, drain_s=0.1))
    first = farshore.generate("Hi")
    farshore.engine.next_sequence()
    error = harness.failure_of(farshore.generate("Hi"))
    found = details(error)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert found["ErrorInfo"].reason == "OVERLOADED"
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == Limits().retry_after_ms
    first.cancel()
