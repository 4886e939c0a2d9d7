"""The client API over gRPC: generation, tokens, models.

Registered by ``server``. Translates calls to the request log's operations, and all errors to statuses. Must
not know how a request is run. Never logs a prompt.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from farshore import rpc
from farshore.errors import DeadlineExceeded, FarshoreError, InvalidRequest, NotFound
from farshore.gateway.api import errors
from farshore.gateway.limits import ERROR_MESSAGE_CHARS
from farshore.gateway.requests import received, sampling, validate
from farshore.gateway.requests.intake import Intake
from farshore.gateway.requests.request import Failure, RequestFailed
from farshore.proto import inference_pb2 as api
from farshore.text import shortened

_SERVICE = api.DESCRIPTOR.services_by_name["Inference"]
_logger = logging.getLogger(__name__)


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
            request, resume_from = self._intake.take(raw, arrived_s=arrived_s)
            with self._log.reading(request):
                async with contextlib.aclosing(request.follow(resume_from)) as events:
                    async for event in events:
                        await self._write(event, context)

    async def Cancel(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Ends a request; returns when it has ended."""
        await self._log.cancel(_parsed(api.CancelRequest, raw).request_id)
        return api.CancelReply().SerializeToString()

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
        return api.TokenizeReply(ids=ids).SerializeToString()

    async def Detokenize(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The text of token ids."""
        request = _parsed(api.DetokenizeRequest, raw)
        text = await self._in_thread(
            lambda: validate.text_of(request.ids, model=request.model, served=self._served)
        )
        return api.DetokenizeReply(text=text).SerializeToString()

    async def ListModels(self, raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The served model, by each of its names."""
        models = [self._model(name) for name in self._served.spec.names]
        return api.ListModelsReply(models=models).SerializeToString()

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
            sampling_defaults=sampling.in_effect(
                self._served.generation, self._limits, positions=config.max_positions
            ),
        )

    async def _write(self, event: bytes, context: grpc.aio.ServicerContext) -> None:
        """Blocks while the reader's flow-control window is full. Raises DeadlineExceeded after
        ``reader_stall_s``."""
        try:
            async with asyncio.timeout(self._limits.reader_stall_s):
                await context.write(event)
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing was read for {self._limits.reader_stall_s:g} s: go on with the request_id and "
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
            return await method(raw, context)
        except FarshoreError as error:
            await self._abort(context, error)
        except RequestFailed as error:
            await self._end(context, error.failure)
        except grpc.aio.AbortError:
            raise
        except Exception:
            _logger.exception("a call broke the gateway")
            failure = Failure(grpc.StatusCode.INTERNAL, "the gateway failed; see its log")
            await self._end(context, failure)

    async def _abort(self, context: grpc.aio.ServicerContext, error: FarshoreError) -> None:
        code, message, trailing = rpc.status_of(error)
        message = shortened(message, ERROR_MESSAGE_CHARS)
        await self._end(context, Failure(code, message, trailing), field=errors.field_of(error))

    async def _end(
        self, context: grpc.aio.ServicerContext, failure: Failure, *, field: str | None = None
    ) -> None:
        """Ends the call with a status. gRPC sends the status after the written events; if the reader is
        stalled this waits at most ``shutdown_s``, and gRPC sends it when the reader continues."""
        trailing = errors.trailing_of(
            failure.code,
            failure.message,
            failure.trailing,
            retry_after_ms=self._limits.retry_after_ms,
            field=field,
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.shutdown_s):
                await context.abort(failure.code, failure.message, trailing)


def _parsed(kind: type[Message], raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the call's bytes are no {kind.DESCRIPTOR.name}") from error
