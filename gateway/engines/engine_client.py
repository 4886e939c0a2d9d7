"""The gateway's client of one engine: makes one call per request and copies its stream into the request.

Created by ``known``, used by ``dispatch``. Must not know the request's readers, the other engines, nor the
controller: generation goes on while the controller is down.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.gateway.limits import ERROR_MESSAGE_CHARS, Limits
from farshore.gateway.requests.answer import Answer
from farshore.gateway.requests.patience import Patience
from farshore.gateway.requests.request import Failure, Request
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
# Statuses of the connection. CANCELLED means that the engine's process cut the stream without being asked to:
# it is shutting down.
_CONNECTION = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# What another engine may do better.
_ELSEWHERE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


class NotTaken(Exception):
    """The engine has sent nothing for a request and has not confirmed it: another engine may run it.

    ``failure``: how the request fails if no other engine takes it. ``certain``: whether the engine said so
    itself; otherwise it may run the request all the same, and the next engine needs a later epoch.
    """

    def __init__(self, failure: Failure, *, certain: bool) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.certain = certain


@dataclass(slots=True)
class _Stream:
    request: Request
    answer: Answer
    call: grpc.aio.UnaryStreamCall
    taken: bool = False
    """Whether the engine has confirmed the request, or sent an event of it."""
    given_up: Failure | None = None
    """How it fails, once it is to wait no longer."""


class EngineClient:
    """Owns the channel to one engine until ``close``. ``broke`` is called when the connection breaks under a
    call. Use it on the event loop only."""

    def __init__(
        self,
        worker: str,
        address: str,
        *,
        limits: Limits,
        broke: Callable[[], None],
        token: ClusterToken | None = None,
    ) -> None:
        self.address = address
        self.name = f"dense worker {worker} ({address})"
        self._limits = limits
        self._broke = broke
        self._streams: dict[Patience, _Stream] = {}
        self._doubted: Failure | None = None
        self._lost: Failure | None = None
        self.heard_s = asyncio.get_running_loop().time()
        """When the engine sent something last, by the event loop's clock."""
        self.channel = rpc.aio_channel(address, token)
        self._stub = cluster_pb2_grpc.EngineStub(self.channel)
        # A job's message was serialised by the thread that prepared it.
        self._generate = self.channel.unary_stream(
            f"/{_SERVICE.full_name}/{_SERVICE.methods_by_name['Generate'].name}",
            request_serializer=None,
            response_deserializer=cluster.SequenceEvent.FromString,
        )

    async def close(self) -> None:
        await self.channel.close()

    def doubt(self, why: str) -> None:
        """Gives up the requests that the engine has not confirmed, until :meth:`found`. ``why``: what the
        engine did not do, in words."""
        self._doubted = self._lost_failure(why)
        self._end_waits()

    def lose(self, why: str) -> None:
        """As :meth:`doubt`, and fails all requests that the engine runs."""
        self._doubted = self._lost = self._lost_failure(why)
        self._end_waits()

    def found(self) -> None:
        """The engine answers again."""
        self._doubted = self._lost = None

    def _end_waits(self) -> None:
        for patience, stream in self._streams.items():
            if self._is_given_up(stream):
                patience.cut()

    def _is_given_up(self, stream: _Stream) -> bool:
        """Whether a stream is to wait no longer; notes how it fails."""
        stream.given_up = stream.given_up or (self._lost if stream.taken else self._doubted)
        return stream.given_up is not None

    async def run(self, request: Request, message: bytes, answer: Answer) -> None:
        """Runs a serialised SequenceRequest and adds its events to ``answer``, whose request has ended when
        this returns. Raises NotTaken.

        Cancelling this task cuts the stream, which also ends the sequence in the engine. The request has then
        ended only if ``request.cancelling`` was set.
        """
        stream = _Stream(request, answer, self._generate(message))
        patience = Patience()
        try:
            async with patience:
                self._streams[patience] = stream
                await self._follow(stream, patience)
        except asyncio.CancelledError:
            if request.cancelling:
                answer.end(api.FINISH_REASON_CANCELLED)
            raise
        except TimeoutError:
            self._break(stream, stream.given_up or self._stalled(), certain=False)
        except grpc.aio.AioRpcError as error:
            if request.cancelling and error.code() == grpc.StatusCode.CANCELLED:
                answer.end(api.FINISH_REASON_CANCELLED)
            else:
                self._fail(stream, error.code(), error.details(), error.trailing_metadata())
        finally:
            self._streams.pop(patience, None)
            stream.call.cancel()

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

    async def _follow(self, stream: _Stream, patience: Patience) -> None:
        loop, call = asyncio.get_running_loop(), stream.call
        patience.begin(self._limits.stall_s)
        if self._is_given_up(stream):
            raise TimeoutError
        stream.taken = rpc.TAKEN in dict(await call.initial_metadata())
        while not stream.request.ended:
            if self._is_given_up(stream):
                raise TimeoutError
            patience.begin(self._limits.cancel_s if stream.answer.complete else self._limits.stall_s)
            event = await call.read()
            if event is grpc.aio.EOF:
                self._fail(stream, await call.code(), await call.details(), await call.trailing_metadata())
                return
            stream.taken = True
            self.heard_s = loop.time()
            stopped = stream.answer.take(event)
            if stopped is not None:
                # The gateway matches stop strings; the engine does not know them.
                await self.cancel(stream.request.sequence_id, choice=stopped)

    def _break(self, stream: _Stream, failure: Failure, *, certain: bool) -> None:
        """Ends a request whose stream broke: fails it, unless its answer is complete. Raises NotTaken if
        another engine may run it."""
        if stream.answer.complete:
            stream.answer.end(api.FINISH_REASON_STOP)
        elif not stream.taken and failure.code in _ELSEWHERE:
            raise NotTaken(failure, certain=certain)
        else:
            stream.request.fail(failure)

    def _fail(
        self,
        stream: _Stream,
        code: grpc.StatusCode,
        details: str | None,
        metadata: grpc.aio.Metadata | None,
    ) -> None:
        """Ends a request whose call has ended. Refusals by the engine keep their code and message. Failures
        of the connection name the engine and get a code that does not blame the client."""
        message = shortened(details or "no details", ERROR_MESSAGE_CHARS)
        trailing = tuple((key, value) for key, value in metadata or () if key.startswith("farshore-"))
        own_words = any(key == rpc.ERROR_KIND for key, _ in trailing)
        if code in _REFUSALS:
            failure = Failure(code, message, trailing)
        elif code in _CONNECTION and not own_words:
            self._broke()
            failure = self._lost_failure(message)
        elif code == grpc.StatusCode.OK:
            failure = self._lost_failure("it ended the stream without finishing")
        else:
            # Without the engine's name the failure would look like the gateway's.
            code = code if code == grpc.StatusCode.UNAVAILABLE else grpc.StatusCode.INTERNAL
            failure = Failure(code, f"{self.name}: {message}", trailing)
        self._break(stream, failure, certain=own_words or code in _REFUSALS)

    def _lost_failure(self, why: str) -> Failure:
        return Failure(grpc.StatusCode.UNAVAILABLE, f"{self.name} was lost ({why}): send the request again")

    def _stalled(self) -> Failure:
        return Failure(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"{self.name} sent nothing for {self._limits.stall_s:g} s"
        )
