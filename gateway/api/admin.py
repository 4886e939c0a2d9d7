"""Passes the operators' calls, ``farshore.admin.v1``, on to the controller.

Registered by ``server``, so that operators need one address. Must not know what the calls mean.
"""

import functools

import grpc

from farshore.gateway.limits import ERROR_MESSAGE_CHARS, Limits
from farshore.proto import admin_pb2 as admin
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

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a server. Messages are passed on as bytes."""
        handlers = {}
        for method in _SERVICE.methods:
            path = f"/{NAME}/{method.name}"
            if method.server_streaming:
                passed_on = functools.partial(self._stream, self._controller.unary_stream(path))
                handlers[method.name] = grpc.unary_stream_rpc_method_handler(passed_on)
            else:
                passed_on = functools.partial(self._unary, self._controller.unary_unary(path))
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(passed_on)
        return grpc.method_handlers_generic_handler(NAME, handlers)

    async def _unary(
        self, call: grpc.aio.UnaryUnaryMultiCallable, raw: bytes, context: grpc.aio.ServicerContext
    ) -> bytes:
        try:
            return await call(raw, timeout=self._limits.controller_s)
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error)
            raise

    async def _stream(
        self, call: grpc.aio.UnaryStreamMultiCallable, raw: bytes, context: grpc.aio.ServicerContext
    ) -> None:
        """Ends with the reader: gRPC cancels this coroutine, and with it the call."""
        try:
            async for message in call(raw):
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            await self._abort(context, error)

    async def _abort(self, context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
        """Ends a call with the controller's error, or with UNAVAILABLE if the controller did not answer."""
        # A controller that is connected said so itself: of its directory.
        connected = self._controller.get_state() is grpc.ChannelConnectivity.READY
        if error.code() in _PASSED_ON or (connected and error.code() is grpc.StatusCode.UNAVAILABLE):
            await context.abort(error.code(), shortened(error.details() or "", ERROR_MESSAGE_CHARS))
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            # The gateway's fault, not its client's.
            details = shortened(error.details() or "", ERROR_MESSAGE_CHARS)
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"the controller at {self._address} refuses this gateway: {details}",
            )
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            f"the controller at {self._address} does not answer ({error.code().name}): status is unknown and "
            "nothing can be changed now, generation goes on",
        )
