"""All requests a gateway knows: the live ones, bounded, and the ended ones for a while.

Called by ``service``. Decides how long a request lives without readers; must not know how tokens are made or
how readers are reached.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator

import grpc

from farshore.errors import InvalidRequest, NotFound, Overloaded
from farshore.gateway.engine import Engine
from farshore.gateway.limits import Limits
from farshore.gateway.request import Failure, Request
from farshore.gateway.validate import Job

_logger = logging.getLogger(__name__)


class RequestLog:
    """On the event loop only. ``close`` ends every live request."""

    def __init__(
        self, engine: Engine, limits: Limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._preparing = 0
        self._live: dict[str, Request] = {}
        self._pumps: dict[Request, asyncio.Task] = {}
        self._ended: OrderedDict[str, tuple[Request, float]] = OrderedDict()  # with the time of their end
        self._ended_tokens = 0
        self._leaving: dict[Request, asyncio.TimerHandle] = {}
        self._chores: set[asyncio.Task] = set()  # the loop itself holds tasks weakly

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Holds one place from before a prompt is tokenized until its request has started."""
        if len(self._live) + self._preparing >= self._limits.max_live_requests:
            raise Overloaded(
                f"{self._limits.max_live_requests} requests are running, the most this gateway takes: "
                f"try again in {self._limits.retry_after_ms} ms"
            )
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

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
            if request.failed and not resume_from:
                # Asked for again from the start: a retry, which must not get the old failure again.
                self._forget(request_id)
                request = None
            elif request.fingerprint != fingerprint:
                raise InvalidRequest(
                    f"request_id {request_id!r} belongs to a request with another prompt or other sampling: "
                    "choose a new id"
                )
        if request is None and request_id and (resume_from or fingerprint is None):
            raise NotFound(
                f"request {request_id!r} is unknown or was forgotten: "
                "send its prompt again with resume_from 0"
            )
        if request is not None:
            request.check_resume(resume_from)
        return request

    def start(self, request_id: str, job: Job, *, fingerprint: bytes, arrived_s: float) -> Request:
        """Call inside ``admission``. An empty id: one is made, and the request ends with its reader."""
        request = Request(
            request_id or uuid.uuid4().hex,
            fingerprint=fingerprint,
            prompt_tokens=len(job.prompt),
            outlives_readers=bool(request_id),
            arrived_s=arrived_s,
            clock=self._clock,
        )
        self._live[request.request_id] = request
        self._pumps[request] = self._spawn(self._run(request, job))
        return request

    @contextlib.contextmanager
    def reading(self, request: Request) -> Iterator[None]:
        """Counts a reader. When the last one leaves a live request, its end is near."""
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
            raise NotFound(f"request {request_id!r} is unknown or was forgotten")
        await self._end(request)

    async def close(self) -> None:
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()
        for task in self._chores:
            task.cancel()
        if self._chores:
            await asyncio.wait(self._chores, timeout=self._limits.shutdown_s)

    async def _run(self, request: Request, job: Job) -> None:
        try:
            await self._engine.pump(request, job)
        except Exception:
            _logger.exception("request %s broke the gateway", request.request_id)
            await request.fail(Failure(grpc.StatusCode.INTERNAL, "the gateway failed; see its log"))
        finally:
            self._pumps.pop(request, None)
            timer = self._leaving.pop(request, None)
            if timer is not None:
                timer.cancel()
            del self._live[request.request_id]
            self._ended[request.request_id] = (request, self._clock())
            self._ended_tokens += request.size_tokens
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
        await self._engine.cancel(request.request_id)
        await asyncio.wait([pump], timeout=self._limits.cancel_s)
        if not pump.done():
            pump.cancel()
            await asyncio.wait([pump], timeout=self._limits.cancel_s)

    def _forget_old(self) -> None:
        """Entries stand in the order of their last use; ages are close enough to it."""
        expired_s = self._clock() - self._limits.replay_s
        for request_id in [key for key, (_, ended_s) in self._ended.items() if ended_s <= expired_s]:
            self._forget(request_id)
        while len(self._ended) > self._limits.replay_requests or (
            self._ended_tokens > self._limits.replay_tokens and self._ended
        ):
            self._forget(next(iter(self._ended)))

    def _forget(self, request_id: str) -> None:
        request, _ = self._ended.pop(request_id)
        self._ended_tokens -= request.size_tokens

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task
