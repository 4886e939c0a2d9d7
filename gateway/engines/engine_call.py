"""One Run call between this gateway and an engine: messages of all requests, in one order.

Made by ``engine_client``, which knows the requests. Must not know what the events mean.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

import grpc

from farshore.proto import cluster_pb2 as cluster

_logger = logging.getLogger(__name__)

EVENTS_AT_ONCE = 32
"""Events between which nothing else runs. A message may have a token of every stream: the first ones go on to
their readers before the last ones are taken."""

Take = Callable[[Sequence[cluster.SequenceEvent]], None]
Over = Callable[["EngineCall", grpc.StatusCode, str], None]


class EngineCall:
    """Open from construction until it breaks, or until :meth:`hang_up`. Use it on the event loop only."""

    def __init__(self, call: grpc.aio.StreamStreamCall, *, take: Take, over: Over) -> None:
        """``take`` is called with events as they come; ``over`` once, with the status and its message, unless
        this side hangs up."""
        self._call = call
        self._take = take
        self._over = over
        self._unsent: deque[cluster.GatewayMessage] = deque()
        self._wanted = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def submit(self, number: int, message: bytes) -> None:
        """Begins a request. ``message``: a serialised SequenceRequest."""
        self._send(cluster.GatewayMessage(number=number, submit=message))

    def cancel(self, number: int, *, choice: int | None = None) -> None:
        """Asks the engine to end a request, or one choice of it."""
        cancel = cluster.CancelSequence(choice=choice)
        self._send(cluster.GatewayMessage(number=number, cancel=cancel))

    def drop(self, number: int) -> None:
        """Ends a request whose events are not wanted any more. One that the engine has not read yet is not
        kept for it."""
        waiting = [message for message in self._unsent if message.number == number]
        if waiting and waiting[0].HasField("submit"):
            self._unsent = deque(message for message in self._unsent if message.number != number)
        else:
            self.cancel(number)

    def hang_up(self) -> None:
        """Ends the call, and with it what the engine runs for it."""
        for task in self._tasks:
            task.cancel()
        self._call.cancel()

    def _send(self, message: cluster.GatewayMessage) -> None:
        self._unsent.append(message)
        self._wanted.set()

    async def _write(self) -> None:
        # An error ends the call, and the reader reports it.
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while self._unsent:
                    await self._call.write(self._unsent.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        except Exception:
            _logger.exception("a message to an engine can't be sent")
            self._call.cancel()

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                events = message.events
                for first in range(0, len(events), EVENTS_AT_ONCE):
                    if first:
                        await asyncio.sleep(0)
                    self._take(events[first : first + EVENTS_AT_ONCE])
            code, details = await self._call.code(), await self._call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details()
        except Exception as error:
            _logger.exception("an engine's message makes no sense")
            self._call.cancel()
            code, details = grpc.StatusCode.INTERNAL, f"its message makes no sense ({type(error).__name__})"
        self._tasks[1].cancel()
        self._over(self, code, details or "no details")
