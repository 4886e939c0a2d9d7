"""Log-probabilities of the prompt on their way from the engine to readers, and their bounds."""

import grpc
import pytest

from farshore.client import events
from farshore.client.sdk import Client
from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api


@pytest.fixture
def hello(served):
    return served.tokenizer.encode("Hello there")


def scored(ids, logprob=-0.5):
    """The event of an engine about these tokens: the first has no log-probability."""
    return [
        {"token_id": token}
        if not place
        else {
            "token_id": token,
            "logprob": logprob,
            "rank": 2,
            "top": [{"token_id": token + 1, "logprob": -0.25}],
        }
        for place, token in enumerate(ids)
    ]


def answer(sequence, ids):
    """Sends the prompt in two events, then a token."""
    tokens = scored(ids)
    sequence.prompt_logprobs(0, *tokens[:1])
    sequence.prompt_logprobs(1, *tokens[1:])
    sequence.tokens(5)
    sequence.finish()


def test_they_come_before_the_tokens_with_texts(farshore, served, hello):
    call = farshore.generate("Hello there", sampling={"prompt_logprobs": 1})
    sequence = farshore.engine.next_sequence()
    assert sequence.request.sampling.prompt_logprobs == 1
    answer(sequence, hello)
    events = list(call)
    kinds = [event.WhichOneof("kind") for event in events]
    assert kinds == ["accepted", "prompt_logprobs", "prompt_logprobs", "token", "finished"]
    first, second = (event.prompt_logprobs for event in events[1:3])
    assert (first.first, second.first) == (0, 1)
    tokens = [*first.tokens, *second.tokens]
    assert [token.token_id for token in tokens] == hello
    assert [token.text for token in tokens] == [served.tokenizer.token_text(id) for id in hello]
    assert [token.HasField("logprob") for token in tokens] == [False] + [True] * (len(hello) - 1)
    (other,) = tokens[1].top
    assert other.text == served.tokenizer.token_text(hello[1] + 1) and tokens[1].rank == 2


def test_a_reader_gets_them_again_unless_it_has_tokens(farshore, hello):
    call = farshore.generate("Hello there", request_id="r", sampling={"prompt_logprobs": 1})
    answer(farshore.engine.next_sequence(), hello)
    everything = list(call)
    again = {"request_id": "r", "sampling": {"prompt_logprobs": 1}}
    assert list(farshore.generate("Hello there", **again)) == everything
    resumed = list(farshore.generate("Hello there", resume_from=1, **again))
    assert [event.WhichOneof("kind") for event in resumed] == ["accepted", "finished"]


def test_the_sdk_returns_plain_values(farshore, hello):
    with Client(farshore.address) as client:
        stream = client.generate("Hello there", prompt_logprobs=1, priority=-3)
        sequence = farshore.engine.next_sequence()
        assert sequence.request.priority == -3
        answer(sequence, hello)
        found = [event for event in stream if isinstance(event, events.PromptLogprobs)]
    tokens = [token for event in found for token in event.tokens]
    assert [token.token_id for token in tokens] == hello
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    assert tokens[1].logprob == -0.5 and tokens[1].top[0].token_id == hello[1] + 1


def test_too_many_values_are_refused_with_the_most_that_fit(start, harness):
    farshore = start(limits=Limits(prompt_values=100, drain_s=0.1))
    tokens = api.TokenIds(ids=[5] * 26)
    call = farshore.generate(None, tokens=tokens, sampling={"prompt_logprobs": 3})
    failure = harness.failure_of(call)
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 25 tokens" in failure.details()
    farshore.engine.auto = [5]
    assert list(farshore.generate(None, tokens=api.TokenIds(ids=[5] * 25), sampling={"prompt_logprobs": 3}))
    call = farshore.generate(sampling={"prompt_logprobs": 21})
    assert "ask for at most 20 alternatives" in harness.failure_of(call).details()


def test_their_memory_counts_among_the_live_values(start, harness):
    """The most that a prompt may have is counted until the request ends."""
    farshore = start(limits=Limits(prompt_values=1000, live_values=2000, drain_s=0.1))
    running = farshore.generate(sampling={"prompt_logprobs": 0, "max_tokens": 10})
    farshore.engine.next_sequence()
    second = farshore.generate(sampling={"prompt_logprobs": 0, "max_tokens": 10})
    assert harness.failure_of(second).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    farshore.engine.auto = [5]
    assert list(farshore.generate(sampling={"max_tokens": 10}))
    running.cancel()


def test_a_reader_that_brings_its_tokens_has_them(farshore, hello):
    resume = api.Resume(received=[api.TokenIds(ids=[5])], seed=1)
    call = farshore.generate("Hello there", resume=resume, sampling={"prompt_logprobs": 1})
    answer(farshore.engine.next_sequence(), hello)
    assert [event.WhichOneof("kind") for event in call] == ["accepted", "finished"]
