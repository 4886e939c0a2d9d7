"""Runs the requests of one call, and sends their answer: one JSON object, or server-sent events.

Returned by ``endpoints`` as the response of a call. The requests end when the client disconnects. Must not
know the shape of an answer.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from farshore.errors import DeadlineExceeded
from farshore.gateway.api.openai.answers import Answer
from farshore.gateway.api.openai.errors import error_of
from farshore.gateway.requests.intake import Intake
from farshore.gateway.requests.patience import Patience
from farshore.gateway.requests.request import Request
from farshore.proto import inference_pb2 as api

REFUSAL_S = 1.0
"""How long a stream's status waits for a refusal by the engine. Later errors are sent as events."""

TEMPERATURE = 1.0
"""OpenAI's default. A model's own goes before it."""

_DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
_LOG = logging.getLogger(__name__)


class Respond(Response):
    """An ASGI response. ``messages``: the requests. A stream has their events as they come."""

    def __init__(
        self,
        intake: Intake,
        messages: Sequence[api.GenerateRequest],
        answer: Answer,
        *,
        stream: bool,
        arrived_s: float,
        names: Mapping[str, str | None],
        fill: bool = False,
    ) -> None:
        """``arrived_s``, ``fill``: see :meth:`Intake.take`. ``names``: see :func:`translate.names_of`."""
        self._intake = intake
        self._messages = messages
        self._answer = answer
        self._stream = stream
        self._arrived_s = arrived_s
        self._fill = fill
        self._names = names
        self._requests: list[Request] = []
        self._begun = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._guarded(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._bounded(self._run(send))
        except Exception as error:
            refusal = error_of(error, retry_after_ms=self._intake.limits.retry_after_ms, names=self._names)
            if refusal.status == 500:
                _LOG.error("a call failed: %s", type(error).__name__)
            if not self._begun:
                await refusal.response()(scope, receive, send)
                return
            line = b"data: " + json.dumps(refusal.body()).encode() + b"\n\n"
            await self._bounded(self._write(send, line + _DONE, last=True))

    async def _bounded(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work``, whose writes block while the client's window is full. Raises DeadlineExceeded after
        ``reader_stall_s``."""
        try:
            async with Patience() as self._patience:
                await work
        except TimeoutError:
            raise DeadlineExceeded("the client took nothing for too long") from None

    async def _run(self, send: Send) -> None:
        with contextlib.ExitStack() as open_requests:
            raws = [message.SerializeToString() for message in self._messages]
            open_requests.enter_context(self._intake.log.call(sum(map(len, raws))))
            followed = []
            for raw in raws:
                taken = self._intake.take(
                    raw, arrived_s=self._arrived_s, fill=self._fill, temperature=TEMPERATURE
                )
                open_requests.enter_context(self._intake.log.reading(taken.request))
                self._requests.append(taken.request)
                followed.append(taken.request.follow(taken.resume_from))
            async with contextlib.AsyncExitStack() as streams:
                for events in followed:
                    await streams.enter_async_context(contextlib.aclosing(events))
                if self._stream:
                    events = await streams.enter_async_context(contextlib.aclosing(_merged(followed)))
                    await self._send_stream(events, send)
                else:
                    async for number, raw in _numbered(followed):
                        self._add(number, api.GenerateEvent.FromString(raw))
                    self._answer.end()
                    await self._send_whole(send)

    async def _send_whole(self, send: Send) -> None:
        body = json.dumps(self._answer.whole(), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(send, body, last=True)

    async def _send_stream(self, events: AsyncIterator[tuple[int, bytes]], send: Send) -> None:
        """Sends the events. The status waits for the first one after acceptance, for at most REFUSAL_S: an
        engine that refuses a request does so before."""
        held, item = [await anext(events)], None
        clock = asyncio.get_running_loop().time
        end_s = clock() + REFUSAL_S
        following = asyncio.ensure_future(anext(events, None))
        try:
            while (await asyncio.wait({following}, timeout=max(0.0, end_s - clock())))[0]:
                item = following.result()
                if item is None or not api.GenerateEvent.FromString(item[1]).HasField("accepted"):
                    break
                held.append(item)
                following = asyncio.ensure_future(anext(events, None))
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            for one in held:
                await self._send_event(*one, send)
            item = await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        while item is not None:
            await self._send_event(*item, send)
            item = await anext(events, None)
        self._answer.end()
        await self._write(send, self._answer.events() + _DONE, last=True)

    async def _send_event(self, number: int, raw: bytes, send: Send) -> None:
        event = api.GenerateEvent.FromString(raw)
        if event.HasField("prefill"):
            # A comment: it keeps the connection in use while a long prompt is computed.
            line = b": prefill %d of %d\n\n" % (event.prefill.done_tokens, event.prefill.total_tokens)
            await self._write(send, line)
            return
        self._add(number, event)
        if lines := self._answer.events():
            await self._write(send, lines)

    def _add(self, number: int, event: api.GenerateEvent) -> None:
        if event.HasField("accepted"):
            self._answer.begin(number, prompt_end=self._requests[number].prompt_end)
        else:
            self._answer.add(number, event)

    async def _write(self, send: Send, body: bytes, *, last: bool = False) -> None:
        self._patience.begin(self._intake.limits.reader_stall_s)
        await send({"type": "http.response.body", "body": body, "more_body": not last})
        self._patience.end()


async def _numbered(followed: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    """The events of all requests, one request after the other, for an answer that is sent whole. They run at
    the same time."""
    for number, events in enumerate(followed):
        async for event in events:
            yield number, event


async def _merged(followed: Sequence[AsyncIterator[bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    """The events of all requests as they come. Raises the first request's error."""
    # Bounded: the requests keep their events, and a slow client must not keep them twice.
    waiting: asyncio.Queue[tuple[int, bytes | Exception | None]] = asyncio.Queue(maxsize=len(followed))

    async def pass_on(number: int, events: AsyncIterator[bytes]) -> None:
        end = None
        try:
            async for event in events:
                await waiting.put((number, event))
        except Exception as error:
            end = error
        await waiting.put((number, end))

    tasks = [asyncio.ensure_future(pass_on(number, events)) for number, events in enumerate(followed)]
    try:
        left = len(tasks)
        while left:
            number, item = await waiting.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
