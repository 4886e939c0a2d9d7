"""Passes the operators' calls, ``farshore.admin.v1``, on to the controller.

Registered by ``server``, so that operators need one address; asked by the page's ``watch``. Must not know
what the calls mean.
"""

import functools

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from farshore import rpc
from farshore.errors import InvalidRequest
from farshore.gateway.api.errors import trailing_of
from farshore.gateway.limits import ERROR_MESSAGE_CHARS, Limits
from farshore.gateway.requests.request import Failure, RequestFailed
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc
from farshore.text import shortened

_SERVICE = admin.DESCRIPTOR.services_by_name["AdminService"]
NAME = _SERVICE.full_name
_PASSED_ON = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class AdminProxy:
    """``controller``: a channel to the controller at ``address``. Runs on the event loop."""

    def __init__(self, controller: grpc.aio.Channel, address: str, limits: Limits) -> None:
        self._controller = controller
        self._address = address
        self._limits = limits
        self._stub = admin_pb2_grpc.AdminServiceStub(controller)

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a server. Messages are passed on as bytes."""
        handlers = {}
        for method in _SERVICE.methods:
            path = f"/{NAME}/{method.name}"
            kind = GetMessageClass(method.input_type)
            if method.server_streaming:
                passed_on = functools.partial(self._stream, self._controller.unary_stream(path), kind)
                handlers[method.name] = grpc.unary_stream_rpc_method_handler(passed_on)
            else:
                passed_on = functools.partial(self._unary, self._controller.unary_unary(path), kind)
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(passed_on)
        return grpc.method_handlers_generic_handler(NAME, handlers)

    async def status(self) -> admin.ClusterStatusResponse:
        """For this gateway's own use, as ``events``. Raises RequestFailed."""
        request = admin.ClusterStatusRequest()
        try:
            return await self._stub.ClusterStatus(request, timeout=self._limits.controller_s)
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(self._failure(error)) from error

    async def events(self, since: int) -> list[admin.ClusterEvent]:
        """The events with numbers above ``since``, oldest first. Raises RequestFailed."""
        request = admin.WatchEventsRequest(since=since)
        try:
            call = self._stub.WatchEvents(request, timeout=self._limits.controller_s)
            return [event async for event in call]
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(self._failure(error)) from error

    async def _unary(
        self,
        call: grpc.aio.UnaryUnaryMultiCallable,
        kind: type[Message],
        raw: bytes,
        context: grpc.aio.ServicerContext,
    ) -> bytes:
        await self._check(kind, raw, context)
        try:
            return await call(raw, timeout=self._limits.controller_s)
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error)
            raise

    async def _stream(
        self,
        call: grpc.aio.UnaryStreamMultiCallable,
        kind: type[Message],
        raw: bytes,
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Ends with the reader: gRPC cancels this coroutine, and with it the call."""
        await self._check(kind, raw, context)
        try:
            async for message in call(raw):
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error)

    async def _check(self, kind: type[Message], raw: bytes, context: grpc.aio.ServicerContext) -> None:
        """Ends a call whose bytes are none of its kind: the controller's own gRPC would fail it as if the
        controller were at fault."""
        try:
            kind.FromString(raw)
        except DecodeError:
            why = f"the call's bytes are no {kind.DESCRIPTOR.name}: use the client's own version of the API"
            failure = Failure.of(InvalidRequest(why))
            trailing = trailing_of(failure, retry_after_ms=self._limits.retry_after_ms)
            await context.abort(failure.code, failure.message, trailing)

    async def _abort(self, context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
        """Ends a call with the controller's error, or with UNAVAILABLE if the controller did not answer."""
        failure = self._failure(error)
        trailing = trailing_of(failure, retry_after_ms=self._limits.retry_after_ms)
        await context.abort(failure.code, failure.message, trailing)

    def _failure(self, error: grpc.aio.AioRpcError) -> Failure:
        # A controller that is connected said so itself: of its directory.
        connected = self._controller.get_state() is grpc.ChannelConnectivity.READY
        details = shortened(error.details() or "", ERROR_MESSAGE_CHARS)
        if error.code() in _PASSED_ON or (connected and error.code() is grpc.StatusCode.UNAVAILABLE):
            kinds = [item for item in error.trailing_metadata() or () if item[0] == rpc.ERROR_KIND]
            return Failure(error.code(), details, tuple(kinds))
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            # The gateway's fault, not its client's.
            why = f"the controller at {self._address} refuses this gateway: {details}"
            return Failure(grpc.StatusCode.UNAVAILABLE, why)
        return Failure(
            grpc.StatusCode.UNAVAILABLE,
            f"the controller at {self._address} does not answer ({error.code().name}): status is unknown and "
            "nothing can be changed now, generation goes on",
        )
