"""The gateway's side of an engine: one call per request, its stream pulled into the request's log.

Used by ``requests`` alone. Must not know who reads the log, nor about the controller: tokens go on while
the controller is away.
"""

import asyncio

import grpc

from farshore import rpc
from farshore.gateway.limits import Limits
from farshore.gateway.requests.answer import Answer
from farshore.gateway.requests.request import Failure, Request
from farshore.gateway.requests.validate import Job
from farshore.gateway.served import Served
from farshore.gateway.shown import shortened
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import cluster_pb2_grpc
from farshore.proto import inference_pb2 as api

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
# A stream that the engine's side cut, without the gateway's asking, is an engine that is leaving.
_OURS = {
    grpc.StatusCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED: grpc.StatusCode.UNAVAILABLE,
}


class GrpcEngineClient:
    """A :class:`~farshore.gateway.requests.requests.EngineClient`. Owns the channel; ``close`` it. On the
    event loop only."""

    def __init__(self, address: str, *, served: Served, limits: Limits) -> None:
        self._address = address
        self._served = served
        self._limits = limits
        self._channel = grpc.aio.insecure_channel(address, options=rpc.OPTIONS)
        self._stub = cluster_pb2_grpc.EngineStub(self._channel)
        # A job's message is serialised already, in a thread.
        self._generate = self._channel.unary_stream(
            f"/{_SERVICE.full_name}/{_SERVICE.methods_by_name['Generate'].name}",
            request_serializer=None,
            response_deserializer=cluster.SequenceEvent.FromString,
        )

    @property
    def channel(self) -> grpc.aio.Channel:
        return self._channel

    async def close(self) -> None:
        await self._channel.close()

    async def pump(self, request: Request, job: Job) -> None:
        """Run ``job`` and fill ``request``; it has ended when this returns, whatever happened.

        Cancelling the task cuts the stream, which ends the sequence in the engine too; so it has ended unless
        the task was cancelled for another reason than ``request.cancelling``.
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
                    f"dense worker {self._address} sent nothing for {self._limits.stall_s:g} s",
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
                    # Stop strings are ours: the engine has to be told.
                    await self.cancel(request.sequence_id, choice=stopped)

    async def _break(self, request: Request, answer: Answer, failure: Failure) -> None:
        """The engine is gone; that takes nothing from an answer which is complete."""
        if answer.complete:
            await answer.end(api.FINISH_REASON_STOP)
        else:
            await request.fail(failure)

    async def cancel(
        self, sequence_id: str, *, choice: int | None = None, deadline_s: float | None = None
    ) -> None:
        """Ask the engine to end a sequence, or one choice. Best effort: cutting the stream says the same."""
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
                f"dense worker {self._address} ended the stream without finishing",
            )
        return self._as_failure(code, await call.details(), await call.trailing_metadata())

    def _failure(self, error: grpc.aio.AioRpcError) -> Failure:
        return self._as_failure(error.code(), error.details(), error.trailing_metadata())

    def _as_failure(
        self, code: grpc.StatusCode, details: str | None, metadata: grpc.aio.Metadata | None
    ) -> Failure:
        """A refusal passes as it is; what went wrong between gateway and engine is not the client's doing."""
        message = shortened(details or "no details")
        if code not in _REFUSALS:
            # Otherwise a client can't tell it from a gateway that is unreachable or broken.
            message = f"dense worker {self._address}: {message}"
            code = _OURS.get(code, grpc.StatusCode.INTERNAL)
        trailing = tuple((key, value) for key, value in metadata or () if key.startswith("farshore-"))
        return Failure(code, message, trailing)
