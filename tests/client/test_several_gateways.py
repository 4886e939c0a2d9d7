"""The SDK's clients of several gateways of one cluster: the first that answers, the next when it is lost."""

import pytest

from farshore.client import events
from farshore.errors import InvalidRequest, NotFound, TransportError
from farshore.gateway.limits import Limits


@pytest.fixture
def two(gateway, sdk):
    """Two Harnesses and a client of both."""
    first, second = gateway(), gateway()
    return first, second, sdk([first.address, second.address])


def test_addresses(sdk):
    client = sdk("a:1, b:2,a:1,")
    assert client.addresses == ("a:1", "b:2") and client.address == "a:1"
    for none in ("", " , ", []):
        with pytest.raises(InvalidRequest, match="no gateway's address"):
            sdk(none)


def test_the_first_that_answers_is_kept(gateway, absent, sdk):
    farshore = gateway()
    farshore.engine.auto = ()
    client = sdk(f"{absent},{farshore.address}")
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


def test_all_are_away(absent, sdk):
    client = sdk([absent, "127.0.0.1:1"])
    assert not client.is_serving()
    for call in (client.status, lambda: list(client.generate("Hi")), lambda: client.cancel("a")):
        with pytest.raises(TransportError):
            call()
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:1"):
        list(client.watch_events())


def test_a_request_is_found_at_the_gateway_that_runs_it(two, sdk):
    _, second, client = two
    second.engine.auto = (10, 11, 12)
    stream = list(sdk(second.address).generate("Hi", request_id="a"))
    assert list(client.generate(request_id="a", resume_from=2)) == [stream[0], *stream[3:]]
    with pytest.raises(NotFound):
        list(client.generate(request_id="b"))


def test_cancel_finds_the_gateway_that_runs_the_request(two, absent, sdk):
    first, second, client = two
    stream = sdk(second.address).generate("Hi", request_id="a")
    second.engine.next_sequence()
    next(stream)
    client.cancel("a")
    assert [event.reason for event in stream] == ["cancelled"]
    with pytest.raises(NotFound):
        client.cancel("b")
    with pytest.raises(TransportError, match=absent):
        sdk([first.address, absent]).cancel("b")


def test_a_gateway_that_does_not_reach_the_controller_is_passed_over(gateway, sdk):
    first = gateway(controller="127.0.0.1:1", limits=Limits(controller_s=1.0, drain_s=0.1))
    second = gateway()
    assert sdk([first.address, second.address]).status().model == "smollm2"


def test_a_gateway_without_engines_is_passed_over(gateway, harness, sdk):
    first, second = gateway(directory=harness.ListedEngines()), gateway()
    second.engine.auto = ()
    client = sdk([first.address, second.address])
    assert len(list(client.generate("Hi"))) == 2
    assert client.is_serving() and client.address == second.address
