"""Streams of both clients: their text and result, and how they end."""

import asyncio
import gc
import threading

import pytest

from farshore.client import events
from farshore.client.sdk import AsyncClient, Client
from farshore.errors import Cancelled, TransportError


@pytest.fixture
def client(farshore, sdk):
    return sdk(farshore.address)


def test_the_text(client, farshore, served):
    farshore.engine.auto = served.tokenizer.encode(" a time there was")
    assert client.generate("Once upon").text() == " a time there was"
    stream = client.generate("Once upon")
    for _ in range(3):
        next(stream)
    assert stream.text() == stream.text() == " a time there was"
    assert list(stream) == []


def test_the_result_of_choices(client, farshore, served):
    words = [served.tokenizer.encode(word) for word in (" yes", " no")]
    stream = client.generate("Hello", n=2, temperature=1.0)
    sequence = farshore.engine.next_sequence()
    for choice, ids in enumerate(words):
        sequence.tokens(*ids, choice=choice)
        sequence.finish(choice=choice)
    answer = stream.result()
    assert [choice.text for choice in answer.choices] == [" yes", " no"]
    assert [choice.token_ids for choice in answer.choices] == words
    assert [choice.reason for choice in answer.choices] == ["stop", "stop"]
    assert (answer.text, answer.reason, stream.text()) == (" yes", "stop", " yes")
    assert answer.finished.completion_tokens == sum(map(len, words))
    assert answer.request_id == stream.request_id


def test_a_closed_stream_has_no_text(client, farshore):
    stream = client.generate("Hi")
    farshore.engine.next_sequence().tokens(10)
    assert [type(next(stream)) for _ in range(2)] == [events.Accepted, events.Token]
    stream.close()
    stream.close()
    with pytest.raises(TransportError, match="was closed"):
        stream.text()


def test_a_request_of_the_callers_id_outlives_its_stream(client, farshore):
    """It can be read again; one whose id only the stream knew is cancelled."""
    sequences = []
    for given in ("a", ""):
        stream = client.generate("Hi", request_id=given)
        sequences.append(farshore.engine.next_sequence())
        next(stream)
        stream.close()
    own, made = sequences
    assert made.ended.wait(30)
    own.tokens(10)
    own.finish()
    assert client.generate(request_id="a").result().choices[0].token_ids == [10]


def test_the_seed_follows_from_the_id(client, farshore):
    """The same request sent again is the same; requests without an id differ."""
    farshore.engine.auto = ()
    for asked in (dict(request_id="a"), dict(request_id="b"), {}, {}):
        client.generate("Hi", **asked).result()
    seeds = [farshore.engine.next_sequence().request.sampling.seed for _ in range(4)]
    assert len(set(seeds)) == 4
    assert client.generate("Hi", request_id="a").result().request_id == "a"
    assert farshore.engine.idle


def test_closing_a_client_ends_what_its_streams_asked_for(client, farshore):
    unread = client.generate("Hi")
    sequence = farshore.engine.next_sequence()
    client.close()
    assert sequence.ended.wait(30)
    with pytest.raises(Cancelled):
        list(unread)


def test_a_dropped_stream_ends_its_request(client, farshore):
    stream = client.generate("Hi")
    sequence = farshore.engine.next_sequence()
    next(stream)
    del stream
    gc.collect()
    assert sequence.ended.wait(30)


def test_a_stream_that_another_thread_closes(farshore):
    with Client(farshore.address) as client:
        stream = client.generate("Hi")
        sequence = farshore.engine.next_sequence()
        next(stream)
        closing = threading.Thread(target=stream.close)
        closing.start()
        with pytest.raises((Cancelled, StopIteration)):
            next(stream)
        closing.join()
        assert sequence.ended.wait(30)


def test_a_cancelled_task_ends_its_request(farshore, loop_thread):
    async def read(stream):
        async for _ in stream:
            pass

    async def cancel():
        async with AsyncClient(farshore.address) as client:
            stream = client.generate("Hi")
            await anext(stream)
            reading = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            return reading.cancelled()

    assert loop_thread.run(cancel())
    assert farshore.engine.next_sequence().ended.wait(30)


def test_an_asyncio_client_made_outside_of_its_loop(farshore, loop_thread, served):
    farshore.engine.auto = served.tokenizer.encode(" a time")
    client = AsyncClient(farshore.address)

    async def texts():
        async with client:
            return await asyncio.gather(*(client.generate("Once upon").text() for _ in range(5)))

    assert loop_thread.run(texts()) == [" a time"] * 5
