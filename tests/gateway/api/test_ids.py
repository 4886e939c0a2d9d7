"""Ids that clients choose are keys of the request log only: no other component uses or shows them."""

import logging
import re

import grpc
import pytest

from farshore.gateway.limits import Limits
from farshore.proto import cluster_pb2
from farshore.proto import inference_pb2 as api

HOSTILE = [
    "a",
    "a/1",
    "a/0",
    "a\n",
    "A",
    " a",
    "a\0",
    "..",
    "日本",
    "🌍" * 128,
    "x" * 128,
    "%s{}",
    "00000000-1",
]


def _cancel(farshore, request_id):
    farshore.stub.Cancel(api.CancelRequest(request_id=request_id), timeout=30)


def test_hostile_ids_name_separate_requests(farshore):
    """All run at once, with two choices each; cancelling some does not end the others."""
    calls, sequences = {}, {}
    for request_id in HOSTILE:
        calls[request_id] = farshore.generate(request_id=request_id, sampling=dict(n=2, temperature=1.0))
        sequences[request_id] = farshore.engine.next_sequence()
        assert next(calls[request_id]).accepted.request_id == request_id
    ids = [sequence.request.sequence_id for sequence in sequences.values()]
    assert len(set(ids)) == len(HOSTILE)
    assert all(re.fullmatch(r"[0-9a-f]{16}-[1-9][0-9]*", sequence_id) for sequence_id in ids)
    for request_id in HOSTILE[::2]:
        _cancel(farshore, request_id)
        (done,) = calls.pop(request_id)
        assert {choice.reason for choice in done.finished.choices} == {api.FINISH_REASON_CANCELLED}
    assert {sequence_id for sequence_id, _ in farshore.engine.cancelled} == set(ids[::2])
    for request_id, call in calls.items():
        for choice in range(2):
            sequences[request_id].tokens(10, choice=choice)
            sequences[request_id].finish(choice=choice)
        *tokens, done = call
        assert len(tokens) == 2
        assert {choice.reason for choice in done.finished.choices} == {api.FINISH_REASON_STOP}


def test_a_sequence_id_does_not_name_a_request(farshore, harness):
    """Status shows sequence ids, so they must not permit reading or cancelling a request."""
    call = farshore.generate(request_id="secret")
    sequence = farshore.engine.next_sequence().request.sequence_id
    next(call)
    with pytest.raises(grpc.RpcError) as refused:
        _cancel(farshore, sequence)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert (
        harness.failure_of(farshore.generate(None, request_id=sequence)).code() == grpc.StatusCode.NOT_FOUND
    )


def test_sequence_ids_of_different_gateways_differ(start):
    seen = set()
    for _ in range(3):
        farshore = start()
        farshore.engine.auto = ()
        list(farshore.generate(request_id="a"))
        seen.add(farshore.engine.next_sequence().request.sequence_id)
    assert len(seen) == 3


def test_no_id_and_no_prompt_in_what_the_engine_gets_or_the_log(farshore, harness, caplog):
    """An exception in the gateway is logged with the sequence id only."""
    with caplog.at_level(logging.DEBUG, logger="farshore"):
        call = farshore.generate("a private prompt", request_id="secret-id")
        sequence = farshore.engine.next_sequence()
        sequence.token(token_id=1, choice=7)  # An unknown choice, which raises in the gateway.
        failure = harness.failure_of(call)
    assert (
        failure.code() == grpc.StatusCode.INTERNAL and failure.details() == "the gateway failed; see its log"
    )
    assert "secret-id" not in str(sequence.request)
    assert sequence.request.sequence_id in caplog.text
    assert "secret-id" not in caplog.text and "private" not in caplog.text


LONG = ["x" * 1_000_000, "\n" * 5000, "🌍" * 300_000, "'\\" * 1000]


@pytest.mark.parametrize("text", LONG, ids=["x", "lines", "globes", "quotes"])
@pytest.mark.parametrize("field", ["model", "cancel", "request_id", "cache_salt", "stop", "role", "resume"])
def test_client_strings_in_messages_are_shortened(start, harness, field, text):
    farshore = start(limits=Limits(request_id_chars=1 << 20 if field == "resume" else 128, drain_s=0.1))
    if field == "cancel":
        with pytest.raises(grpc.RpcError) as refused:
            _cancel(farshore, text)
        failure = refused.value
    else:
        fields = {
            "role": dict(text=None, chat=api.Chat(messages=[api.Message(role=text, content="x")])),
            "stop": dict(sampling=dict(stop=[text])),
            "resume": dict(text=None, request_id=text),
        }
        failure = harness.failure_of(farshore.generate(**fields.get(field, {field: text})))
    assert failure.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert len(failure.details()) <= 400


def test_an_engines_message_is_shortened(farshore, harness):
    call = farshore.generate()
    farshore.engine.next_sequence().fail(grpc.StatusCode.INVALID_ARGUMENT, "x" * 5000)
    assert len(harness.failure_of(call).details()) == 1000


@pytest.mark.parametrize(
    "code, expected",
    [
        (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL),
        (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL),
        (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL),
        (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_a_failure_between_gateway_and_engine_names_the_engine(farshore, harness, code, expected):
    call = farshore.generate()
    farshore.engine.next_sequence().fail(code, "who are you?", kind=None)
    failure = harness.failure_of(call)
    assert failure.code() == expected
    name = f"dense worker dense-0-a ({farshore.engine_address})"
    lost = f"{name} was lost (who are you?): send the request again"
    assert failure.details() == (lost if expected == grpc.StatusCode.UNAVAILABLE else f"{name}: who are you?")


def test_an_event_of_a_newer_engine_is_ignored(farshore):
    call = farshore.generate()
    sequence = farshore.engine.next_sequence()
    sequence._put(cluster_pb2.SequenceEvent())
    sequence.finish()
    assert [event.WhichOneof("kind") for event in call] == ["accepted", "finished"]
