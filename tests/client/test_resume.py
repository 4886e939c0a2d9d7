"""Answers go on by themselves after a loss: of the connection, of the gateway, of its engine."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from farshore.client import events
from farshore.errors import Cancelled, InvalidRequest, NotFound, Overloaded, TransportError

IDS = (10, 11, 12, 13)
WAIT_S = 30


class Wire:
    """Passes connections on to ``address``. ``cut`` breaks those that are open."""

    def __init__(self, loop_thread, address):
        self._run = loop_thread.run
        self._target = address.split(":")
        self._open = set()
        self.connections = 0
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())

    async def _serve(self, reader, writer):
        self.connections += 1
        onward_reader, onward = await asyncio.open_connection(*self._target)
        pair = (writer, onward)
        self._open.add(pair)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_copy(reader, onward), _copy(onward_reader, writer))
        self._open.discard(pair)
        for end in pair:
            end.transport.abort()

    def cut(self):
        async def abort():
            for pair in list(self._open):
                for end in pair:
                    end.transport.abort()

        self._run(abort())

    def close(self):
        self.cut()

        async def close():
            self._server.close()
            await self._server.wait_closed()

        self._run(close())


async def _copy(reader, writer):
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()
    writer.close()


@pytest.fixture
def wire(farshore, loop_thread):
    """A Wire to the gateway of ``farshore``."""
    made = Wire(loop_thread, farshore.address)
    yield made
    made.close()


@pytest.fixture
def background():
    """background(function, …) -> its future: a stream goes on while it is read."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


@pytest.fixture
def two(gateway, sdk):
    """Two Harnesses and a client of both."""
    first, second = gateway(), gateway()
    return first, second, sdk([first.address, second.address])


def begun(client, harness, *, ids=IDS[:2], prompt="Hi", **options):
    """A stream, read until ``ids`` have come, and the engine's sequence."""
    stream = client.generate(prompt, **options)
    sequence = harness.engine.next_sequence()
    sequence.tokens(*ids)
    received = [next(stream) for _ in range(1 + len(ids))]
    assert isinstance(received[0], events.Accepted)
    return stream, sequence


def stop_gateway(harness):
    harness.loop_thread.run(harness.gateway._server.stop(None))


def test_a_connection_breaks(farshore, wire, sdk, served):
    """The same gateway goes on with the same request."""
    stream, sequence = begun(sdk(wire.address), farshore)
    wire.cut()
    sequence.tokens(*IDS[2:])
    sequence.finish()
    rest = list(stream)
    assert [event.token_id for event in rest[:-1]] == list(IDS[2:])
    assert [event.index for event in rest[:-1]] == [2, 3]
    assert stream.text() == served.tokenizer.decode(IDS)
    assert (stream.losses, wire.connections) == (1, 2)
    assert farshore.engine.idle


def test_a_connection_breaks_during_the_prompt(farshore, wire, sdk):
    client = sdk(wire.address)
    stream = client.generate("Hi")
    sequence = farshore.engine.next_sequence()
    sequence.prefill(3, 9)
    assert [type(next(stream)) for _ in range(2)] == [events.Accepted, events.Prefill]
    wire.cut()
    sequence.tokens(*IDS)
    sequence.finish()
    kinds = [type(event) for event in stream]
    assert kinds[-5:] == [events.Token] * 4 + [events.Finished]
    assert set(kinds[:-5]) <= {events.Prefill}


def test_a_request_that_is_read_by_its_id_alone(farshore, wire, sdk):
    _, sequence = begun(sdk(farshore.address), farshore, request_id="a")
    reader = sdk(wire.address).generate(request_id="a", resume_from=1)
    assert [type(next(reader)) for _ in range(2)] == [events.Accepted, events.Token]
    wire.cut()
    sequence.tokens(*IDS[2:])
    sequence.finish()
    assert reader.result().choices[0].token_ids == list(IDS[1:])
    assert farshore.engine.idle


@pytest.mark.parametrize("how", ["gateway", "engine"])
@pytest.mark.parametrize("received", [0, 2])
def test_another_gateway_begins_anew(two, background, how, received, served):
    """The tokens that came before are dropped from its answer."""
    first, second, client = two
    stream, sequence = begun(client, first, ids=IDS[:received], temperature=1.0)
    if how == "gateway":
        stop_gateway(first)
    else:
        first.engine.stop()
    rest = background(list, stream)
    onward = second.engine.next_sequence()
    assert onward.request.sampling.seed == sequence.request.sampling.seed
    assert onward.request.prompt == sequence.request.prompt
    onward.tokens(*IDS)
    onward.finish()
    kinds = [type(event) for event in rest.result(WAIT_S)]
    assert kinds == [events.Token] * (len(IDS) - received) + [events.Finished]
    assert stream.result().choices[0].token_ids == list(IDS)
    assert stream.text() == served.tokenizer.decode(IDS)
    assert (stream.losses, client.address) == (1, second.address)


def test_choices_that_come_in_another_order(two, background):
    first, second, client = two
    stream = client.generate("Hi", n=2, temperature=1.0)
    sequence = first.engine.next_sequence()
    for choice in (0, 0, 1):
        sequence.tokens(*([20 + choice] if choice else [10]), choice=choice)
    for _ in range(4):
        next(stream)
    stop_gateway(first)
    result = background(stream.result)
    onward = second.engine.next_sequence()
    onward.tokens(21, 22, choice=1)
    onward.tokens(10, 10, 11)
    for choice in (0, 1):
        onward.finish(choice=choice)
    assert [choice.token_ids for choice in result.result(WAIT_S).choices] == [[10, 10, 11], [21, 22]]


def test_the_gateway_gives_the_request_to_another_engine(farshore, sdk, background):
    stream, sequence = begun(sdk(farshore.address), farshore)
    sequence.fail(grpc.StatusCode.UNAVAILABLE, "the engine is gone")
    result = background(stream.result)
    onward = farshore.engine.next_sequence()
    onward.tokens(*IDS)
    onward.finish()
    assert result.result(WAIT_S).choices[0].token_ids == list(IDS)


def test_a_request_that_loses_every_engine_fails(farshore, sdk, background):
    """It may be what ends them."""
    stream, sequence = begun(sdk(farshore.address), farshore)
    sequence.fail(grpc.StatusCode.UNAVAILABLE, "the engine is gone")
    result = background(stream.result)
    for _ in range(2):
        farshore.engine.next_sequence().fail(grpc.StatusCode.UNAVAILABLE, "the engine is gone")
    with pytest.raises(TransportError, match="the engine is gone"):
        result.result(WAIT_S)
    assert stream.losses == 3 and farshore.engine.idle


def test_an_error_of_the_request_is_no_loss(farshore, sdk):
    stream, sequence = begun(sdk(farshore.address), farshore)
    sequence.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room", kind="Overloaded")
    with pytest.raises(Overloaded, match="no room"):
        list(stream)
    assert stream.losses == 0 and farshore.engine.idle


@pytest.mark.parametrize("ids", [(10, 99, 12, 13), (10,)])
def test_an_answer_that_differs_is_not_continued(two, background, ids):
    first, second, client = two
    stream, _ = begun(client, first)
    stop_gateway(first)
    rest = background(list, stream)
    onward = second.engine.next_sequence()
    onward.tokens(*ids)
    onward.finish()
    with pytest.raises(TransportError, match=r"after 2 tokens.*send the request again") as failure:
        rest.result(WAIT_S)
    assert failure.value.retryable


def test_no_gateway_goes_on(two, sdk):
    first, second, _ = two
    client = sdk([first.address, second.address], resume_s=0.3)
    stream, _ = begun(client, first)
    for harness in (first, second):
        stop_gateway(harness)
    with pytest.raises(TransportError) as failure:
        next(stream)
    assert failure.value.retryable and list(stream) == []


def test_a_client_that_does_not_resume(two, sdk):
    first, second, _ = two
    client = sdk([first.address, second.address], resume_s=0)
    stream, _ = begun(client, first)
    stop_gateway(first)
    with pytest.raises(TransportError, match=first.address):
        next(stream)
    assert second.engine.idle
    # A request that has no token yet loses nothing by going to the next.
    second.engine.auto = ()
    assert len(list(client.generate("Hi"))) == 2


def test_a_request_whose_prompt_is_not_known_stays_at_its_gateway(two, sdk):
    first, second, client = two
    begun(sdk(first.address), first, request_id="a")
    reader = client.generate(request_id="a")
    for _ in range(3):
        next(reader)
    stop_gateway(first)
    impatient = sdk([first.address, second.address], resume_s=0.3)
    with pytest.raises((TransportError, NotFound)):
        list(impatient.generate(request_id="a"))
    assert second.engine.idle


def test_a_closed_client_stops_looking(two, background):
    first, second, client = two
    stream, _ = begun(client, first)
    for harness in (first, second):
        stop_gateway(harness)
    closing = background(client.close)
    with pytest.raises(Cancelled):
        next(stream)
    closing.result(WAIT_S)


def test_a_wrong_position_is_the_callers_error(farshore, sdk):
    begun(sdk(farshore.address), farshore, request_id="a")
    with pytest.raises(InvalidRequest, match="resume_from 9"):
        list(sdk(farshore.address).generate(request_id="a", resume_from=9))
