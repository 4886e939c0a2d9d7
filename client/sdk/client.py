"""The blocking client: a gateway's API as plain calls and values.

Used by programs and by the command line. Raises the errors of ``farshore.errors``, never gRPC's. Must not
know what runs behind the gateways.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
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


class Stream(Iterator[_Value], Generic[_Value]):
    """Values as they arrive; a context manager. Its first call is made at once. For one thread at a time."""

    def __init__(
        self, course: Course[_Value], *, wait: Callable[[float], bool], on_close: Callable[[], None]
    ) -> None:
        """``wait``: blocks for so many seconds; True at once if the client is closed. ``on_close``: called
        once, when the stream ends for whatever reason."""
        self._course = course
        self._wait = wait
        self._on_close = on_close
        self._closed = False
        self._call = course.start()

    def __next__(self) -> _Value:
        """Raises StopIteration at the end and after ``close``; else the errors of the call, which end the
        stream."""
        while not self._closed:
            try:
                value = self._course.take(next(self._call))
                if value is not None:
                    return value
            except StopIteration:
                self.close()
            except grpc.RpcError as error:
                self._go_on(error)
            except BaseException:
                self.close()
                raise
        raise StopIteration

    def _go_on(self, error: grpc.RpcError) -> None:
        try:
            self._course.failed(error)
            if self._wait(self._course.pause_s) or self._closed:
                raise Cancelled("the client was closed") from error
            try:
                self._call = self._course.start()
            except ValueError as closed:  # of a channel that was closed at this moment
                raise Cancelled("the client was closed") from closed
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the stream, see ``Client.generate``. Idempotent; does not block."""
        if not self._closed:
            self._closed = True
            self._call.cancel()
            self._on_close()

    def __del__(self) -> None:
        # Without a call there is nothing to close. An interpreter that ends makes no new calls.
        if hasattr(self, "_call") and not sys.is_finalizing():
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AnswerStream(RequestStream, Stream[events.Event]):
    """The events of one request. ``text`` and ``result`` read the rest of them."""

    def __init__(self, course: Course[events.Event], answering: Answering, **options: Any) -> None:
        self._answering = answering
        super().__init__(course, **options)

    def text(self) -> str:
        """Blocks until the answer is finished and returns its whole text, what was read before included. Of
        several choices, the first one's; ``result().choices`` has all. Raises as reading does;
        TransportError if the stream was closed before."""
        return self.result().text

    def result(self) -> events.Answer:
        """As :meth:`text`, with all choices, their tokens and why they ended, usage and times."""
        for _ in self:
            pass
        return self._answering.answer()


class Client(Connection[AnswerStream, Stream[events.ClusterEvent]]):
    """A connection to the gateways of one cluster; a context manager. Thread-safe.

    Calls go to the gateway that answered last. If it is not reached, or reports that the cluster's part
    which the call needs is not, the other gateways are asked in turn; the last error is raised if all fail.
    With one gateway, calls that fail as UNAVAILABLE are repeated twice."""

    def __init__(
        self, address: str | Iterable[str], *, timeout_s: float = 10.0, resume_s: float = 30.0
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, resume_s=resume_s)
        self._reached = Gateways(self.addresses, grpc.insecure_channel)
        self._closing = threading.Event()
        self._goodbyes: set[Any] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections, which ends the streams that are being read."""
        self._end_all()
        self._closing.set()
        for call in tuple(self._goodbyes):
            with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                call.result(GOODBYE_S)
        for gateway in self._gateways.in_turn():
            gateway.channel.close()

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Mapping[str, Any]] | None = None,
        model: str = "",
        add_special_tokens: bool = True,
        **chat: Any,
    ) -> list[int]:
        """The token ids of a prompt, which is not run. Give ``prompt`` or ``messages``, with them the
        options of a chat that :meth:`generate` describes. ``add_special_tokens``: around a text; a chat's
        are the template's. Raises InvalidRequest."""
        call = calls.tokenize(prompt, messages, model=model, add_special_tokens=add_special_tokens, chat=chat)
        return self._ask(call)

    def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """The text of token ids, without special tokens. Raises InvalidRequest for ids outside of the
        vocabulary."""
        return self._ask(calls.detokenize(token_ids, model=model))

    def models(self) -> tuple[events.Model, ...]:
        """The model that is served, once by each of its names; the first is the one that answers show."""
        return self._ask(calls.models())

    def model(self, name: str) -> events.Model:
        """The model of that name. Raises NotFound."""
        return self._ask(calls.model(name))

    def cancel(self, request_id: str) -> None:
        """Ends a request; returns when its memory is free. Raises NotFound if no gateway knows it, and
        TransportError if one that may know it is not reached."""
        self._ask(calls.cancel(request_id))

    def status(self) -> events.ClusterStatus:
        """The cluster's status. Raises TransportError if the gateway or the controller does not answer."""
        return self._ask(calls.status())

    def scale(self, *, dense: int | None = None, attention: int | None = None) -> dict[str, int]:
        """Changes how many workers there are to be; None: as it is. Returns the numbers in force, by kind;
        workers start and retire meanwhile. Raises InvalidRequest for a number that can't work, TransportError
        if the gateway or the controller does not answer."""
        return self._ask(calls.scale(dense=dense, attention=attention))

    def drain(self, worker: str, *, timeout_s: float | None = None) -> str:
        """Begins to drain a worker, named by its id or its slot, and returns its id: it gets nothing new,
        what it has ends or goes elsewhere, then it ends, and another one takes its place. ``timeout_s``: what
        is left then fails; None: the cluster's for a dense worker, for an attention worker as long as it
        takes. Raises NotFound if it does not run, TransportError as :meth:`down`."""
        return self._ask(calls.drain(worker, timeout_s=timeout_s))

    def down(self) -> None:
        """Begins to end the cluster: all workers and the controller. Raises TransportError if the gateway or
        the controller does not answer."""
        self._ask(calls.down())

    def is_serving(self, *, timeout_s: float = 1.0) -> bool:
        """Whether a gateway answers and is ready; that one is used from now on. Returns at once if nothing
        listens. ``timeout_s``: for each gateway."""
        return self._prefer_one(lambda status: status == health_pb2.HealthCheckResponse.SERVING, timeout_s)

    def is_up(self, *, timeout_s: float = 1.0) -> bool:
        """As :meth:`is_serving`, but whether a gateway answers, ready or not."""
        return self._prefer_one(lambda status: True, timeout_s)

    def _prefer_one(self, wanted: Callable[[int], bool], timeout_s: float) -> bool:
        for gateway in self._gateways.in_turn():
            # Something other than a gateway may answer.
            with contextlib.suppress(grpc.RpcError):
                if wanted(gateway.check(timeout_s).status):
                    self._gateways.prefer(gateway)
                    return True
        return False

    def _ask(self, call: calls.Call[_Value]) -> _Value:
        """Makes the call at the first gateway that answers, and returns its reply."""
        asking = Asking(self._gateways, call)
        for gateway in asking.gateways():
            try:
                reply = call.method(gateway)(call.request, timeout=self._timeout_s)
            except grpc.RpcError as error:
                asking.failed(gateway, error)
            else:
                self._gateways.prefer(gateway)
                return call.read(reply)
        raise AssertionError("the last gateway's error was raised")

    @property
    def _gateways(self) -> Gateways:
        return self._reached

    def _answers(
        self, course: Course[events.Event], answering: Answering, on_close: Callable[[], None]
    ) -> AnswerStream:
        return AnswerStream(course, answering, wait=self._closing.wait, on_close=on_close)

    def _cluster_events(self, course: Course[events.ClusterEvent]) -> Stream[events.ClusterEvent]:
        return Stream(course, wait=self._closing.wait, on_close=lambda: None)

    def _say_goodbye(self, gateway: Gateway, request: api.CancelRequest) -> None:
        call = gateway.inference.Cancel.future(request, timeout=GOODBYE_S)
        self._goodbyes.add(call)
        call.add_done_callback(self._goodbyes.discard)
