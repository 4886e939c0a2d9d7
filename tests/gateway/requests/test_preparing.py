"""Requests whose prompt is still being tokenized."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from farshore.gateway.limits import Limits
from farshore.gateway.requests.log import RequestLog
from farshore.gateway.requests.request import RequestKey
from farshore.proto import inference_pb2 as api


class HeldTokenizer:
    """A tokenizer whose ``encode`` blocks until ``go`` is set. ``asked`` counts its calls."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.go = threading.Event()
        self.asked = threading.Semaphore(0)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, text, **options):
        self.asked.release()
        assert self.go.wait(30)
        return self._tokenizer.encode(text, **options)


@pytest.fixture
def held(harness, loop_thread, served):
    """held(limit=…) -> (Harness, its HeldTokenizer), which is released after the test."""
    with harness.contextlib.ExitStack() as stack:

        def start(**limits):
            tokenizer = HeldTokenizer(served.tokenizer)
            model = dataclasses.replace(served, tokenizer=tokenizer)
            limits = Limits(**{"drain_s": 0.1} | limits)
            farshore = stack.enter_context(harness.gateway(loop_thread, model, limits=limits))
            stack.callback(tokenizer.go.set)
            return farshore, tokenizer

        yield start


def _cancel(farshore, request_id):
    farshore.stub.Cancel(api.CancelRequest(request_id=request_id), timeout=30)


def test_cancel_before_the_requests_task_has_run(loop_thread):
    """Start and cancel in the same step of the event loop."""

    async def start_and_cancel():
        log = RequestLog(None, Limits(), preparing=threads, engine_problem=lambda: None)
        key = RequestKey("anonymous", "a")
        request = log.start(key, None, fingerprint=b"", choices=2, values=1, arrived_s=0.0)
        await log.cancel(key)
        assert request.ended and log.find(key) is request
        events = [api.GenerateEvent.FromString(event) async for event in request.follow(0)]
        await log.close()
        return events

    with ThreadPoolExecutor(1) as threads:
        accepted, done = loop_thread.run(start_and_cancel())
    assert accepted.HasField("accepted")
    assert [choice.reason for choice in done.finished.choices] == [api.FINISH_REASON_CANCELLED] * 2


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_is_cancelled_early_never_reaches_the_engine(held, n):
    farshore, tokenizer = held()
    call = farshore.generate(request_id="a", sampling=dict(n=n, temperature=1.0))
    assert tokenizer.asked.acquire(timeout=30)
    _cancel(farshore, "a")
    accepted, done = call
    assert accepted.accepted == api.Accepted(request_id="a")
    assert [choice.reason for choice in done.finished.choices] == [api.FINISH_REASON_CANCELLED] * n
    assert done.finished.usage == api.Usage()
    tokenizer.go.set()
    farshore.engine.auto = ()
    list(farshore.generate(request_id="b"))
    farshore.engine.next_sequence()
    assert farshore.engine.idle and not farshore.engine.cancelled


def test_cancel_of_a_request_that_waits_for_a_tokenizer_thread(held):
    """The only thread is busy with another request."""
    farshore, tokenizer = held(tokenizer_threads=1)
    first, second = farshore.generate(request_id="a"), None
    assert tokenizer.asked.acquire(timeout=30)
    second = farshore.generate(request_id="b")
    while True:  # A client can't tell that the gateway has a request before its prompt is tokenized.
        try:
            _cancel(farshore, "b")
            break
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND
    assert list(second)[-1].finished.choices[0].reason == api.FINISH_REASON_CANCELLED
    tokenizer.go.set()
    farshore.engine.next_sequence().finish()
    assert len(list(first)) == 2
    assert farshore.engine.idle
    assert not tokenizer.asked.acquire(blocking=False), "its prompt was not tokenized"


def test_the_same_id_twice_runs_once(held):
    farshore, tokenizer = held()
    calls = [farshore.generate(request_id="a")]
    assert tokenizer.asked.acquire(timeout=30)
    calls += [farshore.generate(request_id="a"), farshore.generate(None, request_id="a")]
    tokenizer.go.set()
    sequence = farshore.engine.next_sequence()
    sequence.tokens(10)
    sequence.finish()
    first, *others = [list(call) for call in calls]
    assert [event.WhichOneof("kind") for event in first] == ["accepted", "token", "finished"]
    assert others == [first, first]
    assert farshore.engine.idle


@pytest.mark.parametrize(
    "fields, code, words",
    [
        (dict(text="Another"), grpc.StatusCode.ALREADY_EXISTS, "choose a new id"),
        (dict(text=None, resume_from=1), grpc.StatusCode.INVALID_ARGUMENT, "has 0 tokens"),
        (dict(request_id="b"), grpc.StatusCode.RESOURCE_EXHAUSTED, "1 requests are running"),
    ],
)
def test_refusals_while_a_prompt_is_tokenized(held, harness, fields, code, words):
    farshore, tokenizer = held(max_live_requests=1)
    call = farshore.generate(request_id="a")
    assert tokenizer.asked.acquire(timeout=30)
    failure = harness.failure_of(farshore.generate(**dict(request_id="a") | fields))
    assert failure.code() == code and words in failure.details()
    tokenizer.go.set()
    farshore.engine.next_sequence().finish()
    assert len(list(call)) == 2


def test_a_client_that_leaves_ends_its_request(held, harness):
    farshore, tokenizer = held(max_live_requests=1)
    call = farshore.generate()
    assert tokenizer.asked.acquire(timeout=30)
    call.cancel()
    second = farshore.generate(request_id="b")
    while not tokenizer.asked.acquire(timeout=0.01):  # Until the gateway has noticed that the client left.
        if second.done():
            assert harness.failure_of(second).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            second = farshore.generate(request_id="b")
    tokenizer.go.set()
    farshore.engine.next_sequence().finish()
    assert len(list(second)) == 2
    assert farshore.engine.idle


def test_a_client_that_leaves_and_comes_back(held):
    farshore, tokenizer = held()
    call = farshore.generate(request_id="a")
    assert tokenizer.asked.acquire(timeout=30)
    call.cancel()
    resumed = farshore.generate(None, request_id="a")
    tokenizer.go.set()
    farshore.engine.next_sequence().finish()
    assert [event.WhichOneof("kind") for event in resumed] == ["accepted", "finished"]


def test_a_prompt_that_is_refused_frees_its_id(held, harness, served):
    farshore, tokenizer = held()
    long = "word " * served.config.max_positions
    calls = [farshore.generate(long, request_id="a")]
    assert tokenizer.asked.acquire(timeout=30)
    calls.append(farshore.generate(None, request_id="a"))
    tokenizer.go.set()
    for call in calls:
        failure = harness.failure_of(call)
        assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT and "8192 positions" in failure.details()
    farshore.engine.auto = ()
    assert len(list(farshore.generate("Short", request_id="a"))) == 2


def test_a_tokenizer_that_breaks(held, harness):
    farshore, tokenizer = held()
    tokenizer.go.wait = lambda _: False  # encode's assertion fails.
    failure = harness.failure_of(farshore.generate())
    assert failure.code() == grpc.StatusCode.INTERNAL
    assert failure.details() == "the gateway failed; see its log"
    del tokenizer.go.wait
    tokenizer.go.set()
    farshore.engine.auto = ()
    assert len(list(farshore.generate())) == 2


def test_a_shutdown(held, harness, loop_thread):
    farshore, tokenizer = held()
    call = farshore.generate(request_id="a")
    assert tokenizer.asked.acquire(timeout=30)
    loop_thread.run(farshore.gateway.stop())
    failure = harness.failure_of(call)
    assert failure.code() == grpc.StatusCode.UNAVAILABLE and "0 tokens" in failure.details()
