"""Readers that go on from the tokens they have, at a gateway that knows their request or another one."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import ResumeMismatch
from farshore.gateway.requests.resume import Received
from farshore.proto import inference_pb2 as api

DRAWN = dict(temperature=1.0, n=2)


def _resume(*received, **fields):
    return api.Resume(received=[api.TokenIds(ids=ids) for ids in received], **fields)


def _tokens(events):
    return [(event.token.choice, event.token.token_id) for event in events if event.HasField("token")]


def _reason(failure):
    info = error_details_pb2.ErrorInfo()
    next(detail for detail in rpc_status.from_call(failure).details if detail.Unpack(info))
    return info.reason


def test_a_known_request_goes_on(farshore):
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10, 11, 12)
    next(call)
    call.cancel()
    resumed = farshore.generate(None, request_id="a", resume=_resume([10, 11]))
    assert next(resumed).HasField("accepted") and next(resumed).token.index == 2
    sequence.tokens(13)
    sequence.finish()
    assert _tokens(resumed) == [(0, 13)]
    assert farshore.engine.idle


def test_another_gateway_computes_the_answer_again_and_sends_the_rest(start):
    """Its choices come in another order. It draws with the seed that the first gateway chose."""
    one, other = start(), start()
    call = one.generate(request_id="a", sampling=DRAWN)
    first = one.engine.next_sequence()
    first.tokens(10, 11, choice=0)
    first.tokens(20, choice=1)
    seed = next(call).accepted.seed
    assert seed == first.request.sampling.seed
    received = _resume([10, 11], [20], seed=seed)
    call.cancel()
    resumed = other.generate(request_id="a", sampling=DRAWN, resume=received)
    again = other.engine.next_sequence()
    assert again.request.sampling.seed == seed
    again.prefill(1, 2)
    again.tokens(20, 21, choice=1)
    again.tokens(10, 11, 12, choice=0)
    for choice in (0, 1):
        again.finish(choice=choice)
    events = list(resumed)
    assert [event.WhichOneof("kind") for event in events] == ["accepted", "token", "token", "finished"]
    assert _tokens(events) == [(1, 21), (0, 12)]
    assert events[-1].finished.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("received", "words"),
    [
        ([10, 99], "token 1 of choice 0 is 11 and the received one is 99"),
        ([10, 11, 12], "choice 0 ended with 2 tokens and 3 were received"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_tokens_of_another_answer_are_refused_by_name(farshore, harness, received, words, known):
    farshore.engine.auto = (10, 11)
    if known:
        list(farshore.generate(request_id="a"))
    failure = harness.failure_of(farshore.generate(request_id="a", resume=_resume(received)))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in failure.details()
    assert _reason(failure) == "RESUME_MISMATCH"


def test_a_failed_request_is_computed_again(farshore, harness):
    call = farshore.generate(request_id="a")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10)
    sequence.fail(grpc.StatusCode.UNAVAILABLE, "shard lost")
    harness.failure_of(call)
    farshore.engine.auto = (10, 11)
    assert _tokens(farshore.generate(request_id="a", resume=_resume([10]))) == [(0, 11)]


BAD = {
    "both": (dict(resume_from=1, request_id="a", resume=_resume()), "leave out one"),
    "choices": (dict(resume=_resume(*[[1]] * 33)), "33 choices"),
    "long": (dict(resume=_resume([1] * 8193)), "8193 tokens and the model 8192 positions"),
    "no seed": (dict(resume=_resume([1]), sampling=DRAWN), "give resume.seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_resumed_is_refused(farshore, harness, case):
    fields, words = BAD[case]
    failure = harness.failure_of(farshore.generate(**fields))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in failure.details()
    assert farshore.engine.idle


def test_an_unknown_request_without_its_prompt(farshore, harness):
    failure = harness.failure_of(farshore.generate(None, request_id="a", resume=_resume([1])))
    assert failure.code() is grpc.StatusCode.NOT_FOUND
    assert "send its prompt again" in failure.details()


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=3), st.data())
def test_each_token_is_sent_once_in_any_order(answer, data):
    """``answer``: the tokens of each choice. The reader has a beginning of each."""
    cuts = [data.draw(st.integers(0, len(ids))) for ids in answer]
    received = Received([ids[:cut] for ids, cut in zip(answer, cuts, strict=True)])
    order = data.draw(st.permutations([choice for choice, ids in enumerate(answer) for _ in ids]))
    indices, sent = [0] * len(answer), [[] for _ in answer]
    for choice in order:
        index = indices[choice]
        indices[choice] += 1
        token = api.Token(choice=choice, index=index, token_id=answer[choice][index])
        if not received.has(token):
            sent[choice].append(token.token_id)
    received.check_end()
    assert sent == [ids[cut:] for ids, cut in zip(answer, cuts, strict=True)]


def test_the_end_before_the_last_received_token():
    received = Received([[], [5]])
    with pytest.raises(ResumeMismatch, match="choice 1 ended with 0 tokens and 1 were received"):
        received.check_end()
