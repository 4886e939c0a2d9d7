"""The SDK's two clients against a real gateway."""

import grpc
import pytest

from farshore.client import events
from farshore.errors import InvalidRequest, NotFound, Overloaded, TransportError
from farshore.proto import admin_pb2 as admin
from farshore.proto import cluster_pb2


@pytest.fixture
def client(farshore, sdk):
    return sdk(farshore.address)


def test_events_in_order(client, farshore, served):
    ids = tuple(served.tokenizer.encode("Good day"))
    stream = client.generate("Hello", request_id="a", max_tokens=4, seed=3, cache_salt="ours")
    sequence = farshore.engine.next_sequence()
    sent = sequence.request
    assert (sent.sampling.max_tokens, sent.sampling.seed, sent.cache_salt) == (4, 3, "ours")
    assert next(stream) == events.Accepted(request_id="a", prompt_tokens=len(sequence.request.prompt))
    sequence.prefill(3, 9)
    assert next(stream) == events.Prefill(done_tokens=3, total_tokens=9)
    sequence.tokens(*ids)
    assert [next(stream) for _ in ids] == [
        events.Token(index=index, token_id=token, text=served.tokenizer.decode([token]))
        for index, token in enumerate(ids)
    ]
    sequence.finish()
    done = next(stream)
    assert (done.reason, done.completion_tokens, done.queued_ms) == ("stop", len(ids), 1.5)
    assert done.shards == (events.ShardUse(worker_id="attention-0", process_id=7, attended_bytes=4096),)
    assert list(stream) == []


def test_choices_and_log_probabilities(client, farshore, served):
    (yes,), (no,) = (served.tokenizer.encode(word) for word in (" yes", " no"))
    asked = dict(n=2, temperature=1.0, logprobs=1, logit_bias={yes: 1.0}, stop="zzz", stop_token_ids=[no])
    stream = client.generate("Hello", **asked)
    sequence = farshore.engine.next_sequence()
    sent = sequence.request.sampling
    assert (sent.n, sent.logprobs, dict(sent.logit_bias)) == (2, 1, {yes: 1.0})
    top = [cluster_pb2.TokenLogprob(token_id=no, logprob=-0.5)]
    sequence.token(token_id=yes, choice=1, logprob=-1.5, top=top)
    sequence.token(token_id=no)
    for choice in (0, 1):
        sequence.finish(choice=choice)
    _, first, second, done = stream
    assert first == events.Token(
        index=0,
        token_id=yes,
        text=" yes",
        choice=1,
        logprob=-1.5,
        top=(events.Alternative(token_id=no, logprob=-0.5, text=" no"),),
    )
    assert second == events.Token(index=0, token_id=no, text="")
    assert done.choices == (events.Completion(reason="stop", tokens=1, text=""),) * 2
    assert done.completion_tokens == 2 and (done.reason, done.text) == ("stop", "")


def test_prompts_of_each_kind(client, farshore, served, encode_chat):
    farshore.engine.auto = ()
    messages = [{"role": "user", "content": "Hi"}]
    for asked, ids in (
        (dict(prompt="Hi"), served.tokenizer.encode("Hi")),
        (dict(messages=messages), encode_chat(messages)),
        (dict(token_ids=range(5, 9)), [5, 6, 7, 8]),
    ):
        list(client.generate(**asked))
        assert list(farshore.engine.next_sequence().request.prompt) == ids


def test_resume(client, farshore):
    farshore.engine.auto = (10, 11, 12)
    stream = list(client.generate("Hi", request_id="a"))
    assert list(client.generate(request_id="a", resume_from=2)) == [stream[0], *stream[3:]]


@pytest.mark.parametrize(
    "asked",
    [
        dict(prompt="a", token_ids=[1]),
        dict(prompt="a", max_tokens=-1),
        dict(prompt="a", seed=1 << 64),
        dict(prompt="a", temperature="hot"),
        dict(token_ids=[-1]),
        dict(prompt="\udc80"),
        dict(messages=[{"role": "user", "text": "Hi"}]),
    ],
)
def test_values_that_do_not_fit(client, asked):
    with pytest.raises(InvalidRequest):
        client.generate(**asked)


def test_a_gateways_errors_become_farshores(client, farshore):
    with pytest.raises(InvalidRequest, match="empty"):
        list(client.generate(""))
    with pytest.raises(NotFound):
        client.cancel("unknown")
    stream = client.generate("Hi")
    farshore.engine.next_sequence().fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
    with pytest.raises(Overloaded, match="queue is full"):
        list(stream)


@pytest.mark.parametrize("chars, most", [(5 << 20, 4 << 20), (65 << 20, 64 << 20)])
def test_a_message_that_is_too_large_is_no_overload(client, chars, most):
    """It is not retryable. The gateway refuses the smaller message, the client's gRPC the larger one."""
    with pytest.raises(InvalidRequest, match=rf"at most {most}: shorten the prompt"):
        list(client.generate("a" * chars))


def test_closing_the_stream_ends_the_request(client, farshore):
    stream = client.generate("Hi")
    sequence = farshore.engine.next_sequence()
    next(stream)
    stream.close()
    assert sequence.ended.wait(30)


def test_cancel(client, farshore):
    stream = client.generate("Hi")
    farshore.engine.next_sequence()
    client.cancel(next(stream).request_id)
    assert [event.reason for event in stream] == ["cancelled"]


def test_status(client, farshore):
    farshore.engine.status.MergeFrom(
        admin.ClusterStatusResponse(
            workers=[admin.WorkerStatus(worker_id="dense-0", kind=admin.WORKER_KIND_DENSE, budget_bytes=10)],
            sequences=[
                admin.SequenceStatus(sequence_id="a", tokens=9, spans=[admin.SpanStatus(last=8, bytes=5)])
            ],
        )
    )
    status = client.status()
    assert status.model == "smollm2"
    assert status.workers[0].budget_bytes == 10
    assert status.sequences[0].spans[0].last == 8


def test_counters_of_a_worker(client, farshore):
    farshore.engine.status.workers.add(
        worker_id="dense-0", kind=admin.WORKER_KIND_DENSE, parked=2, parkings=5, tokens=1 << 40
    )
    (worker,) = client.status().workers
    assert (worker.parked, worker.parkings, worker.tokens) == (2, 5, 1 << 40)


def test_tokens_of_a_text_and_back(client, served, encode_chat):
    ids = served.tokenizer.encode("Größe 🌍")
    assert client.tokenize("Größe 🌍") == ids and client.detokenize(ids) == "Größe 🌍"
    messages = [{"role": "user", "content": "Hi"}]
    assert client.tokenize(messages=messages) == encode_chat(messages)
    for wrong in (dict(prompt="\udc80"), dict(messages=["Hi"]), dict(prompt="a", messages=messages)):
        with pytest.raises(InvalidRequest):
            client.tokenize(**wrong)
    for wrong in ([-1], [1 << 31], ["a"]):
        with pytest.raises(InvalidRequest):
            client.detokenize(wrong)


def test_operators_calls(client, farshore):
    assert client.scale(dense=2) == {"dense": 2, "attention": 3}
    assert client.drain("dense-0", timeout_s=1.5) == "dense-0-a"
    client.down()
    assert farshore.engine.operations == [
        admin.ScaleRequest(dense_workers=2),
        admin.DrainRequest(worker_id="dense-0", timeout_s=1.5),
        admin.DownRequest(),
    ]
    with pytest.raises(InvalidRequest):
        client.scale(dense=-1)


def test_events_of_the_cluster(client):
    happened = list(client.watch_events(since=2))
    assert [(event.number, event.subject) for event in happened] == [(3, "dense-3"), (4, "dense-4")]
    following = client.watch_events(since=3, follow=True)
    assert next(following) == happened[1]
    following.close()
    assert list(following) == []


def test_tokens(client, served):
    ids = client.tokenize("Good day")
    assert ids == served.tokenizer.encode("Good day")
    assert client.detokenize(ids) == "Good day"
    messages = [{"role": "user", "content": "Hi"}]
    asked = client.tokenize(messages=messages, add_generation_prompt=True)
    assert client.detokenize(asked).endswith("assistant\n")
    with pytest.raises(InvalidRequest):
        client.tokenize("Hi", tools=[{}])
    for refused in (lambda: client.tokenize("Hi", model="other"), lambda: client.detokenize([1 << 20])):
        with pytest.raises(InvalidRequest):
            refused()


def test_models(client):
    (model,) = client.models()
    assert (model.name, model.max_positions, model.vocabulary) == ("smollm2", 8192, 49152)
    assert client.model("smollm2") == model
    with pytest.raises(NotFound):
        client.model("other")


def test_is_serving(client, sdk):
    assert client.is_serving() and client.is_up()
    unconnected = sdk("127.0.0.1:1")
    assert not unconnected.is_serving() and not unconnected.is_up()


def test_unreachable(sdk):
    with pytest.raises(TransportError, match=r"gateway 127\.0\.0\.1:1"):
        list(sdk("127.0.0.1:1").generate("Hi"))
