"""The OpenAI-compatible HTTP API: its routes, and what each call does.

Mounted by ``gateway.api.http``. A call becomes GenerateRequests, which go the way of all requests
(``gateway.requests.intake``). Must not know how a request is run. Never logs a prompt.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farshore import __version__
from farshore.errors import ModelError
from farshore.gateway.api.openai import bodies, translate
from farshore.gateway.api.openai.answers import ChatAnswer, CompletionAnswer
from farshore.gateway.api.openai.bounds import add_bounds
from farshore.gateway.api.openai.errors import ApiError, error_of
from farshore.gateway.api.openai.openapi import description
from farshore.gateway.api.openai.parsing import Parsing
from farshore.gateway.api.openai.respond import Respond
from farshore.gateway.api.openai.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from farshore.gateway.page.page import Page
from farshore.gateway.requests import validate
from farshore.gateway.requests.intake import Intake
from farshore.proto import inference_pb2 as api
from farshore.text import quoted

BODY_DEADLINE_S = 30.0
"""For a client to send its body."""

JSON_OVERHEAD = 2
"""A body may have this many times the bytes of the largest GenerateRequest: JSON escapes letters."""

_TRACE = b"x-request-id"
_TRACE_ID = re.compile(rb"[!-~]{1,128}")

_LOG = logging.getLogger(__name__)
_Body = TypeVar("_Body", bound=BaseModel)
_Handler = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """Use it on the event loop only."""

    def __init__(
        self,
        intake: Intake,
        *,
        problem: Callable[[], str | None],
        in_thread: Callable[..., Awaitable],
        page: Page,
    ) -> None:
        """``problem``: returns why no request can run now, or None. ``in_thread``: runs a function in a
        tokenizing thread."""
        self._intake = intake
        self._served = intake.served
        self._parsing = Parsing.of(intake.served)
        self._problem = problem
        self._in_thread = in_thread
        self._page = page
        document = description()
        add_bounds(document["components"]["schemas"], self._served, self._intake.limits)
        self._description = JSONResponse(document).body

    def application(self) -> ASGIApp:
        """The ASGI application."""
        routes: list[tuple[str, str, _Handler]] = [
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{model:path}", self._model),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/detokenize", self._detokenize),
            ("GET", "/health", self._health),
            ("GET", "/ready", self._ready),
            ("GET", "/version", self._version),
            ("GET", "/openapi.json", self._openapi),
            ("GET", "/", self._page.document),
            ("GET", "/status.json", self._page.status),
        ]
        application = Starlette(
            routes=[
                Route(path, self._guarded(handler), methods=[method]) for method, path, handler in routes
            ],
            exception_handlers={HTTPException: self._refused},
        )
        limits = self._intake.limits
        return _traced(_bounded(application, most=limits.open_calls, retry_after_ms=limits.retry_after_ms))

    async def _chat(self, request: Request) -> Response:
        raw, arrived_s = await self._body(request), self._intake.clock()
        body = self._parsed(ChatBody, raw, request)
        message = translate.chat_request(body, self._parsing)
        answer = ChatAnswer(
            body, model=self._served.spec.name, tokenizer=self._served.tokenizer, parsing=self._parsing
        )
        return Respond(
            self._intake,
            [message],
            answer,
            stream=bool(body.stream),
            arrived_s=arrived_s,
            names=request.state.names,
            fill=True,
        )

    async def _complete(self, request: Request) -> Response:
        raw, arrived_s = await self._body(request), self._intake.clock()
        body = self._parsed(CompletionBody, raw, request)
        messages = translate.completion_requests(body)
        prompts = [""] * len(messages)
        if body.echo:
            prompts = [await self._echoed(message) for message in messages]
        answer = CompletionAnswer(
            body, prompts=prompts, model=self._served.spec.name, tokenizer=self._served.tokenizer
        )
        return Respond(
            self._intake,
            messages,
            answer,
            stream=bool(body.stream),
            arrived_s=arrived_s,
            names=request.state.names,
        )

    async def _echoed(self, message: api.GenerateRequest) -> str:
        """A prompt's text. One to be truncated becomes the ids that are left, and the text is theirs."""
        if most := message.sampling.truncate_prompt_tokens:
            ids = await self._in_thread(
                lambda: validate.tokens_of(message, self._served, self._intake.limits, special=True)
            )
            message.tokens.CopyFrom(api.TokenIds(ids=ids[-most:]))
        if message.HasField("text"):
            return message.text
        return await self._in_thread(lambda: self._served.tokenizer.decode(message.tokens.ids))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._shown(name) for name in self._names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._names:
            raise ModelError(validate.unknown_model(name, self._served))
        return JSONResponse(self._shown(name))

    async def _tokenize(self, request: Request) -> Response:
        body = self._parsed(TokenizeBody, await self._body(request), request)
        message = translate.tokenize_request(body)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        ids = await self._in_thread(
            lambda: validate.tokens_of(message, self._served, self._intake.limits, special=special)
        )
        positions = self._served.config.max_positions
        return JSONResponse({"count": len(ids), "max_model_len": positions, "tokens": list(ids)})

    async def _detokenize(self, request: Request) -> Response:
        body = self._parsed(DetokenizeBody, await self._body(request), request)
        text = await self._in_thread(
            lambda: validate.text_of(body.tokens, model=body.model, served=self._served)
        )
        return JSONResponse({"prompt": text})

    async def _health(self, request: Request) -> Response:
        """The gateway runs. An engine's loss is no reason to restart the gateway: see /ready."""
        return Response(status_code=200)

    async def _ready(self, request: Request) -> Response:
        problem = self._problem()
        if problem is not None:
            raise ApiError(503, problem, retry_after_ms=self._intake.limits.retry_after_ms)
        return Response(status_code=200)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _openapi(self, request: Request) -> Response:
        return Response(self._description, media_type="application/json")

    @property
    def _names(self) -> tuple[str, ...]:
        return self._served.spec.names

    def _shown(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "farshore",
            "root": self._served.spec.model,
            "max_model_len": self._served.config.max_positions,
        }

    def _parsed(self, kind: type[_Body], raw: bytes, request: Request) -> _Body:
        """The body, whose names of fields the call's errors have from now on. Raises ApiError."""
        body = bodies.parsed(kind, raw)
        request.state.names = translate.names_of(body)
        return body

    async def _body(self, request: Request) -> bytes:
        """The body's bytes. Raises ApiError if it is too large, too slow, or no JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A web page may send other types to any address without asking.
            raise ApiError(415, "send the body with the header Content-Type: application/json")
        most = JSON_OVERHEAD * self._intake.limits.message_bytes_for(self._served.config.max_positions)
        pieces, size = [], 0
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                async for piece in request.stream():
                    size += len(piece)
                    if size > most:
                        raise ApiError(413, f"the body has more than {most} bytes: shorten the prompt")
                    pieces.append(piece)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_DEADLINE_S:g} s") from None
        return b"".join(pieces)

    def _guarded(self, handler: _Handler) -> _Handler:
        """``handler``, with errors as answers. Errors while an answer is sent are ``Respond``'s."""

        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                names = getattr(request.state, "names", {})
                answer = error_of(error, retry_after_ms=self._intake.limits.retry_after_ms, names=names)
                if answer.status == 500:
                    _LOG.exception("a call broke the gateway")
                return answer.response()

        return guarded

    async def _refused(self, request: Request, error: Exception) -> Response:
        """Starlette's own refusals: an unknown path, another method."""
        assert isinstance(error, HTTPException)
        message = f"{request.method} {quoted(request.url.path)}: {error.detail}"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response


def _bounded(application: ASGIApp, *, most: int, retry_after_ms: int) -> ASGIApp:
    """``application``, with at most so many open calls that have a body. Further ones get 503. The others are
    short, and health must be told under load too; the number of connections bounds them."""
    open_calls = 0

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal open_calls
        if scope.get("method") in ("GET", "HEAD"):
            await application(scope, receive, send)
            return
        if open_calls >= most:
            why = (
                f"{open_calls} calls are open, the most this gateway takes: try again in {retry_after_ms} ms"
            )
            refusal = ApiError(503, why, code="overloaded", retry_after_ms=retry_after_ms)
            await refusal.response()(scope, receive, send)
            return
        open_calls += 1
        try:
            await application(scope, receive, send)
        finally:
            open_calls -= 1

    return bounded


def _traced(application: ASGIApp) -> ASGIApp:
    """``application`` whose answers have the header X-Request-Id: the call's own, or a new one. It names a
    call for traces and is no key: a program that passes one on may make several calls with it, so the log of
    requests must not take them for retries of one. The body's ``request_id`` is that key."""

    async def traced(scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope.get("headers", ()) if name == _TRACE), b"")
        trace = given if _TRACE_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_TRACE, trace)]
            await send(message)

        await application(scope, receive, send_traced)

    return traced
