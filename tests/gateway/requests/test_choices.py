"""Several completions of one prompt, and log-probabilities, through the gateway."""

import pytest

from farshore.gateway.limits import Limits
from farshore.proto import cluster_pb2
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling

SAMPLED = dict(n=2, temperature=1.0)


def test_choices_come_interleaved_and_each_is_complete(farshore, harness, served):
    call = farshore.generate(sampling=SAMPLED)
    sequence = farshore.engine.next_sequence()
    assert sequence.request.sampling.n == 2
    texts = ["naïve 🌍 day", "東京 by night and day"]
    streams = [served.tokenizer.encode(text) for text in texts]
    for index in range(max(map(len, streams))):
        for choice, ids in enumerate(streams):
            sequence.tokens(*ids[index : index + 1], choice=choice)
    sequence.finish(api.FINISH_REASON_LENGTH, choice=1)
    sequence.finish(api.FINISH_REASON_STOP, choice=0)
    events = list(call)
    assert [harness.text_of(events, choice) for choice in (0, 1)] == texts
    for choice, ids in enumerate(streams):
        tokens = [event.token for event in events if event.token.choice == choice and event.HasField("token")]
        assert [(token.index, token.token_id) for token in tokens] == list(enumerate(ids))
    done = events[-1].finished
    assert [end.reason for end in done.choices] == [api.FINISH_REASON_STOP, api.FINISH_REASON_LENGTH]
    assert [end.tokens for end in done.choices] == [len(ids) for ids in streams]
    assert done.usage.completion_tokens == sum(len(ids) for ids in streams)
    assert [use.attended_bytes for use in done.shards] == [2 * 4096], "one entry per worker, with the sum"


def test_resume_counts_the_tokens_of_all_choices(farshore, harness):
    call = farshore.generate(request_id="a", sampling=SAMPLED)
    sequence = farshore.engine.next_sequence()
    for token, choice in ((10, 0), (20, 1), (11, 0), (12, 0), (21, 1)):
        sequence.tokens(token, choice=choice)
    received = [next(call).token for _ in range(4)][1:]
    assert [(token.choice, token.token_id) for token in received] == [(0, 10), (1, 20), (0, 11)]
    call.cancel()
    resumed = farshore.generate(None, request_id="a", resume_from=len(received))
    next(resumed)
    for choice in (0, 1):
        sequence.finish(choice=choice)
    *tokens, done = resumed
    assert [(event.token.choice, event.token.index, event.token.token_id) for event in tokens] == [
        (0, 2, 12),
        (1, 1, 21),
    ]
    assert [end.tokens for end in done.finished.choices] == [3, 2]


def test_cancel_ends_every_choice(farshore):
    call = farshore.generate(sampling=SAMPLED)
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10, choice=1)
    sequence.finish(choice=1)
    request_id = next(call).accepted.request_id
    next(call)
    farshore.stub.Cancel(api.CancelRequest(request_id=request_id), timeout=30)
    done = list(call)[-1].finished
    assert [end.reason for end in done.choices] == [api.FINISH_REASON_CANCELLED, api.FINISH_REASON_STOP]


def test_log_probabilities_come_with_their_text(farshore, served):
    call = farshore.generate(sampling=dict(logprobs=2))
    sequence = farshore.engine.next_sequence()
    assert sequence.request.sampling.logprobs == 2
    yes, no = (served.tokenizer.encode(word)[0] for word in (" yes", " no"))
    top = [(no, -0.25), (yes, -1.5)]
    sequence.token(
        token_id=yes,
        logprob=-1.5,
        top=[cluster_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in top],
    )
    sequence.tokens(no)
    sequence.finish()
    _, with_logprob, without, _ = call
    assert with_logprob.token.logprob == -1.5
    assert [(other.token_id, other.logprob, other.text) for other in with_logprob.token.top] == [
        (no, -0.25, " no"),
        (yes, -1.5, " yes"),
    ]
    assert not without.token.HasField("logprob")


def test_zero_alternatives_is_not_none(farshore):
    farshore.engine.auto = ()
    for asked, expected in ((dict(logprobs=0), True), ({}, False)):
        list(farshore.generate(sampling=asked))
        assert farshore.engine.next_sequence().request.sampling.HasField("logprobs") is expected


def test_alternatives_count_in_the_bytes_of_ended_requests(start, harness):
    farshore = start(limits=Limits(replay_bytes=600))
    for name, count in (("a", 20), ("b", 2)):
        call = farshore.generate(request_id=name, sampling=dict(logprobs=20))
        sequence = farshore.engine.next_sequence()
        alternatives = [cluster_pb2.TokenLogprob(token_id=other, logprob=-1.0) for other in range(count)]
        sequence.token(token_id=7, logprob=-1.0, top=alternatives)
        sequence.finish()
        list(call)
    assert "forgotten" in harness.failure_of(farshore.generate(None, request_id="a")).details()
    assert harness.indices_of(farshore.generate(None, request_id="b")) == [0]


@pytest.mark.parametrize("seeded", [False, True])
def test_every_parameter_reaches_the_engine(farshore, served, seeded):
    farshore.engine.auto = ()
    knobs = dict(
        temperature=0.5,
        top_k=40,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logprobs=20,
        max_tokens=9,
    )
    lists = dict(logit_bias={3: -100.0, 49151: 2.5}, stop_token_ids=[7, 8])
    list(farshore.generate(sampling={**knobs, **lists, **({"seed": 3} if seeded else {})}))
    sent = farshore.engine.next_sequence().request.sampling
    assert {name: getattr(sent, name) for name in knobs} == knobs
    assert dict(sent.logit_bias) == lists["logit_bias"]
    assert list(sent.stop_token_ids) == [*served.stop_ids, 7, 8]
    assert (sent.seed == 3) is seeded


def test_defaults_change_nothing(farshore):
    farshore.engine.auto = ()
    list(farshore.generate())
    sent = Sampling.from_message(farshore.engine.next_sequence().request.sampling)
    assert (sent.n, sent.top_k, sent.min_p, sent.repetition_penalty) == (1, 0, 0.0, 1.0)
    assert (sent.presence_penalty, sent.frequency_penalty, sent.logit_bias) == (0.0, 0.0, {})


def test_a_stop_token_of_the_clients_works_with_ignore_eos(farshore, harness, served):
    (end,) = served.tokenizer.encode(".")
    farshore.engine.auto = [*served.tokenizer.encode("Yes"), end]
    events = list(farshore.generate(sampling=dict(ignore_eos=True, stop_token_ids=[end])))
    assert list(farshore.engine.next_sequence().request.sampling.stop_token_ids) == [end]
    assert harness.text_of(events) == "Yes"
