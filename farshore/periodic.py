"""Work in the background that repeats, and goes on after an error: in a thread, or in a task of asyncio.

Used by every thread and task that a process needs for as long as it runs. Must not know what the work is.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable

RETRY_S = 0.5
"""Time between an error in a task and the next attempt."""

Tell = Callable[[Exception], None]
"""Logs an error."""


class ErrorLog:
    """Tells an error once: not again while every further attempt fails with the same type of error. Not
    thread-safe."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told: type[Exception] | None = None

    def failed(self, error: Exception) -> None:
        if type(error) is not self._told:
            self._tell(error)
        self._told = type(error)

    def succeeded(self) -> None:
        self._told = None


class PeriodicThread:
    """Calls ``call`` in a daemon thread, from :meth:`start` until :meth:`stop`, with ``period_s`` between two
    calls. No exception ends it: ``tell`` is given each that :class:`ErrorLog` tells."""

    def __init__(self, call: Callable[[], None], *, name: str, period_s: float, tell: Tell) -> None:
        self._call = call
        self._period_s = period_s
        self._errors = ErrorLog(tell)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the call under way. Idempotent."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._call()
                self._errors.succeeded()
            except Exception as error:
                self._errors.failed(error)
            self._stopped.wait(self._period_s)


async def repeat(step: Callable[[], Awaitable[None]], *, tell: Tell) -> None:
    """Awaits ``step()`` again and again until the task is cancelled. A step waits for its own occasion. After
    an exception the next one begins RETRY_S later; ``tell`` is given each that :class:`ErrorLog` tells."""
    errors = ErrorLog(tell)
    while True:
        try:
            await step()
            errors.succeeded()
        except Exception as error:
            errors.failed(error)
            await asyncio.sleep(RETRY_S)
