"""Bounds each of many waits of one task.

Used for every token that the gateway reads and writes: ``asyncio.timeout`` would set and cancel a timer for
each wait, which took a tenth of the gateway's time. Must not know what is awaited.
"""

import asyncio
from types import TracebackType
from typing import Self


class Patience:
    """A context manager around the waits of a task. A wait that outlasts its bound is cancelled, and the
    block raises TimeoutError. Use it on the event loop only::

        async with Patience() as patience:
            while True:
                patience.begin(60.0)
                await read()
                patience.end()
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._due_s: float | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._timer is not None:
            self._timer.cancel()
        return await self._timeout.__aexit__(kind, error, trace)

    def begin(self, bound_s: float) -> None:
        """A wait of at most ``bound_s`` seconds begins, in place of the one before."""
        self._due_s = self._loop.time() + bound_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._look)
        elif self._timer.when() > self._due_s:
            self._timer.cancel()
            self._timer = self._loop.call_at(self._due_s, self._look)

    def end(self) -> None:
        """The wait has ended."""
        self._due_s = None

    def cut(self) -> None:
        """Ends the block with TimeoutError at once, whether or not it waits. Does nothing the second time."""
        if not self._timeout.expired():
            self._timeout.reschedule(self._loop.time())

    def _look(self) -> None:
        """The timer is late for most waits: it is not moved when they end."""
        self._timer = None
        if self._due_s is None:
            return
        if self._due_s <= self._loop.time():
            self.cut()
        else:
            self._timer = self._loop.call_at(self._due_s, self._look)
