"""One Run call between this gateway and an engine: messages of all requests, in one order.

Made by ``engine_client``, which knows the requests. Must not know what the events mean.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

import grpc

from farshore.proto import cluster_pb2 as cluster

_logger = logging.getLogger(__name__)

Over = Callable[["EngineCall", grpc.StatusCode, str], None]


class EngineCall:
    """Open from construction until it breaks, or until :meth:`hang_up`. Use it on the event loop only."""

    def __init__(
        self, call: grpc.aio.StreamStreamCall, *, take: Callable[[cluster.EngineMessage], None], over: Over
    ) -> None:
        """``take`` is called with each message; ``over`` once, with the status and its message, unless this
        side hangs up."""
        self._call = call
        self._take = take
        self._over = over
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._wanted = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def submit(self, number: int, message: bytes) -> None:
        """Begins a request. ``message``: a serialised SequenceRequest."""
        self._send(number, cluster.GatewayMessage(number=number, submit=message))

    def cancel(self, number: int, *, choice: int | None = None) -> None:
        """Asks the engine to end a request, or one choice of it."""
        self._send(
            number, cluster.GatewayMessage(number=number, cancel=cluster.CancelSequence(choice=choice))
        )

    def drop(self, number: int) -> None:
        """Ends a request whose events are no longer read. If the engine does not read, nothing of the request
        stays in memory but its end."""
        if any(waiting == number for waiting, _ in self._unsent):
            self._unsent = deque(item for item in self._unsent if item[0] != number)
        self.cancel(number)

    def hang_up(self) -> None:
        """Ends the call, and with it what the engine runs for it."""
        for task in self._tasks:
            task.cancel()
        self._call.cancel()

    def _send(self, number: int, message: cluster.GatewayMessage) -> None:
        self._unsent.append((number, message.SerializeToString()))
        self._wanted.set()

    async def _write(self) -> None:
        # An error ends the call, and the reader reports it.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while self._unsent:
                    _, message = self._unsent.popleft()
                    await self._call.write(message)

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._take(message)
            code, details = await self._call.code(), await self._call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details()
        except Exception as error:
            _logger.exception("an engine's message makes no sense")
            self._call.cancel()
            code, details = grpc.StatusCode.INTERNAL, f"its message makes no sense ({type(error).__name__})"
        self._tasks[1].cancel()
        self._over(self, code, details or "no details")
