"""The client API over gRPC: generation, tokens, models.

Registered by ``server``. Translates calls to the request log's operations, and all errors to statuses. Must
not know how a request is run. Never logs a prompt.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from farshore.errors import DeadlineExceeded, InvalidRequest, NotFound
from farshore.gateway.api import batch, errors
from farshore.gateway.requests import received, validate
from farshore.gateway.requests.intake import ANONYMOUS, Intake
from farshore.gateway.requests.patience import Patience
from farshore.gateway.requests.request import Failure, RequestKey
from farshore.proto import inference_pb2 as api

_SERVICE = api.DESCRIPTOR.services_by_name["InferenceService"]


class InferenceService:
    """Handlers receive and return serialised messages: ``Generate`` checks a request's bytes before it parses
    them, and sends events as the request log stores them. Runs on the event loop."""

    def __init__(self, intake: Intake, *, in_thread: Callable[..., Awaitable]) -> None:
        """``in_thread``: runs a function in a tokenizing thread."""
        self._intake = intake
        self._served = intake.served
        self._in_thread = in_thread
        self._log = intake.log
        self._limits = intake.limits
        self._most_bytes = intake.limits.message_bytes_for(intake.served.config.max_positions)

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a server."""
        handlers = {}
        for method in _SERVICE.methods:
            kind = (
                grpc.unary_stream_rpc_method_handler
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            handlers[method.name] = kind(functools.partial(self._guarded, getattr(self, method.name)))
        return grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)

    # Calls `write` instead of yielding, so that a client's disconnect is raised here, inside `reading`.
    async def Generate(self, raw: bytes, context: grpc.aio.ServicerContext) -> None:
        """Starts a request, or reconnects to one, and sends its events until it ends."""
        arrived_s = self._intake.clock()
        with self._log.call(len(raw)):
            request, *start = self._intake.take(raw, arrived_s=arrived_s)
            with self._log.reading(request):
                async with contextlib.aclosing(request.follow(*start)) as events:
                    await self._write(events, context)

    async def BatchGenerate(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Runs several requests, and sends their whole answers."""
        response = await batch.answered(raw, self._intake, arrived_s=self._intake.clock())
        return response.SerializeToString()

    async def Cancel(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Ends a request; returns when it has ended."""
        await self._log.cancel(RequestKey(ANONYMOUS, _parsed(api.CancelRequest, raw).request_id))
        return api.CancelResponse().SerializeToString()

    async def Tokenize(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The token ids of a prompt."""
        # The fields of both messages have the same numbers, so the sizes are checked alike.
        positions = self._served.config.max_positions
        request, _, _ = received.parse(raw, max_positions=positions, limits=self._limits)
        asked = _parsed(api.TokenizeRequest, raw)
        special = asked.add_special_tokens if asked.HasField("add_special_tokens") else True
        ids = await self._in_thread(
            lambda: validate.tokens_of(request, self._served, self._limits, special=special)
        )
        return api.TokenizeResponse(ids=ids).SerializeToString()

    async def Detokenize(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The text of token ids."""
        request = _parsed(api.DetokenizeRequest, raw)
        text = await self._in_thread(
            lambda: validate.text_of(request.ids, model=request.model, served=self._served)
        )
        return api.DetokenizeResponse(text=text).SerializeToString()

    async def ListModels(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The served model, by each of its names."""
        models = [self._model(name) for name in self._served.spec.names]
        return api.ListModelsResponse(models=models).SerializeToString()

    async def GetModel(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """One served model. Raises NotFound."""
        name = _parsed(api.GetModelRequest, raw).name
        if name not in self._served.spec.names:
            raise NotFound(validate.unknown_model(name, self._served))
        return self._model(name).SerializeToString()

    def _model(self, name: str) -> api.Model:
        config = self._served.config
        return api.Model(
            name=name,
            root=self._served.spec.model,
            max_positions=config.max_positions,
            vocabulary=config.vocab,
        )

    async def _write(self, events: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Each write blocks while the reader's flow-control window is full. Raises DeadlineExceeded after
        ``reader_stall_s``."""
        stall_s = self._limits.reader_stall_s
        try:
            async with Patience() as patience:
                async for event in events:
                    patience.begin(stall_s)
                    await context.write(event)
                    patience.end()
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing was read for {stall_s:g} s: go on with the request_id and "
                "resume_from = tokens received"
            ) from None

    async def _guarded(
        self,
        method: Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Any]],
        raw: bytes,
        context: grpc.aio.ServicerContext,
    ) -> Any:
        """Runs ``method`` and ends the call with a status if it raises. The only place where errors become
        statuses."""
        try:
            if len(raw) > self._most_bytes:
                raise InvalidRequest(
                    f"the message takes {len(raw)} bytes and this gateway takes at most {self._most_bytes}: "
                    "shorten the prompt, or send text instead of token ids"
                )
            return await method(raw, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await self._end(context, errors.failure_of(error))

    async def _end(self, context: grpc.aio.ServicerContext, failure: Failure) -> None:
        """Ends the call with a status. gRPC sends the status after the written events; if the reader is
        stalled this waits at most ``shutdown_s``, and gRPC sends it when the reader continues."""
        trailing = errors.trailing_of(failure, retry_after_ms=self._limits.retry_after_ms)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.shutdown_s):
                await context.abort(failure.code, failure.message, trailing)


def _parsed(kind: type[Message], raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the call's bytes are no {kind.DESCRIPTOR.name}") from error
