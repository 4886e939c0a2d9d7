"""The cluster's newest status and events, shared by all open pages.

Made by ``api.server``, read by ``page`` for each poll. Asks the controller only while pages ask, and once for
all of them. Must not know HTTP, or how the controller is reached.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from farshore.gateway.page.view import MOST_EVENTS, Sample, view
from farshore.gateway.requests.request import RequestFailed
from farshore.proto import admin_pb2 as admin

FRESH_S = 0.9
"""An answer, or a failure, is given to every page that asks within this time. A page asks every second."""

RATE_S = 5.0
"""Rates are means over at most this time."""


class Operators(Protocol):
    """The controller's calls for operators. Both raise RequestFailed."""

    async def status(self) -> admin.ClusterStatusResponse: ...

    async def events(self, since: int) -> list[admin.ClusterEvent]:
        """Those with greater numbers, oldest first."""
        ...


class Watch:
    """Use it on the event loop only."""

    def __init__(self, operators: Operators, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._operators = operators
        self._clock = clock
        self._asking = asyncio.Lock()
        self._answer: dict[str, Any] | RequestFailed | None = None
        self._answered_s = 0.0
        self._samples: deque[Sample] = deque()
        self._events: deque[admin.ClusterEvent] = deque(maxlen=MOST_EVENTS)

    async def read(self) -> dict[str, Any]:
        """The newest ``view``, at most FRESH_S old. Raises RequestFailed if the controller did not answer."""
        async with self._asking:
            if self._answer is None or self._clock() - self._answered_s >= FRESH_S:
                try:
                    self._answer = await self._ask()
                except RequestFailed as failed:
                    self._answer = failed
                self._answered_s = self._clock()
        if isinstance(self._answer, RequestFailed):
            raise RequestFailed(self._answer.failure)
        return self._answer

    async def _ask(self) -> dict[str, Any]:
        status = await self._operators.status()
        now = Sample.of(status, self._clock())
        while self._samples and now.at_s - self._samples[0].at_s > RATE_S:
            self._samples.popleft()
        self._samples.append(now)
        await self._read_events()
        return view(status, self._events, now=now, before=self._samples[0], unix_s=time.time())

    async def _read_events(self) -> None:
        """Reads the newest known event again, too: a controller that lost its events counts from 1 anew."""
        if not self._events:
            self._events.extend(await self._operators.events(0))
            return
        newest = self._events[-1]
        known, *new = await self._operators.events(newest.number - 1) or [None]
        if known == newest:
            self._events.extend(new)
        else:
            anew = await self._operators.events(0)
            self._events.clear()
            self._events.extend(anew)
