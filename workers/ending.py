"""Ends a worker's process: what it serves drains first, for a limited time.

Used by a worker's process: the Ray actors and ``python -m farshore.workers.attention``. It must not know what
the worker serves.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

HEARD_S = 2.0
"""A worker that is told to end by a signal waits this long before it believes that nothing needs it: until
engines and gateways have looked into the directory again, they may send it something new."""
POLL_S = 0.1
TOLD_S = 3.0
"""A worker that failed stays listed this long, so that the controller and a driver that waits read why."""


class Worker(Protocol):
    """The part of a worker that ends. Thread-safe."""

    def begin_drain(self) -> None:
        """Takes nothing new, and says so in the directory and in its health. Idempotent."""

    @property
    def is_drained(self) -> bool:
        """Whether nothing needs the worker any more."""

    def stop(self) -> None:
        """Withdraws, fails what is left so that it is sent again, and ends the streams."""


class Ending:
    """``then`` is called when the worker has stopped or failed: it ends the process, with this exit code."""

    def __init__(self, worker: Worker, *, then: Callable[[int], None] = os._exit) -> None:
        self._worker = worker
        self._then = then
        self._changed = threading.Condition()
        self._began = False
        self._end_s = float("inf")
        self._heard_s = 0.0

    def begin(self, grace_s: float, *, heard: bool = True) -> None:
        """Begins to end the worker, and returns. What it serves may go on for ``grace_s``. ``heard``: whether
        engines and gateways know already that it drains. A later call may only bring the end forward."""
        with self._changed:
            self._end_s = min(self._end_s, time.monotonic() + grace_s)
            self._changed.notify_all()
            if self._began:
                return
            self._began = True
            self._heard_s = time.monotonic() + (0.0 if heard else HEARD_S)
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def fail(self) -> None:
        """Ends the process of a worker that can't go on: with exit code 1, after TOLD_S. Returns at once. The
        worker is not stopped in order, since it may be unable to."""
        ending = threading.Timer(TOLD_S, self._then, args=(1,))
        ending.daemon = True
        ending.start()

    def on_sigterm(self, grace_s: float) -> None:
        """Makes SIGTERM begin the end. Call it in the main thread."""

        def handle(*_: object) -> None:
            # The interrupted code may hold the lock.
            threading.Thread(target=self.begin, args=(grace_s,), kwargs={"heard": False}).start()

        signal.signal(signal.SIGTERM, handle)

    def _drain(self) -> None:
        try:
            self._worker.begin_drain()
            with self._changed:
                while (now_s := time.monotonic()) < self._end_s:
                    if now_s >= self._heard_s and self._worker.is_drained:
                        break
                    self._changed.wait(min(POLL_S, self._end_s - now_s))
            self._worker.stop()
        finally:
            # A worker that can't stop in order must end, too.
            self._then(0)
