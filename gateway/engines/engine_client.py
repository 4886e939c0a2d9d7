"""The gateway's client of one engine: one call carries all requests; each gets the events with its number.

Created by ``known``, used by ``dispatch``. Must not know the request's readers, the other engines, nor the
controller: generation goes on while the controller is down.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.gateway.engines.engine_call import EngineCall
from farshore.gateway.limits import ERROR_MESSAGE_CHARS, Limits
from farshore.gateway.requests.answer import Answer
from farshore.gateway.requests.patience import Patience
from farshore.gateway.requests.request import Failure, Request
from farshore.proto import cluster_pb2 as cluster
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
# Statuses of the connection. CANCELLED means that the engine's process cut the call without being asked to:
# it is shutting down.
_CONNECTION = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# What another engine may do better.
_ELSEWHERE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


class NotTaken(Exception):
    """The engine has sent nothing for a request and has not confirmed it: another engine may run it.

    ``failure``: how the request fails if no other engine takes it. ``certain``: whether the engine does not
    run it; otherwise it may run it all the same, and the next engine needs a later epoch.
    """

    def __init__(self, failure: Failure, *, certain: bool) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.certain = certain


@dataclass(slots=True, eq=False)
class _Run:
    """One request on this engine."""

    number: int
    request: Request
    answer: Answer
    call: EngineCall
    patience: Patience
    over: asyncio.Future[None]
    """Done when nothing more is to come, or is wanted. Fails if an event could not be added."""
    taken: bool = False
    """Whether the engine has confirmed the request, or sent an event of it."""
    cancelled: set[int | None] = field(default_factory=set)
    """The choices that the engine was asked to end; None: all."""
    given_up: Failure | None = None
    """How it fails, once it is to wait no longer."""
    failure: Failure | None = None
    ended: bool = False
    """Whether the engine has said that it does not run the request any more."""


class EngineClient:
    """Owns the channel to one engine, and the call on it, until ``close``. ``broke`` is called when the
    connection breaks under the call. Use it on the event loop only."""

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
        self._numbers = itertools.count(1)
        self._runs: dict[int, _Run] = {}
        self._call: EngineCall | None = None
        self._doubted: Failure | None = None
        self._lost: Failure | None = None
        self.heard_s = asyncio.get_running_loop().time()
        """When the engine sent something last, by the event loop's clock."""
        self.channel = rpc.aio_channel(address, token)
        self._open = self.channel.stream_stream(
            f"/{_SERVICE.full_name}/{_SERVICE.methods_by_name['Run'].name}",
            request_serializer=cluster.GatewayMessage.SerializeToString,
            response_deserializer=cluster.EngineMessage.FromString,
        )

    async def close(self) -> None:
        self._hang_up()
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
        self._hang_up()

    def found(self) -> None:
        """The engine answers again."""
        self._doubted = self._lost = None

    def _end_waits(self) -> None:
        for run in self._runs.values():
            run.given_up = run.given_up or (self._lost if run.taken else self._doubted)
            if run.given_up is not None:
                run.patience.cut()

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.hang_up()
            self._call = None

    async def run(self, request: Request, message: bytes, answer: Answer) -> None:
        """Runs a serialised SequenceRequest and adds its events to ``answer``, whose request has ended when
        this returns. Raises NotTaken.

        Cancelling this task also ends the sequence in the engine. The request has then ended only if
        ``request.cancelling`` was set.
        """
        if self._doubted is not None:
            raise NotTaken(self._doubted, certain=True)
        if self._call is None:
            self._call = EngineCall(self._open(), take=self._take, over=self._end_runs)
        over = asyncio.get_running_loop().create_future()
        run = _Run(next(self._numbers), request, answer, self._call, Patience(), over)
        self._runs[run.number] = run
        try:
            async with run.patience:
                run.patience.begin(self._limits.stall_s)
                run.call.submit(run.number, message)
                await run.over
        except asyncio.CancelledError:
            if request.cancelling:
                answer.end(api.FINISH_REASON_CANCELLED)
            raise
        except TimeoutError:
            run.failure = run.given_up or self._stalled()
        finally:
            del self._runs[run.number]
            if not run.ended:
                run.call.drop(run.number)
        if run.failure is not None:
            self._break(run, run.failure)

    def cancel(self, sequence_id: str) -> None:
        """Asks the engine to end a sequence."""
        for run in self._runs.values():
            if run.request.sequence_id == sequence_id:
                self._cancel(run, None)

    def _cancel(self, run: _Run, choice: int | None) -> None:
        if choice not in run.cancelled:
            run.cancelled.add(choice)
            run.call.cancel(run.number, choice=choice)

    def _take(self, events: Sequence[cluster.SequenceEvent]) -> None:
        """Adds events to their requests."""
        self.heard_s = asyncio.get_running_loop().time()
        for event in events:
            run = self._runs.get(event.number)
            if run is None or run.over.done():
                continue
            try:
                self._add(run, event)
            except Exception as error:
                run.over.set_exception(error)
            else:
                if run.ended or run.request.ended:
                    run.over.set_result(None)

    def _add(self, run: _Run, event: cluster.SequenceEvent) -> None:
        if event.HasField("failed"):
            run.failure, run.ended = self._failure(event.failed), True
            return
        run.taken = True
        stopped = run.answer.take(event)
        if stopped is not None:
            # The gateway matches stop strings; the engine does not know them.
            self._cancel(run, stopped)
        run.ended = run.answer.engine_ended
        run.patience.begin(self._limits.cancel_s if run.answer.complete else self._limits.stall_s)

    def _end_runs(self, call: EngineCall, code: grpc.StatusCode, details: str) -> None:
        """Ends the requests of a call that is over. Failures of the connection get a code that does not blame
        the client."""
        if call is self._call:
            self._call = None
        message, refused = shortened(details, ERROR_MESSAGE_CHARS), False
        if code in _CONNECTION or details == rpc.FROM_CORE:
            self._broke()
            failure = self._lost_failure(message)
        elif code == grpc.StatusCode.OK:
            failure = self._lost_failure("it ended the stream without finishing")
        elif code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            failure, refused = Failure(code, message), True  # It serves as many calls as it can.
        else:
            failure = Failure(grpc.StatusCode.INTERNAL, f"{self.name}: {message}")
        for run in self._runs.values():
            if run.call is call and not run.over.done():
                run.failure, run.ended = failure, refused
                run.over.set_result(None)

    def _break(self, run: _Run, failure: Failure) -> None:
        """Ends a request that broke: fails it, unless its answer is complete or it was being cancelled.
        Raises NotTaken if another engine may run it."""
        if run.answer.complete:
            run.answer.end(api.FINISH_REASON_STOP)
        elif run.request.cancelling:
            run.answer.end(api.FINISH_REASON_CANCELLED)
        elif not run.taken and failure.code in _ELSEWHERE:
            raise NotTaken(failure, certain=run.ended)
        else:
            run.request.fail(failure)

    def _failure(self, failed: cluster.SequenceFailed) -> Failure:
        """How a request fails with an error of the engine. Refusals keep their code and message."""
        code, message = rpc.code_of(failed.code), shortened(failed.message, ERROR_MESSAGE_CHARS)
        trailing = tuple(failed.trailing.items())
        if code in _REFUSALS:
            return Failure(code, message, trailing)
        # Without the engine's name the failure would look like the gateway's.
        code = code if code == grpc.StatusCode.UNAVAILABLE else grpc.StatusCode.INTERNAL
        return Failure(code, f"{self.name}: {message}", trailing)

    def _lost_failure(self, why: str) -> Failure:
        return Failure(grpc.StatusCode.UNAVAILABLE, f"{self.name} was lost ({why}): send the request again")

    def _stalled(self) -> Failure:
        return Failure(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"{self.name} sent nothing for {self._limits.stall_s:g} s"
        )
