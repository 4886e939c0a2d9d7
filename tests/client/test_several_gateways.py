"""The SDK with several gateways of one cluster: the first that answers, the next when it is lost."""

import contextlib

import pytest

from farshore.client import events
from farshore.client.sdk import Client
from farshore.errors import InvalidRequest, NotFound, TransportError
from farshore.gateway.limits import Limits


@pytest.fixture
def gateway(harness, loop_thread, served):
    """gateway(…) -> a Harness with a gateway and an engine of its own. Stopped after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(harness.gateway(loop_thread, served, **options))


@pytest.fixture
def two(gateway):
    """Two Harnesses and a client of both."""
    first, second = gateway(), gateway()
    with Client([first.address, second.address]) as client:
        yield first, second, client


def test_addresses():
    with Client("a:1, b:2,a:1,") as client:
        assert client.addresses == ("a:1", "b:2") and client.address == "a:1"
    for none in ("", " , ", []):
        with pytest.raises(InvalidRequest, match="no gateway's address"):
            Client(none)


def test_the_first_that_answers_is_kept(gateway, absent):
    farshore = gateway()
    farshore.engine.auto = ()
    with Client(f"{absent},{farshore.address}") as client:
        for _ in range(2):
            assert [type(event) for event in client.generate("Hi")] == [events.Accepted, events.Finished]
            assert client.address == farshore.address
        assert client.status().model == "smollm2"
        assert client.is_serving() and client.is_up()


def test_an_error_of_the_request_is_raised_by_the_first(two):
    first, _, client = two
    with pytest.raises(InvalidRequest):
        list(client.generate(token_ids=[1 << 20]))
    assert client.address == first.address


def test_all_are_away(absent):
    with Client([absent, "127.0.0.1:1"]) as client:
        assert not client.is_serving()
        for call in (client.status, lambda: list(client.generate("Hi")), lambda: client.cancel("a")):
            with pytest.raises(TransportError):
                call()
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:1"):
            list(client.watch_events())


@pytest.mark.parametrize("how", ["gateway", "engine"])
def test_a_request_without_a_token_goes_to_the_next(two, loop_thread, how):
    first, second, client = two
    stream = client.generate("Hi", request_id="a")
    assert isinstance(next(stream), events.Accepted)
    first.engine.next_sequence()
    if how == "gateway":
        loop_thread.run(first.gateway._server.stop(None))
    else:
        first.engine.stop()
    second.engine.auto = (10,)
    kinds = [type(event) for event in stream]
    assert kinds == [events.Accepted, events.Token, events.Finished]
    assert client.address == second.address


def test_a_request_with_a_token_fails_retryably(two, harness, loop_thread):
    first, second, client = two
    stream = client.generate("Hi")
    first.engine.next_sequence().tokens(10)
    assert [type(next(stream)) for _ in range(2)] == [events.Accepted, events.Token]
    loop_thread.run(first.gateway._server.stop(None))
    with pytest.raises(TransportError) as failure:
        next(stream)
    assert failure.value.retryable and first.address in str(failure.value)
    assert second.engine.idle
    second.engine.auto = ()
    assert len(list(client.generate("Hi"))) == 2


def test_a_request_is_found_at_the_gateway_that_runs_it(two):
    _, second, client = two
    second.engine.auto = (10, 11, 12)
    with Client(second.address) as other:
        stream = list(other.generate("Hi", request_id="a"))
    assert list(client.generate(request_id="a", resume_from=2)) == [stream[0], *stream[3:]]
    with pytest.raises(NotFound):
        list(client.generate(request_id="b"))


def test_cancel_finds_the_gateway_that_runs_the_request(two, absent):
    first, second, client = two
    with Client(second.address) as other:
        stream = other.generate("Hi", request_id="a")
        second.engine.next_sequence()
        next(stream)
        client.cancel("a")
        assert [event.reason for event in stream] == ["cancelled"]
    with pytest.raises(NotFound):
        client.cancel("b")
    with Client([first.address, absent]) as partly, pytest.raises(TransportError, match=absent):
        partly.cancel("b")


def test_a_gateway_that_does_not_reach_the_controller_is_passed_over(gateway):
    first = gateway(controller="127.0.0.1:1", limits=Limits(controller_s=1.0, drain_s=0.1))
    second = gateway()
    with Client([first.address, second.address]) as client:
        assert client.status().model == "smollm2"


def test_a_gateway_without_engines_is_passed_over(gateway, harness):
    first, second = gateway(directory=harness.ListedEngines()), gateway()
    second.engine.auto = ()
    with Client([first.address, second.address]) as client:
        assert len(list(client.generate("Hi"))) == 2
        assert client.is_serving() and client.address == second.address
