"""All requests a gateway knows: the live ones, bounded, and the ended ones for a while.

Called by ``service``. Decides how long a request lives without readers; must not know how tokens are made or
how readers are reached.
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

from farshore import rpc
from farshore.errors import FarshoreError, InvalidRequest, NotFound, Overloaded, TransportError
from farshore.gateway.limits import Limits
from farshore.gateway.requests.request import Failure, Request
from farshore.gateway.requests.validate import Job
from farshore.gateway.shown import shown
from farshore.proto import inference_pb2 as api

_logger = logging.getLogger(__name__)

_LEAST_TIMER_S = 0.01


class EngineClient(Protocol):
    """An engine, as the request log uses it. On the event loop only."""

    async def pump(self, request: Request, job: Job) -> None:
        """Runs ``job`` and fills ``request``, which has ended when this returns, whatever happened."""

    async def cancel(
        self, sequence_id: str, *, choice: int | None = None, deadline_s: float | None = None
    ) -> None:
        """Asks the engine to end a sequence, or one choice of it. Raises nothing."""


class RequestLog:
    """On the event loop only. ``close`` ends every live request."""

    def __init__(
        self,
        engine: EngineClient,
        limits: Limits,
        *,
        preparing: Executor,
        engine_problem: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``preparing``: threads for prompts, so that a long one doesn't hold up the tokens of others.
        ``engine_problem``: why a new request can't run at the moment."""
        self._engine = engine
        self._limits = limits
        self._preparing = preparing
        self._engine_problem = engine_problem
        self._clock = clock
        # Ids that the cluster acts on are made here: a client's might be another's, or look like one of ours.
        self._incarnation = secrets.token_hex(4)
        self._counter = itertools.count(1)
        self.calls = self._call_bytes = 0
        self._closing = False
        self._live: dict[str, Request] = {}
        self._preparations: dict[Request, asyncio.Future[Job]] = {}
        self._pumps: dict[Request, asyncio.Task] = {}
        self._ended: OrderedDict[str, tuple[Request, float]] = OrderedDict()  # with the time of their end
        self._forgetting: asyncio.TimerHandle | None = None
        self._leaving: dict[Request, asyncio.TimerHandle] = {}
        self._chores: set[asyncio.Task] = set()  # the loop itself holds tasks weakly

    @property
    def ended_bytes(self) -> int:
        """What ended requests take."""
        return sum(request.size_bytes for request, _ in self._ended.values())

    @contextlib.contextmanager
    def call(self, size_bytes: int) -> Iterator[None]:
        """Counts an open Generate call and its message, whatever it asks for. Raises Overloaded."""
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

    def find(self, request_id: str) -> Request | None:
        self._forget_old()
        if request_id in self._live:
            return self._live[request_id]
        entry = self._ended.get(request_id)
        if entry is None:
            return None
        self._ended.move_to_end(request_id)
        return entry[0]

    def find_same(self, request_id: str, fingerprint: bytes | None, resume_from: int) -> Request | None:
        """The request a client reconnects to. ``fingerprint``: of what it asks for, None if it doesn't say.

        None if it must be started. Raises InvalidRequest if the id belongs to another prompt, NotFound if
        there is nothing to go on with.
        """
        request = self.find(request_id) if request_id else None
        if request is not None and fingerprint is not None:
            if request.failed and not resume_from and request_id in self._ended:
                # Asked for again from the start: a retry, which must not get the old failure again.
                del self._ended[request_id]
                request = None
            elif request.fingerprint != fingerprint:
                raise InvalidRequest(
                    f"request_id {shown(request_id)} belongs to a request with another prompt or other "
                    "sampling: choose a new id"
                )
        if request is None and request_id and (resume_from or fingerprint is None):
            raise NotFound(
                f"request {shown(request_id)} is unknown or was forgotten: "
                "send its prompt again with resume_from 0"
            )
        if request is not None:
            request.check_resume(resume_from)
        return request

    def start(
        self,
        request_id: str,
        prepare: Callable[[str], Job],
        *,
        fingerprint: bytes,
        choices: int,
        values: int,
        arrived_s: float,
    ) -> Request:
        """A new request, known from here on, before its prompt is read. Its id must be free.

        Raises Overloaded, and TransportError if the engine or this gateway can't take it. ``prepare`` gets
        the sequence id, in a thread. An empty ``request_id``: one is made, and the request ends with its
        reader.
        """
        self._check_room(values)
        request = Request(
            request_id or uuid.uuid4().hex,
            sequence_id=f"{self._incarnation}-{next(self._counter)}",
            fingerprint=fingerprint,
            choices=choices,
            values=values,
            outlives_readers=bool(request_id),
            arrived_s=arrived_s,
            clock=self._clock,
        )
        self._live[request.request_id] = request
        preparation = asyncio.get_running_loop().run_in_executor(
            self._preparing, prepare, request.sequence_id
        )
        self._preparations[request] = preparation
        self._pumps[request] = self._spawn(self._run(request, preparation))
        return request

    def _check_room(self, values: int) -> None:
        if self._closing:
            raise TransportError("this gateway is shutting down: send the request again later, or to another")
        problem = self._engine_problem()
        if problem is not None:
            raise TransportError(f"{problem}; try again in {self._limits.retry_after_ms} ms")
        if len(self._live) >= self._limits.max_live_requests:
            raise self._overloaded(f"{len(self._live)} requests are running, the most this gateway takes")
        asked = sum(request.values for request in self._live.values())
        if self._live and asked + values > self._limits.live_values:
            raise self._overloaded(f"running requests may give {asked} tokens and alternatives")

    def _overloaded(self, why: str) -> Overloaded:
        return Overloaded(f"{why}: try again in {self._limits.retry_after_ms} ms")

    @contextlib.contextmanager
    def reading(self, request: Request) -> Iterator[None]:
        """Counts a reader. When the last one leaves a live request, its end is near. Raises Overloaded."""
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
                self._abandoned(request)

    async def cancel(self, request_id: str) -> None:
        """Returns when the request has ended. Raises NotFound."""
        request = self.find(request_id)
        if request is None:
            raise NotFound(f"request {shown(request_id)} is unknown or was forgotten")
        await self._end(request)

    async def close(self) -> None:
        """Takes no new request, lets those that are read run for ``drain_s``, and fails the rest."""
        self._closing = True
        read = [pump for request, pump in self._pumps.items() if request.readers]
        if read:
            await asyncio.wait(read, timeout=self._limits.drain_s)
        for request in list(self._live.values()):
            await request.fail(
                Failure(
                    grpc.StatusCode.UNAVAILABLE,
                    f"the gateway shut down when {request.tokens} tokens of the answer had come: send the "
                    "prompt again, with resume_from 0, to a gateway that serves (request_id may stay; with "
                    "the same seed the answer begins with the same tokens)",
                )
            )
        timers = [*self._leaving.values(), *([self._forgetting] if self._forgetting else ())]
        for timer in timers:
            timer.cancel()
        self._leaving.clear()
        for task in self._chores:
            task.cancel()
        if self._chores:
            await asyncio.wait(self._chores, timeout=self._limits.shutdown_s)

    async def _run(self, request: Request, preparation: asyncio.Future[Job]) -> None:
        refused = False
        try:
            job = await preparation
            del self._preparations[request], preparation
            await request.accept(job.prompt_tokens)
            await self._engine.pump(request, job)
        except asyncio.CancelledError:
            if request.cancelling:
                ends = [api.Completion(reason=api.FINISH_REASON_CANCELLED)] * request.choices
                await request.finish(ends)
            raise
        except FarshoreError as error:
            refused = True
            await request.fail(Failure(*rpc.status_of(error)))
        except Exception:
            _logger.exception("sequence %s broke the gateway", request.sequence_id)
        finally:
            await request.fail(Failure(grpc.StatusCode.INTERNAL, "the gateway failed; see its log"))
            self._put_away(request, refused=refused)

    def _put_away(self, request: Request, *, refused: bool) -> None:
        """A refused request was none: its readers have the reason, and its id is free."""
        del self._pumps[request]
        self._preparations.pop(request, None)
        timer = self._leaving.pop(request, None)
        if timer is not None:
            timer.cancel()
        del self._live[request.request_id]
        if not refused and not self._closing:
            self._ended[request.request_id] = (request, self._clock())
            self._forget_old()

    def _abandoned(self, request: Request) -> None:
        if not request.outlives_readers:
            self._spawn(self._end(request))
            return
        self._leaving[request] = asyncio.get_running_loop().call_later(
            self._limits.grace_s, lambda: self._spawn(self._end(request))
        )

    async def _end(self, request: Request) -> None:
        """Ask the engine, and cut the stream if it doesn't answer."""
        self._leaving.pop(request, None)
        pump = self._pumps.get(request)
        if pump is None:
            return
        request.cancelling = True
        preparation = self._preparations.get(request)
        # Not the pump: a task that is cancelled before its first step never runs, and would end nothing.
        if preparation is not None and preparation.cancel():
            await asyncio.wait([pump], timeout=self._limits.cancel_s)
        else:
            await self._ask_to_end(request, pump)
        if not pump.done():
            pump.cancel()
            await asyncio.wait([pump], timeout=self._limits.cancel_s)

    async def _ask_to_end(self, request: Request, pump: asyncio.Task) -> None:
        """More than once: the engine ignores ids that it doesn't know, and may not have read this one yet."""
        loop = asyncio.get_running_loop()
        deadline_s, patience_s = loop.time() + self._limits.cancel_s, self._limits.cancel_again_s
        while not pump.done() and (left_s := deadline_s - loop.time()) > 0:
            await self._engine.cancel(request.sequence_id, deadline_s=left_s)
            await asyncio.wait([pump], timeout=min(patience_s, left_s))
            patience_s *= 2

    def _forget_old(self) -> None:
        """Runs with every use, and when the next entry is due. Entries stand in the order of their last use;
        ages are close enough to it."""
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        now_s = self._clock()
        for request_id, (_, ended_s) in list(self._ended.items()):
            if ended_s <= now_s - self._limits.replay_s:
                del self._ended[request_id]
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
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task
