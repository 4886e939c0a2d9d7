"""The Engine RPC for engines that compute nothing: a coroutine answers each request.

Subclassed by ``engine``, and by the engines of the gateway's tests. Must not know the answers.
"""

import asyncio
from collections.abc import Callable

import grpc

from farshore.proto import cluster_pb2 as cluster
from farshore.proto import cluster_pb2_grpc

Send = Callable[[cluster.SequenceEvent], None]


class CallEnds(Exception):
    """Raised by an answer: the whole call ends with a status, and all its requests with it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class ScriptedService(cluster_pb2_grpc.EngineServicer):
    """Serves ``Run`` in grpc.aio. All events of one turn of the event loop share a message."""

    async def answer(self, request: cluster.SequenceRequest, send: Send) -> None:
        """Answers a request. Cancelled when its call ends. May raise CallEnds."""
        raise NotImplementedError

    def cancel(self, request: cluster.SequenceRequest, choice: int | None) -> None:
        """The gateway cancels a request, or one choice of it, which may have ended."""

    async def Run(self, messages: object, context: grpc.aio.ServicerContext) -> None:
        """Answers all requests of one gateway."""
        call = _Call(self, context)
        reading = asyncio.create_task(call.read())
        try:
            await call.write()
        finally:
            tasks = [reading, *call.answering]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Call:
    def __init__(self, service: ScriptedService, context: grpc.aio.ServicerContext) -> None:
        self._service = service
        self._context = context
        self._requests: dict[int, cluster.SequenceRequest] = {}
        self._unsent: list[cluster.SequenceEvent] = []
        self._wanted = asyncio.Event()
        self._over: CallEnds | None = None
        self.answering: set[asyncio.Task[None]] = set()

    async def read(self) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:
            if message.HasField("cancel"):
                choice = message.cancel.choice if message.cancel.HasField("choice") else None
                if message.number in self._requests:
                    self._service.cancel(self._requests[message.number], choice)
                continue
            request = cluster.SequenceRequest.FromString(message.submit)
            self._requests[message.number] = request
            task = asyncio.create_task(self._answer(message.number, request))
            self.answering.add(task)
            task.add_done_callback(self.answering.discard)

    async def write(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            events, self._unsent = self._unsent, []
            if events:
                await self._context.write(cluster.EngineMessage(events=events))
            if self._over is not None:
                if self._over.code is not grpc.StatusCode.OK:
                    await self._context.abort(self._over.code, self._over.details)
                return

    async def _answer(self, number: int, request: cluster.SequenceRequest) -> None:
        def send(event: cluster.SequenceEvent) -> None:
            event.number = number
            self._unsent.append(event)
            self._wanted.set()

        try:
            await self._service.answer(request, send)
        except CallEnds as over:
            self._over = over
            self._wanted.set()
