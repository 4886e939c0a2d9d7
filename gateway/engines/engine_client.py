"""The gateway's client of one engine: makes one call per request and copies its stream into the request.

Created by ``api.server``, used by ``requests.log``. Must not know the request's readers, nor the controller:
generation goes on while the controller is down.
"""

import asyncio

import grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.gateway.limits import ERROR_MESSAGE_CHARS, Limits
from farshore.gateway.requests.answer import Answer
from farshore.gateway.requests.request import Failure, Request
from farshore.gateway.requests.validate import Job
from farshore.gateway.served import Served
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import cluster_pb2_grpc
from farshore.proto import inference_pb2 as api
from farshore.text import shortened

_SERVICE = cluster.DESCRIPTOR.services_by_name["Engine"]

_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
}
# Statuses of the connection, as the client gets them; any other status becomes INTERNAL. CANCELLED means that
# the engine's process cut the stream without being asked to: it is shutting down.
_CONNECTION_STATUSES = {
    grpc.StatusCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED: grpc.StatusCode.UNAVAILABLE,
}


class GrpcEngineClient:
    """Implements :class:`~farshore.gateway.requests.log.EngineClient` over gRPC. Owns the channel until
    ``close``. Use it on the event loop only."""

    def __init__(
        self, address: str, *, served: Served, limits: Limits, token: ClusterToken | None = None
    ) -> None:
        self._token = token
        self._served = served
        self._limits = limits
        self._closing: set[asyncio.Task[None]] = set()  # strong references: the event loop holds weak ones
        self._connect(address)

    def move(self, address: str) -> None:
        """Sends new requests to the engine at another address. Streams from the old one go on."""
        closing = asyncio.create_task(self._channel.close(self._limits.stall_s))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._connect(address)

    def _connect(self, address: str) -> None:
        self.address = address
        self._channel = rpc.aio_channel(address, self._token)
        self._stub = cluster_pb2_grpc.EngineStub(self._channel)
        # A job's message was serialised by the thread that prepared it.
        self._generate = self._channel.unary_stream(
            f"/{_SERVICE.full_name}/{_SERVICE.methods_by_name['Generate'].name}",
            request_serializer=None,
            response_deserializer=cluster.SequenceEvent.FromString,
        )

    @property
    def channel(self) -> grpc.aio.Channel:
        return self._channel

    async def close(self) -> None:
        for closing in list(self._closing):
            closing.cancel()
        await self._channel.close()

    async def pump(self, request: Request, job: Job) -> None:
        """Runs ``job`` and adds its events to ``request``, which has ended when this returns.

        Cancelling this task cuts the stream, which also ends the sequence in the engine. The request has then
        ended only if ``request.cancelling`` was set.
        """
        answer = Answer(request, job, self._served.tokenizer)
        call = self._generate(job.message)
        try:
            await self._follow(call, request, answer)
        except asyncio.CancelledError:
            if request.cancelling:
                await answer.end(api.FINISH_REASON_CANCELLED)
            raise
        except TimeoutError:
            await self._break(
                request,
                answer,
                Failure(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"dense worker {self.address} sent nothing for {self._limits.stall_s:g} s",
                ),
            )
        except grpc.aio.AioRpcError as error:
            if request.cancelling and error.code() == grpc.StatusCode.CANCELLED:
                await answer.end(api.FINISH_REASON_CANCELLED)
            else:
                await self._break(request, answer, self._failure(error))
        finally:
            call.cancel()

    async def _follow(self, call: grpc.aio.UnaryStreamCall, request: Request, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as stall:
            while not request.ended:
                patience_s = self._limits.cancel_s if answer.complete else self._limits.stall_s
                stall.reschedule(loop.time() + patience_s)
                event = await call.read()
                if event is grpc.aio.EOF:
                    await self._break(request, answer, await self._broken_off(call))
                    return
                stopped = await answer.take(event)
                if stopped is not None:
                    # The gateway matches stop strings; the engine does not know them.
                    await self.cancel(request.sequence_id, choice=stopped)

    async def _break(self, request: Request, answer: Answer, failure: Failure) -> None:
        """Ends a request whose stream broke: fails it, unless its answer is complete."""
        if answer.complete:
            await answer.end(api.FINISH_REASON_STOP)
        else:
            await request.fail(failure)

    async def cancel(
        self, sequence_id: str, *, choice: int | None = None, deadline_s: float | None = None
    ) -> None:
        """Asks the engine to end a sequence, or one choice of it. Raises nothing if the call fails: cutting
        the stream has the same effect."""
        try:
            await self._stub.Cancel(
                cluster.CancelSequence(sequence_id=sequence_id, choice=choice),
                timeout=deadline_s or self._limits.cancel_s,
            )
        except grpc.aio.AioRpcError:
            return

    async def _broken_off(self, call: grpc.aio.UnaryStreamCall) -> Failure:
        code = await call.code()
        if code == grpc.StatusCode.OK:
            return Failure(
                grpc.StatusCode.UNAVAILABLE,
                f"dense worker {self.address} ended the stream without finishing",
            )
        return self._as_failure(code, await call.details(), await call.trailing_metadata())

    def _failure(self, error: grpc.aio.AioRpcError) -> Failure:
        return self._as_failure(error.code(), error.details(), error.trailing_metadata())

    def _as_failure(
        self, code: grpc.StatusCode, details: str | None, metadata: grpc.aio.Metadata | None
    ) -> Failure:
        """Refusals by the engine keep their code and message. Failures of the connection name the engine and
        get a code that does not blame the client."""
        message = shortened(details or "no details", ERROR_MESSAGE_CHARS)
        if code not in _REFUSALS:
            # Without the engine's address the failure would look like the gateway's.
            message = f"dense worker {self.address}: {message}"
            code = _CONNECTION_STATUSES.get(code, grpc.StatusCode.INTERNAL)
        trailing = tuple((key, value) for key, value in metadata or () if key.startswith("farshore-"))
        return Failure(code, message, trailing)
