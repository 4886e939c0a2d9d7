"""The request log: all live requests, bounded, and the ended ones for ``replay_s``.

Called by ``api.service``. Decides how long a request goes on without readers. Must not know how tokens are
generated or how events reach readers.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from typing import Protocol

import grpc

from farshore.errors import AlreadyExists, FarshoreError, NotFound, Overloaded, TransportError
from farshore.gateway.limits import Limits
from farshore.gateway.requests.request import Failure, Request, RequestKey
from farshore.gateway.requests.validate import Job
from farshore.proto import inference_pb2 as api

_logger = logging.getLogger(__name__)

_LEAST_TIMER_S = 0.01


class Runner(Protocol):
    """Runs requests on engines. Use it on the event loop only."""

    async def pump(self, request: Request, job: Job) -> None:
        """Runs ``job`` and adds its events to ``request``, which has ended when this returns."""

    def cancel(self, sequence_id: str) -> None:
        """Asks the engine that runs a sequence to end it. If none does yet, ``pump`` ends the request, whose
        ``cancelling`` is set."""


class RequestLog:
    """The requests of one gateway. Use it on the event loop only. ``close`` ends all live requests."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        preparing: Executor,
        engine_problem: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``preparing``: threads that tokenize prompts, so that a long prompt does not delay the tokens of
        other requests. ``engine_problem``: returns why a new request can't run now, or None."""
        self._runner = runner
        self._limits = limits
        self._preparing = preparing
        self._engine_problem = engine_problem
        self._clock = clock
        # Sequence ids are made here and not taken from clients: two clients may choose the same id, and a
        # client's id may equal a made one. The incarnation makes them differ from other gateways' ids.
        self._incarnation = secrets.token_hex(8)
        self._counter = itertools.count(1)
        self.calls = self._call_bytes = 0
        self._closing = False
        self._live: dict[RequestKey, Request] = {}
        self._preparations: dict[Request, asyncio.Future[Job]] = {}
        self._pumps: dict[Request, asyncio.Task] = {}
        # (request, time of its end)
        self._ended: OrderedDict[RequestKey, tuple[Request, float]] = OrderedDict()
        self._forgetting: asyncio.TimerHandle | None = None
        self._leaving: dict[Request, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task] = set()  # strong references: the event loop holds weak ones

    @property
    def ended_bytes(self) -> int:
        """Bytes of the ended requests' events."""
        return sum(request.size_bytes for request, _ in self._ended.values())

    @contextlib.contextmanager
    def call(self, size_bytes: int) -> Iterator[None]:
        """Counts an open Generate call and the bytes of its message. Raises Overloaded beyond the limits."""
        if self.calls >= self._limits.max_readers:
            raise self._overloaded(f"{self.calls} calls are open, the most this gateway takes")
        if self.calls and self._call_bytes + size_bytes > self._limits.open_bytes:
            raise self._overloaded(f"open calls hold {self._call_bytes} bytes of prompts")
        self.calls += 1
        self._call_bytes += size_bytes
        try:
            yield
        finally:
            self.calls -= 1
            self._call_bytes -= size_bytes

    def find(self, key: RequestKey) -> Request | None:
        """The live or ended request of this name; None if it is unknown or forgotten."""
        self._forget_old()
        if key in self._live:
            return self._live[key]
        if key not in self._ended:
            return None
        self._ended.move_to_end(key)
        return self._ended[key][0]

    def find_same(self, key: RequestKey, fingerprint: bytes | None, resume_from: int) -> Request | None:
        """The request that a call reconnects to; None if the call starts a new one. ``fingerprint``: see
        ``received``; None if the call has no prompt.

        Raises AlreadyExists if the id belongs to a request with another fingerprint, InvalidRequest if that
        has fewer tokens than ``resume_from``, and NotFound if a call that must reconnect has an unknown id.
        """
        request = self.find(key) if key.request_id else None
        if request is not None and fingerprint is not None:
            if request.failed and not resume_from and key in self._ended:
                # A failed request that is sent again is a retry: it must not get the old failure.
                del self._ended[key]
                request = None
            elif request.fingerprint != fingerprint:
                raise AlreadyExists(
                    "request_id belongs to a request with another prompt or other sampling: choose a new id",
                    field="request_id",
                )
        if request is None and key.request_id and (resume_from or fingerprint is None):
            raise NotFound(
                "the request is unknown or was forgotten: send its prompt again, with resume and the tokens "
                "received, or with resume_from 0"
            )
        if request is not None:
            request.check_resume(resume_from)
        return request

    def start(
        self,
        key: RequestKey,
        prepare: Callable[[str], Job],
        *,
        fingerprint: bytes,
        choices: int,
        values: int,
        arrived_s: float,
    ) -> Request:
        """Starts a request. It can be found from now on, before its prompt is tokenized. ``key`` must be
        unused; if its id is "" a random one is made, and the request ends with its last reader. ``prepare``
        is called with the sequence id, in a thread.

        Raises Overloaded, or TransportError if the engine or this gateway can't take a request now.
        """
        self._check_capacity(values)
        request = Request(
            key if key.request_id else key._replace(request_id=uuid.uuid4().hex),
            sequence_id=f"{self._incarnation}-{next(self._counter)}",
            fingerprint=fingerprint,
            choices=choices,
            values=values,
            outlives_readers=bool(key.request_id),
            arrived_s=arrived_s,
            clock=self._clock,
        )
        self._live[request.key] = request
        preparation = asyncio.get_running_loop().run_in_executor(
            self._preparing, prepare, request.sequence_id
        )
        self._preparations[request] = preparation
        self._pumps[request] = self._spawn(self._run(request, preparation))
        return request

    def _check_capacity(self, values: int) -> None:
        if self._closing:
            raise TransportError("this gateway is shutting down: send the request again later, or to another")
        problem = self._engine_problem()
        if problem is not None:
            raise TransportError(f"{problem}; try again in {self._limits.retry_after_ms} ms")
        running = self._pumps.keys()  # with those that were abandoned and are about to end
        if len(running) >= self._limits.max_live_requests:
            raise self._overloaded(f"{len(running)} requests are running, the most this gateway takes")
        live_values = sum(request.values for request in running)
        if running and live_values + values > self._limits.live_values:
            raise self._overloaded(f"running requests may give {live_values} tokens and alternatives")

    def _overloaded(self, why: str) -> Overloaded:
        return Overloaded(f"{why}: try again in {self._limits.retry_after_ms} ms")

    @contextlib.contextmanager
    def reading(self, request: Request) -> Iterator[None]:
        """Counts a reader. When the last reader of a live request leaves, the request is ended: at once if
        this gateway made its id, else after ``grace_s``. Raises Overloaded beyond ``readers_per_request``."""
        if request.readers >= self._limits.readers_per_request:
            raise self._overloaded(f"the request has {request.readers} readers, the most it may have")
        request.readers += 1
        timer = self._leaving.pop(request, None)
        if timer is not None:
            timer.cancel()
        try:
            yield
        finally:
            request.readers -= 1
            if not request.readers and not request.ended:
                self._end_without_readers(request)

    async def cancel(self, key: RequestKey) -> None:
        """Ends a request; returns when it has ended. Raises NotFound."""
        request = self.find(key)
        if request is None:
            raise NotFound("the request is unknown or was forgotten: give its request_id to its own gateway")
        await self._end(request)

    async def close(self) -> None:
        """Refuses new requests, waits up to ``drain_s`` for requests that have readers, and fails the
        rest."""
        self._closing = True
        read = [pump for request, pump in self._pumps.items() if request.readers]
        if read:
            await asyncio.wait(read, timeout=self._limits.drain_s)
        for request in list(self._live.values()):
            request.fail(
                Failure(
                    grpc.StatusCode.UNAVAILABLE,
                    f"the gateway shut down when {request.tokens} tokens of the answer had come: send the "
                    "prompt again to a gateway that serves, with resume and the tokens received, or with "
                    "resume_from 0 for the whole answer (request_id may stay)",
                )
            )
        timers = [*self._leaving.values(), *([self._forgetting] if self._forgetting else ())]
        for timer in timers:
            timer.cancel()
        self._leaving.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._limits.shutdown_s)

    async def _run(self, request: Request, preparation: asyncio.Future[Job]) -> None:
        refused = False
        try:
            job = await preparation
            del self._preparations[request], preparation
            request.accept(job.prompt_tokens, prompt_end=job.prompt_end_text, seed=job.seed)
            await self._runner.pump(request, job)
        except asyncio.CancelledError:
            if request.cancelling:
                ends = [api.Completion(reason=api.FINISH_REASON_CANCELLED)] * request.choices
                request.finish(ends)
            raise
        except FarshoreError as error:
            refused = True
            request.fail(Failure.of(error))
        except Exception:
            _logger.exception("sequence %s broke the gateway", request.sequence_id)
        finally:
            request.fail(Failure(grpc.StatusCode.INTERNAL, "the gateway failed; see its log"))
            self._put_away(request, refused=refused)

    def _put_away(self, request: Request, *, refused: bool) -> None:
        """Moves a request from the live to the ended ones. A refused request is not kept, so that its id can
        be used again; its readers got the reason. One that was abandoned is no longer among the live ones."""
        del self._pumps[request]
        self._preparations.pop(request, None)
        timer = self._leaving.pop(request, None)
        if timer is not None:
            timer.cancel()
        if self._live.get(request.key) is not request:
            return
        del self._live[request.key]
        if not refused and not self._closing:
            self._ended[request.key] = (request, self._clock())
            self._forget_old()

    def _end_without_readers(self, request: Request) -> None:
        if not request.outlives_readers:
            self._abandon(request)
            return
        self._leaving[request] = asyncio.get_running_loop().call_later(
            self._limits.grace_s, self._abandon, request
        )

    def _abandon(self, request: Request) -> None:
        """Ends a request without readers, and forgets it at once: a reader that came back would take the part
        of the answer for the whole."""
        if self._live.get(request.key) is request:
            del self._live[request.key]
            self._spawn(self._end(request))

    async def _end(self, request: Request) -> None:
        """Asks the engine to end the request, and ends it here if that takes longer than ``cancel_s``."""
        self._leaving.pop(request, None)
        pump = self._pumps.get(request)
        if pump is None:
            return
        request.cancelling = True
        preparation = self._preparations.get(request)
        # The preparation is cancelled first, not the pump: a task that is cancelled before its first step
        # never runs, so it would not end the request.
        if preparation is None or not preparation.cancel():
            self._runner.cancel(request.sequence_id)
        await asyncio.wait([pump], timeout=self._limits.cancel_s)
        if not pump.done():
            pump.cancel()
            await asyncio.wait([pump], timeout=self._limits.cancel_s)

    def _forget_old(self) -> None:
        """Forgets ended requests by age, number and bytes. Runs at each use, and by a timer when the next
        request is due. Requests are kept in the order of their last use, which approximates their age."""
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        now_s = self._clock()
        for key, (_, ended_s) in list(self._ended.items()):
            if ended_s <= now_s - self._limits.replay_s:
                del self._ended[key]
        size_bytes = self.ended_bytes
        while len(self._ended) > self._limits.replay_requests or size_bytes > self._limits.replay_bytes:
            _, (request, _) = self._ended.popitem(last=False)
            size_bytes -= request.size_bytes
        if self._ended:
            due_s = min(ended_s for _, ended_s in self._ended.values()) + self._limits.replay_s
            self._forgetting = asyncio.get_running_loop().call_later(
                max(due_s - now_s, _LEAST_TIMER_S), self._forget_old
            )

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
