"""The asyncio client: the surface of ``client.Client``, awaited.

Used by programs with an event loop. Raises the errors of ``farshore.errors``, never gRPC's. Must not know
what runs behind the gateways."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Generic, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from farshore.client import events
from farshore.client.sdk import calls
from farshore.client.sdk.base import GOODBYE_S, Asking, Connection, RequestStream
from farshore.client.sdk.course import Course
from farshore.client.sdk.gateways import Gateway, Gateways
from farshore.client.sdk.resume import Answering
from farshore.errors import Cancelled
from farshore.proto import inference_pb2 as api

_Value = TypeVar("_Value")


class AsyncStream(AsyncIterator[_Value], Generic[_Value]):
    """Values as they arrive; an asynchronous context manager. Its first call is made at once. For one task
    at a time."""

    def __init__(
        self, course: Course[_Value], *, is_closed: Callable[[], bool], on_close: Callable[[], None]
    ) -> None:
        """``is_closed``: whether the client is. ``on_close``: called once, when the stream ends for whatever
        reason."""
        self._course = course
        self._is_closed = is_closed
        self._on_close = on_close
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._call = course.start()

    async def __anext__(self) -> _Value:
        """Raises StopAsyncIteration at the end and after ``close``; else the errors of the call, which end
        the stream, as cancelling the reading task does."""
        while not self._closed:
            try:
                value = self._course.take(await anext(aiter(self._call)))
                if value is not None:
                    return value
            except StopAsyncIteration:
                self._end()
            except grpc.RpcError as error:
                await self._go_on(error)
            except asyncio.CancelledError as error:
                self._end()
                if _task_is_cancelled():
                    raise
                raise Cancelled("the stream was closed while it was read") from error
            except BaseException:
                self._end()
                raise
        raise StopAsyncIteration

    async def _go_on(self, error: grpc.RpcError) -> None:
        try:
            self._course.failed(error)
            await asyncio.sleep(self._course.pause_s)
            if self._is_closed() or self._closed:
                raise Cancelled("the stream or its client was closed") from error
            self._call = self._course.start()
        except BaseException:
            self._end()
            raise

    async def close(self) -> None:
        """Ends the stream, see ``AsyncClient.generate``. Idempotent."""
        self._end()

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            self._call.cancel()
            self._on_close()

    def __del__(self) -> None:
        # The collector may run in any thread, and after the loop.
        if hasattr(self, "_call") and not self._closed and self._loop.is_running():
            self._loop.call_soon_threadsafe(self._end)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()


class AsyncAnswerStream(RequestStream, AsyncStream[events.Event]):
    """The events of one request. ``text`` and ``result`` read the rest of them."""

    def __init__(self, course: Course[events.Event], answering: Answering, **options: Any) -> None:
        self._answering = answering
        super().__init__(course, **options)

    async def text(self) -> str:
        """As ``client.AnswerStream.text``."""
        return (await self.result()).text

    async def result(self) -> events.Answer:
        """As ``client.AnswerStream.result``."""
        async for _ in self:
            pass
        return self._answering.answer()


class AsyncClient(Connection[AsyncAnswerStream, AsyncStream[events.ClusterEvent]]):
    """As :class:`~farshore.client.sdk.client.Client`, for asyncio; an asynchronous context manager. Belongs
    to the event loop on which its first call is made. Calls are awaited; ``generate`` and ``watch_events``
    return asynchronous iterators."""

    def __init__(
        self, address: str | Iterable[str], *, timeout_s: float = 10.0, resume_s: float = 30.0
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, resume_s=resume_s)
        self._closing = False
        self._goodbyes: set[Any] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections, which ends the streams that are being read."""
        self._end_all()
        self._closing = True
        await asyncio.gather(*(call.code() for call in self._goodbyes))  # within GOODBYE_S
        for gateway in self._gateways.in_turn():
            await gateway.channel.close()

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Mapping[str, Any]] | None = None,
        model: str = "",
        add_special_tokens: bool = True,
        **chat: Any,
    ) -> list[int]:
        """As ``Client.tokenize``."""
        call = calls.tokenize(prompt, messages, model=model, add_special_tokens=add_special_tokens, chat=chat)
        return await self._ask(call)

    async def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """As ``Client.detokenize``."""
        return await self._ask(calls.detokenize(token_ids, model=model))

    async def models(self) -> tuple[events.Model, ...]:
        """As ``Client.models``."""
        return await self._ask(calls.models())

    async def model(self, name: str) -> events.Model:
        """As ``Client.model``."""
        return await self._ask(calls.model(name))

    async def cancel(self, request_id: str) -> None:
        """As ``Client.cancel``."""
        await self._ask(calls.cancel(request_id))

    async def status(self) -> events.ClusterStatus:
        """As ``Client.status``."""
        return await self._ask(calls.status())

    async def scale(self, *, dense: int | None = None, attention: int | None = None) -> dict[str, int]:
        """As ``Client.scale``."""
        return await self._ask(calls.scale(dense=dense, attention=attention))

    async def drain(self, worker: str, *, timeout_s: float | None = None) -> str:
        """As ``Client.drain``."""
        return await self._ask(calls.drain(worker, timeout_s=timeout_s))

    async def down(self) -> None:
        """As ``Client.down``."""
        await self._ask(calls.down())

    async def is_serving(self, *, timeout_s: float = 1.0) -> bool:
        """As ``Client.is_serving``."""
        return await self._prefer_one(
            lambda status: status == health_pb2.HealthCheckResponse.SERVING, timeout_s
        )

    async def is_up(self, *, timeout_s: float = 1.0) -> bool:
        """As ``Client.is_up``."""
        return await self._prefer_one(lambda status: True, timeout_s)

    async def _prefer_one(self, wanted: Callable[[int], bool], timeout_s: float) -> bool:
        for gateway in self._gateways.in_turn():
            # Something other than a gateway may answer.
            with contextlib.suppress(grpc.RpcError):
                if wanted((await gateway.check(timeout_s)).status):
                    self._gateways.prefer(gateway)
                    return True
        return False

    async def _ask(self, call: calls.Call[_Value]) -> _Value:
        """Makes the call at the first gateway that answers, and returns its reply."""
        asking = Asking(self._gateways, call)
        for gateway in asking.gateways():
            try:
                reply = await call.method(gateway)(call.request, timeout=self._timeout_s)
            except grpc.RpcError as error:
                asking.failed(gateway, error)
            except asyncio.CancelledError as error:
                if _task_is_cancelled():
                    raise
                raise Cancelled("the client was closed") from error
            else:
                self._gateways.prefer(gateway)
                return call.read(reply)
        raise AssertionError("the last gateway's error was raised")

    @functools.cached_property
    def _gateways(self) -> Gateways:
        # grpc.aio's channels belong to the loop that runs when they are made.
        return Gateways(self.addresses, grpc.aio.insecure_channel)

    def _answers(
        self, course: Course[events.Event], answering: Answering, on_close: Callable[[], None]
    ) -> AsyncAnswerStream:
        return AsyncAnswerStream(course, answering, is_closed=lambda: self._closing, on_close=on_close)

    def _cluster_events(self, course: Course[events.ClusterEvent]) -> AsyncStream[events.ClusterEvent]:
        return AsyncStream(course, is_closed=lambda: self._closing, on_close=lambda: None)

    def _say_goodbye(self, gateway: Gateway, request: api.CancelRequest) -> None:
        call = gateway.inference.Cancel(request, timeout=GOODBYE_S)
        self._goodbyes.add(call)
        call.add_done_callback(self._goodbyes.discard)


def _task_is_cancelled() -> bool:
    """Whether a CancelledError is about this task. grpc.aio raises it, too, where a call was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
