"""The gRPC stream transport, engine's end. It works wherever gRPC does: TLS, flow control, keepalive, and any
kernels at the shard.

Asynchronous gRPC, without a thread for it: the engine's thread starts an operation itself, and turns the
event loop only where it has to wait. A thread in between would be woken twice a layer, and the interpreter's
lock would change hands each time (decision 009).
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from time import perf_counter
from typing import Any

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.transport.connect import shard_error
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S, Sent, Transport
from farshore.errors import Late, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import OPTIONS


class _Loop(asyncio.SelectorEventLoop):
    """There for as long as its thread, and gRPC, which has something to say about calls even when those are
    gone: so nobody else can close it."""

    def __del__(self) -> None:
        self.close()


class _Own(threading.local):
    """A thread's loop: one for all of its streams, so that whoever waits for one shard's answer takes in the
    others'."""

    @cached_property
    def loop(self) -> _Loop:
        return _Loop()


_OWN = _Own()


class GrpcStream:
    """A :class:`~farshore.attention_offload.transport.frames.HotStream`: one Attend call. One frame is
    written at a time, and one answer is read ahead.

    The call starts with the first :meth:`begin`, on the loop of the thread that begins: an event loop serves
    one thread, and another thread than the engine's makes connections.
    """

    transport = Transport.GRPC

    def __init__(self, address: str, model: AttentionModel, dtype: torch.dtype) -> None:
        self.under_way = 0
        self._address = address
        self._opening = pb.Frame(open=codec.model_to_pb(model, dtype))
        self._deadline_s = MOST_DEADLINE_S
        self._started: _Attend | None = None

    @property
    def is_open(self) -> bool:
        return self._started is None or not self._started.call.done()

    def drain(self, deadline_s: float) -> None:
        until_s = perf_counter() + deadline_s
        while self.under_way:
            self._next(max(0.0, until_s - perf_counter()))

    def begin(self, step: ShardStep, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        if self._started is None:
            self._started = _Attend(self._address)
            self._write(self._opening)
        self._write(pb.Frame(begin=codec.step_to_pb(step)))

    def repeat_step(self, step: int, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._write(pb.Frame(repeat_step=pb.Again(step=step)))

    def send(self, sent: Sent, q: Tensor) -> None:
        frame = pb.LayerFrame(
            step=sent.step, layer=sent.layer, micro_batch=sent.micro_batch, q=codec.to_bytes(q)
        )
        self._write(pb.Frame(layer=frame))
        self.under_way += 1

    def wait(self, sent: Sent, out: State, deadline_s: float) -> None:
        answer = self._next(deadline_s)
        if (answer.step, answer.layer, answer.micro_batch) != sent[:3]:
            raise TransportError(
                f"{self._address}: answered step {answer.step} layer {answer.layer} micro-batch"
                f" {answer.micro_batch}, not {sent}"
            )
        parts = ((out.o.view(torch.uint8), answer.o), (out.lse.view(torch.uint8), answer.lse))
        if any(len(data) != part.numel() for part, data in parts):
            sizes = f"{len(answer.o)} and {len(answer.lse)} bytes"
            raise TransportError(f"{self._address}: garbage: an answer of {sizes} to {sent}")
        for part, data in parts:
            codec.bytes_into(part, data)

    def close(self) -> None:
        if self._started is not None:
            self._started.close()

    def _next(self, deadline_s: float) -> pb.State:
        """The next answer."""
        with self._mapped():
            answer = self._attend.reading.finish(self._attend.loop, deadline_s)
        if answer is grpc.aio.EOF:
            raise TransportError(f"{self._address}: the shard ended the stream")
        if not isinstance(answer, pb.State):  # gRPC gives None for what it cannot parse
            raise TransportError(f"{self._address}: garbage: an answer that is no message")
        self._attend.reading = _Started(self._attend.call.read())
        self.under_way -= 1
        return answer

    def _write(self, frame: pb.Frame) -> None:
        """Ignores a call that has ended: :meth:`wait` reports why."""
        with self._mapped():
            self._attend.write(frame, self._deadline_s)

    @property
    def _attend(self) -> "_Attend":
        assert self._started is not None, "no step was begun"
        return self._started

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise Late(f"{self._address}: no answer in time", shards=()) from None
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure


class _Attend:
    """An Attend call on its thread's loop: the write under way, or done last, and the answer read ahead."""

    def __init__(self, address: str) -> None:
        """Does not wait for a connection: the first write does."""
        self.loop = _OWN.loop
        self._channel, self.call, self._connected = _run(self.loop, _attend(address), MOST_DEADLINE_S)
        self._writing = _Started(_result(self._connected))
        self.reading = _Started(self.call.read())

    def write(self, frame: pb.Frame, deadline_s: float) -> None:
        """The frame leaves now. gRPC has taken the one before long ago, unless the shard does not keep up."""
        self._writing.settle(self.loop, deadline_s)
        # Where the last write failed the call has ended. To go on with that one would have gRPC put INTERNAL
        # in the place of the shard's reason, which the read under way returns.
        if not self._writing.failed:
            self._writing = _Started(self.call.write(frame))

    def close(self) -> None:
        self.call.cancel()
        self._connected.cancel()  # the call's end does not end it
        for operation in (self._writing, self.reading):
            with suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError, TimeoutError):
                operation.finish(self.loop, MOST_DEADLINE_S)
        with suppress(TimeoutError):
            _run(self.loop, self._channel.close(), MOST_DEADLINE_S)


class _Started:
    """A coroutine that its caller runs itself, at once and as far as it gets: a task would begin when the
    loop is turned next (but for the eager ones of Python 3.12)."""

    def __init__(self, coroutine: Coroutine[asyncio.Future[Any], None, Any]) -> None:
        self._coroutine = coroutine
        self._returned: Any = None
        self._raised: BaseException | None = None
        self._waits_for = self._resume()

    @property
    def failed(self) -> bool:
        """Whether it has ended, or would end if it went on, with an error."""
        future = self._waits_for
        if future is None:
            return self._raised is not None
        return future.done() and (future.cancelled() or future.exception() is not None)

    def finish(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> Any:
        """What it returns, or raises. TimeoutError where it waits for longer than ``deadline_s``."""
        until_s = perf_counter() + deadline_s
        while self._waits_for is not None:
            _turn(loop, self._waits_for, max(0.0, until_s - perf_counter()))
            self._waits_for = self._resume()
        if self._raised is not None:
            raise self._raised
        return self._returned

    def settle(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> None:
        """Runs it until it has ended, or :attr:`failed`. TimeoutError as :meth:`finish`."""
        until_s = perf_counter() + deadline_s
        while self._waits_for is not None:
            _turn(loop, self._waits_for, max(0.0, until_s - perf_counter()))
            if self.failed:
                return
            self._waits_for = self._resume()

    def _resume(self) -> asyncio.Future[Any] | None:
        """What it waits for next; None: it has ended."""
        try:
            return self._coroutine.send(None)
        except StopIteration as end:
            self._returned = end.value
        except (Exception, asyncio.CancelledError) as error:
            self._raised = error
        return None


def _turn(loop: asyncio.AbstractEventLoop, until: asyncio.Future[Any], deadline_s: float) -> None:
    if until.done():
        return
    expired = loop.create_future()
    timer = loop.call_later(deadline_s, expired.cancel)
    for it in (until, expired):
        it.add_done_callback(lambda _: loop.stop())
    while not until.done():
        if expired.done():
            raise TimeoutError
        loop.run_forever()
    timer.cancel()


async def _attend(address: str) -> tuple[grpc.aio.Channel, Any, "asyncio.Task[None]"]:
    """An Attend call, and when it has a connection."""
    channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    call = pb_grpc.AttentionStub(channel).Attend()
    return channel, call, asyncio.get_running_loop().create_task(call.wait_for_connection())


async def _result(future: asyncio.Future[Any]) -> Any:
    return await future


def _run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
    """What it returns, as a task: for what needs a loop that runs."""
    task = loop.create_task(coroutine)
    _turn(loop, task, deadline_s)
    return task.result()
