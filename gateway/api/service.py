"""The client API over gRPC: Generate, Cancel.

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
from farshore.errors import DeadlineExceeded, FarshoreError, InvalidRequest, Overloaded
from farshore.gateway.limits import ERROR_MESSAGE_CHARS
from farshore.gateway.requests.intake import Intake
from farshore.gateway.requests.request import RequestFailed
from farshore.proto import inference_pb2 as api
from farshore.text import shortened

_SERVICE = api.DESCRIPTOR.services_by_name["Inference"]
_logger = logging.getLogger(__name__)


class InferenceService:
    """Handlers receive and return serialised messages: ``Generate`` checks a request's bytes before it parses
    them, and sends events as the request log stores them. Runs on the event loop."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
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
            await self._end(context, error.failure.code, error.failure.message, error.failure.trailing)
        except grpc.aio.AbortError:
            raise
        except Exception:
            _logger.exception("a call broke the gateway")
            await self._end(context, grpc.StatusCode.INTERNAL, "the gateway failed; see its log")

    async def _abort(self, context: grpc.aio.ServicerContext, error: FarshoreError) -> None:
        code, message, trailing = rpc.status_of(error)
        if isinstance(error, Overloaded):
            # gRPC's retry hint: clients with a retry policy wait this long.
            trailing += (("grpc-retry-pushback-ms", str(self._limits.retry_after_ms)),)
        await self._end(context, code, shortened(message, ERROR_MESSAGE_CHARS), trailing)

    async def _end(
        self,
        context: grpc.aio.ServicerContext,
        code: grpc.StatusCode,
        message: str,
        trailing: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Ends the call with a status. gRPC sends the status after the written events; if the reader is
        stalled this waits at most ``shutdown_s``, and gRPC sends it when the reader continues."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.shutdown_s):
                await context.abort(code, message, trailing)


def _parsed(kind: type[Message], raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the call's bytes are no {kind.DESCRIPTOR.name}") from error
