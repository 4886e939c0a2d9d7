"""The requests of one call, without an engine: order, bounds, and what ends what."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from farshore.errors import InvalidRequest, Overloaded
from farshore.proto import cluster_pb2 as pb
from farshore.proto import inference_pb2 as api
from farshore.workers import gateway_stream
from farshore.workers.engine.sequence import Failed, Finished, Reason, Sampled
from farshore.workers.gateway_stream import MOST_EVENTS, GatewayStream
from farshore.workers.sequence_events import EventMessages

DEADLINE_S = 60.0


class Sequences:
    """An engine that the test plays. ``go``: submissions wait for it."""

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        self.emits = {}
        self.cancelled = queue.Queue()

    def submit(self, request, emit):
        assert self.go.wait(DEADLINE_S)
        if request.sequence_id == "broken":
            raise ZeroDivisionError("a bug")
        self.emits[request.sequence_id] = emit

    def cancel(self, sequence, *, choice=None):
        self.cancelled.put((sequence, choice))


@pytest.fixture
def sequences():
    return Sequences()


@pytest.fixture
def stream(sequences):
    """stream(most=…) -> a GatewayStream whose ``broken`` is set when it breaks its call off."""
    pool = ThreadPoolExecutor(2)

    def make(most=8):
        broken = threading.Event()
        made = GatewayStream(
            sequences,
            message=EventMessages({}),
            pool=pool,
            submitting=threading.Semaphore(most),
            break_off=broken.set,
        )
        made.broken = broken
        return made

    yield make
    sequences.go.set()
    pool.shutdown()


def asked(number, name, n=1):
    request = pb.SequenceRequest(sequence_id=name, sampling=api.Sampling(n=n))
    return pb.GatewayMessage(number=number, submit=request.SerializeToString())


def cancel(number, choice=None):
    return pb.GatewayMessage(number=number, cancel=pb.CancelSequence(choice=choice))


def finished(choice=0):
    return Finished(Reason.STOP, 0.0, {}, choice)


def test_what_gathers_while_a_message_is_sent_shares_the_next_one(stream, sequences):
    call = stream()
    call.read([asked(1, "a"), asked(2, "b", n=2)])
    messages = call.messages()
    while len(sequences.emits) < 2:
        next(messages)
    count = MOST_EVENTS // 2
    for token in range(count):
        sequences.emits["a"](Sampled(token))
        sequences.emits["b"](Sampled(token, 1))
    sequences.emits["a"](finished())
    sequences.emits["b"](finished(1))
    sequences.emits["b"](finished(0))
    rest = list(messages)
    assert len(rest) <= 3 and all(len(message.events) <= MOST_EVENTS for message in rest)
    events = [event for message in rest for event in message.events]
    for number in (1, 2):
        own = [event for event in events if event.number == number and not event.taken]
        assert [event.token.token_id for event in own if event.HasField("token")] == list(range(count))
    assert events[-1].finished.choice == 0


def test_a_cancel_waits_for_its_request_and_is_not_lost(stream, sequences):
    call = stream()
    sequences.go.clear()
    call.read([asked(1, "a", n=3), cancel(1, choice=2), cancel(1), cancel(5)])
    assert sequences.cancelled.empty()
    sequences.go.set()
    assert [sequences.cancelled.get(timeout=DEADLINE_S) for _ in range(2)] == [("a", 2), ("a", None)]


def test_a_request_that_was_submitted_while_its_call_ended_is_cancelled(stream, sequences):
    call = stream()
    sequences.go.clear()
    call.read([asked(1, "a")])
    call.close()
    sequences.go.set()
    assert list(call.messages()) == []
    # It was either not submitted, or cancelled then.
    if "a" in sequences.emits:
        assert sequences.cancelled.get(timeout=DEADLINE_S) == ("a", None)


def test_more_requests_than_can_be_taken_at_once_are_refused(stream, sequences):
    call = stream(most=1)
    sequences.go.clear()
    call.read([asked(1, "a"), asked(2, "b")])
    (event,) = next(call.messages()).events
    assert event.number == 2 and dict(event.failed.trailing)["farshore-error"] == Overloaded.__name__
    sequences.go.set()


def test_a_bug_fails_its_request_alone(stream, sequences, caplog):
    call = stream()
    call.read([asked(1, "broken"), asked(2, "b")])
    messages = call.messages()
    seen = {}
    while len(seen) < 2:
        seen |= {event.number: event for event in next(messages).events}
    assert seen[1].failed.message == "ZeroDivisionError: a bug" and seen[2].taken
    assert "a request broke the engine's service" in caplog.text


def test_a_gateway_that_reads_nothing_is_cut_off(stream, sequences, monkeypatch):
    monkeypatch.setattr(gateway_stream, "MOST_UNSENT", 10)
    call = stream()
    call.read([asked(1, "a"), asked(2, "b")])
    messages = call.messages()
    while len(sequences.emits) < 2:
        next(messages)
    for token in range(12):
        sequences.emits["a"](Sampled(token))
    assert call.broken.is_set()
    assert {sequences.cancelled.get(timeout=DEADLINE_S) for _ in range(2)} == {("a", None), ("b", None)}
    sequences.emits["a"](Failed(Overloaded("late")))
    assert sum(len(message.events) for message in messages) <= 12


def test_nothing_follows_the_end_of_a_request(stream, sequences):
    """An engine may answer before the thread that submitted the request says that it is taken."""
    submit = sequences.submit

    def answer(request, emit):
        submit(request, emit)
        emit(Sampled(5))
        emit(finished())

    sequences.submit = answer
    call = stream(most=20)
    call.read([asked(number, str(number)) for number in range(20)])
    events = [event for message in call.messages() for event in message.events]
    for number in range(20):
        kinds = [event.WhichOneof("kind") for event in events if event.number == number]
        assert kinds == ["token", "finished"]


def test_a_number_is_used_once(stream):
    call = stream()
    with pytest.raises(InvalidRequest, match="number 3 of a request twice"):
        call.read([asked(3, "a"), asked(3, "b")])
