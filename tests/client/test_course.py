"""Which gateway a stream calls next, and when: the rules without connections, on a clock that the test
moves."""

import asyncio

import grpc
import pytest

from farshore.client.sdk.aio import AsyncStream
from farshore.client.sdk.course import Course
from farshore.errors import Cancelled, DeadlineExceeded, Full, Internal, NotFound, Overloaded, TransportError
from farshore.rpc import FREE_BYTES, error_of

UNAVAILABLE, NOT_FOUND = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND


class Failure(grpc.RpcError):
    def __init__(self, code, *, sent=False, hint=None, free_bytes=None):
        self._code = code
        self._trailing = [("grpc-status-details-bin", b"")] if sent else []
        self._trailing += [] if hint is None else [("grpc-retry-pushback-ms", hint)]
        self._trailing += [] if free_bytes is None else [(FREE_BYTES, free_bytes)]

    def code(self):
        return self._code

    def details(self):
        return "it failed"

    def trailing_metadata(self):
        return tuple(self._trailing)


class Gateway:
    def __init__(self, address):
        self.address = address

    def error(self, error):
        return error_of(error, peer=self.address)


class Gateways:
    def __init__(self, *addresses):
        self.all = [Gateway(address) for address in addresses]

    def in_turn(self):
        return list(self.all)

    def prefer(self, gateway):
        self.all.remove(gateway)
        self.all.insert(0, gateway)


class Feed:
    """Each message is a new token. Records its calls as (address, anew)."""

    def __init__(self, *, repeatable=True):
        self.repeatable = repeatable
        self.tokens = 0
        self.calls = []

    def call(self, gateway, *, anew, timeout_s):
        self.calls.append((gateway.address, anew))

    def take(self, message):
        self.tokens += message
        return message


@pytest.fixture
def begin(clock):
    """begin("a", "b", …) -> a Course over these gateways, and its Feed, after its first call."""

    def make(*addresses, repeatable=True, deadline_s=1000.0, resume_s=30.0):
        feed = Feed(repeatable=repeatable)
        course = Course(Gateways(*addresses), feed, deadline_s=deadline_s, resume_s=resume_s, clock=clock)
        course.start()
        return course, feed

    return make


def go_on(course, clock, code, **options):
    """The call fails; waits as the course says and makes the next one."""
    course.failed(Failure(code, **options))
    clock.now_s += course.pause_s
    course.start()
    return course.pause_s


def test_before_the_first_message_each_gateway_is_asked_once(begin, clock):
    course, feed = begin("a", "b", "c")
    for _ in range(2):
        assert go_on(course, clock, UNAVAILABLE) == 0
    with pytest.raises(TransportError, match=r"^c: "):
        course.failed(Failure(UNAVAILABLE))
    assert feed.calls == [("a", False), ("b", False), ("c", False)] and course.losses == 0


def test_before_the_first_message_a_single_gateway_is_asked_three_times(begin, clock):
    course, feed = begin("a")
    assert go_on(course, clock, UNAVAILABLE) == pytest.approx(0.1)
    assert go_on(course, clock, UNAVAILABLE, hint="700") == pytest.approx(0.7)
    with pytest.raises(TransportError):
        course.failed(Failure(UNAVAILABLE))
    assert feed.calls == [("a", False)] * 3 and course.losses == 0


FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("last, error", [(FULL, Overloaded), (UNAVAILABLE, TransportError)])
def test_before_the_first_message_a_gateway_without_room_is_passed_over(begin, clock, last, error):
    course, feed = begin("a", "b")
    assert go_on(course, clock, FULL, sent=True, hint="700") == 0
    with pytest.raises(error):
        course.failed(Failure(last, sent=True))
    assert feed.calls == [("a", False), ("b", False)]


def test_a_single_gateway_without_room_is_not_asked_again(begin):
    course, _ = begin("a")
    with pytest.raises(Overloaded):
        course.failed(Failure(FULL, sent=True))


def test_a_request_that_fits_no_gateway_is_not_passed_on(begin):
    course, _ = begin("a", "b")
    with pytest.raises(Full):
        course.failed(Failure(FULL, sent=True, free_bytes="9"))


@pytest.mark.parametrize("hint", ["-1", "soon"])
def test_a_hint_that_no_call_is_to_follow_is_obeyed(begin, hint):
    course, _ = begin("a")
    with pytest.raises(TransportError):
        course.failed(Failure(UNAVAILABLE, sent=True, hint=hint))


def test_a_stream_that_a_server_cuts_while_it_stops_is_lost(begin, clock):
    """gRPC's server ends the streams that are left with CANCELLED, which a gateway never sends."""
    course, feed = begin("a", resume_s=1.0)
    course.take(1)
    go_on(course, clock, grpc.StatusCode.CANCELLED)
    assert feed.calls[-1] == ("a", False) and course.losses == 1
    clock.now_s += 2.0
    with pytest.raises(TransportError, match="gateway a cut the stream"):
        course.failed(Failure(grpc.StatusCode.CANCELLED))


def test_rounds_after_a_loss_begin_with_the_gateway_that_has_the_log(begin, clock):
    course, feed = begin("a", "b")
    go_on(course, clock, UNAVAILABLE)
    course.take(1)
    pauses = [go_on(course, clock, UNAVAILABLE) for _ in range(12)]
    assert feed.calls[2:6] == [("b", False), ("a", True)] * 2
    assert pauses == pytest.approx([0, 0, 0.1, 0, 0.2, 0, 0.4, 0, 0.8, 0, 1.6, 0])
    assert [go_on(course, clock, UNAVAILABLE) for _ in range(4)] == [2.0, 0, 2.0, 0]
    clock.now_s += 30.0
    with pytest.raises(TransportError):
        go_on(course, clock, UNAVAILABLE)
    assert course.losses == 1


def test_a_new_token_ends_the_search(begin, clock):
    course, _ = begin("a")
    course.take(1)
    for _ in range(10):
        go_on(course, clock, UNAVAILABLE)
        clock.now_s += 20.0
        course.take(1)
    assert course.losses == 10


def test_losses_without_a_new_token_are_counted(begin, clock):
    course, _ = begin("a")
    course.take(1)
    for _ in range(2):
        go_on(course, clock, UNAVAILABLE)
        course.take(0)
    with pytest.raises(TransportError):
        go_on(course, clock, UNAVAILABLE)


def test_a_log_that_forgot_the_request(begin, clock):
    course, feed = begin("a", "b")
    course.take(1)
    go_on(course, clock, UNAVAILABLE)
    go_on(course, clock, NOT_FOUND, sent=True)
    go_on(course, clock, UNAVAILABLE)
    assert feed.calls[1:] == [("a", False), ("a", True), ("b", True)]


def test_a_request_that_failed_in_the_log_begins_anew(begin, clock):
    course, feed = begin("a")
    course.take(1)
    go_on(course, clock, UNAVAILABLE, sent=True)
    assert feed.calls[1:] == [("a", True)]


def test_a_stream_that_can_not_begin_anew_stays(begin, clock):
    course, feed = begin("a", "b", repeatable=False)
    course.take(1)
    for _ in range(2):
        go_on(course, clock, UNAVAILABLE)
    assert feed.calls[1:] == [("a", False)] * 2
    with pytest.raises(NotFound):
        course.failed(Failure(NOT_FOUND, sent=True))


def test_a_gateway_without_room_is_asked_again_while_the_stream_is_lost(begin, clock):
    course, feed = begin("a", "b")
    course.take(1)
    for code, sent in ((UNAVAILABLE, False), (UNAVAILABLE, False), (FULL, True)):
        go_on(course, clock, code, sent=sent)
    assert feed.calls[1:] == [("a", False), ("b", True), ("a", False)] and clock.now_s > 0
    course.take(1)
    with pytest.raises(Overloaded):
        course.failed(Failure(FULL, sent=True))


@pytest.mark.parametrize(
    "code, sent, lost",
    [
        (grpc.StatusCode.INTERNAL, False, True),  # as a proxy resets a stream
        (grpc.StatusCode.INTERNAL, True, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True, True),  # the gateway: nothing was read for long
        (grpc.StatusCode.DEADLINE_EXCEEDED, False, False),
    ],
)
def test_failures_that_are_losses(begin, clock, code, sent, lost):
    course, _ = begin("a")
    course.take(1)
    if lost:
        go_on(course, clock, code, sent=sent)
    else:
        with pytest.raises((Internal, DeadlineExceeded)):
            course.failed(Failure(code, sent=sent))
    assert course.losses == lost


def test_the_deadline_is_that_of_the_whole_stream(begin, clock):
    course, _ = begin("a", deadline_s=10.0)
    course.take(1)
    go_on(course, clock, UNAVAILABLE)
    clock.now_s += 10.0
    with pytest.raises(TransportError):
        course.failed(Failure(UNAVAILABLE))


class LostCall:
    """A grpc.aio call that failed."""

    def __init__(self):
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        raise Failure(UNAVAILABLE)

    def cancel(self):
        self.cancelled = True


def test_an_asyncio_stream_that_is_closed_in_a_pause_makes_no_more_calls():
    calls, closes = [], []

    class Pausing:
        pause_s = 0.0  # one turn of the event loop

        def start(self):
            calls.append(LostCall())
            return calls[-1]

        def take(self, message):
            raise AssertionError("no message comes")

        def failed(self, error):
            closes.append(asyncio.ensure_future(stream.close()))  # runs in this turn

    async def read():
        nonlocal stream
        stream = AsyncStream(Pausing(), is_closed=lambda: False, on_close=lambda: closes.append("ended"))
        with pytest.raises(Cancelled):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    stream = None
    asyncio.run(read())
    assert [call.cancelled for call in calls] == [True] and closes[1:] == ["ended"]
