"""Carries hot frames over a gRPC stream, at the engine's end.

Called by ``client.remote`` if no native transport works. It must not know sequences or plans. It works
wherever gRPC works (TLS, flow control, keepalive) and with any kernels at the shard.

It uses asynchronous gRPC without a thread for the event loop: the engine's thread starts each operation
itself, and runs the event loop only while it must wait. A separate thread would be woken twice per layer, and
the interpreter's lock would change hands each time (decision 009).
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
from farshore.cluster_token import ClusterToken
from farshore.errors import Late, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import aio_channel


class _EventLoop(asyncio.SelectorEventLoop):
    """Lives as long as its thread or gRPC refers to it. gRPC schedules callbacks after a call has ended, so
    only the finaliser may close the loop."""

    def __del__(self) -> None:
        self.close()


class _ThreadState(threading.local):
    """One event loop per thread, shared by all of its connections: a wait for one shard's answer also
    receives the answers of the others."""

    @cached_property
    def loop(self) -> _EventLoop:
        return _EventLoop()


_THREAD = _ThreadState()


class GrpcConnection:
    """A :class:`~farshore.attention_offload.transport.frames.HotConnection` over one Attend call.

    It writes one frame at a time and reads one answer ahead. The call starts with the first :meth:`begin`, on
    the event loop of the calling thread: an event loop serves one thread only, and connections are made by
    another thread than the engine's.
    """

    transport = Transport.GRPC

    def __init__(
        self, address: str, model: AttentionModel, dtype: torch.dtype, *, token: ClusterToken | None = None
    ) -> None:
        self.under_way = 0
        self._token = token
        self._address = address
        self._opening = pb.Frame(open=codec.model_to_pb(model, dtype))
        self._deadline_s = MOST_DEADLINE_S
        self._call: _AttendCall | None = None

    @property
    def is_open(self) -> bool:
        return self._call is None or not self._call.call.done()

    def drain(self, deadline_s: float) -> None:
        until_s = perf_counter() + deadline_s
        while self.under_way:
            self._next_answer(max(0.0, until_s - perf_counter()))

    def begin(self, step: ShardStep, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        if self._call is None:
            self._call = _AttendCall(self._address, self._token)
            self._write(self._opening)
        self._write(pb.Frame(begin=codec.step_to_pb(step)))

    def repeat_step(self, step: int, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._write(pb.Frame(repeat_step=pb.RepeatStep(step=step)))

    def send(self, sent: Sent, q: Tensor) -> None:
        frame = pb.LayerFrame(
            step=sent.step, layer=sent.layer, micro_batch=sent.micro_batch, q=codec.to_bytes(q)
        )
        self._write(pb.Frame(layer=frame))
        self.under_way += 1

    def wait(self, sent: Sent, out: State, deadline_s: float) -> None:
        answer = self._next_answer(deadline_s)
        if (answer.step, answer.layer, answer.micro_batch) != sent[:3]:
            raise TransportError(
                f"{self._address}: answered step {answer.step} layer {answer.layer} micro-batch"
                f" {answer.micro_batch}, not {sent}"
            )
        targets = ((out.o.view(torch.uint8), answer.o), (out.lse.view(torch.uint8), answer.lse))
        if any(len(data) != target.numel() for target, data in targets):
            sizes = f"{len(answer.o)} and {len(answer.lse)} bytes"
            raise TransportError(f"{self._address}: garbage: an answer of {sizes} to {sent}")
        for target, data in targets:
            codec.bytes_into(target, data)

    def close(self) -> None:
        if self._call is not None:
            self._call.close()

    def _next_answer(self, deadline_s: float) -> pb.State:
        with self._mapped():
            answer = self._begun_call.reading.finish(self._begun_call.loop, deadline_s)
        if answer is grpc.aio.EOF:
            raise TransportError(f"{self._address}: the shard ended the stream")
        if not isinstance(answer, pb.State):  # gRPC returns None for a message that it cannot parse.
            raise TransportError(f"{self._address}: garbage: an answer that is no message")
        self._begun_call.reading = _EagerCoroutine(self._begun_call.call.read())
        self.under_way -= 1
        return answer

    def _write(self, frame: pb.Frame) -> None:
        """Sends a frame. Ignores a call that has ended: :meth:`wait` reports the reason."""
        with self._mapped():
            self._begun_call.write(frame, self._deadline_s)

    @property
    def _begun_call(self) -> "_AttendCall":
        assert self._call is not None, "no step was begun"
        return self._call

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Turns TimeoutError into Late, and an RpcError into the error that it carries."""
        try:
            yield
        except TimeoutError:
            raise Late(f"{self._address}: no answer in time", shards=()) from None
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure


class _AttendCall:
    """An Attend call on its thread's event loop, with its latest write and the read of its next answer."""

    def __init__(self, address: str, token: ClusterToken | None) -> None:
        """Starts the call. Does not wait for a connection; the first write does."""
        self.loop = _THREAD.loop
        self._channel, self.call, self._connected = _run_task(
            self.loop, _start_call(address, token), MOST_DEADLINE_S
        )
        self._writing = _EagerCoroutine(_await(self._connected))
        self.reading = _EagerCoroutine(self.call.read())

    def write(self, frame: pb.Frame, deadline_s: float) -> None:
        """Starts to send a frame, after gRPC has taken the previous one. Blocks only if the shard does not
        keep up; raises TimeoutError after ``deadline_s``."""
        self._writing.settle(self.loop, deadline_s)
        # After a failed write the call has ended. Resuming that write would make gRPC replace the shard's
        # reason, which the pending read returns, by INTERNAL.
        if not self._writing.failed:
            self._writing = _EagerCoroutine(self.call.write(frame))

    def close(self) -> None:
        self.call.cancel()
        self._connected.cancel()  # Cancelling the call does not cancel this task.
        for operation in (self._writing, self.reading):
            with suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError, TimeoutError):
                operation.finish(self.loop, MOST_DEADLINE_S)
        with suppress(TimeoutError):
            _run_task(self.loop, self._channel.close(), MOST_DEADLINE_S)


class _EagerCoroutine:
    """Runs a coroutine at once, in the caller's thread, until it first waits. An asyncio task would begin
    only when the event loop runs next (eager tasks need Python 3.12)."""

    def __init__(self, coroutine: Coroutine[asyncio.Future[Any], None, Any]) -> None:
        self._coroutine = coroutine
        self._returned: Any = None
        self._raised: BaseException | None = None
        self._waits_for = self._resume()

    @property
    def failed(self) -> bool:
        """Whether the coroutine has raised an error, or waits for a future that has failed."""
        future = self._waits_for
        if future is None:
            return self._raised is not None
        return future.done() and (future.cancelled() or future.exception() is not None)

    def finish(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> Any:
        """Runs the coroutine to its end; returns its result or raises its error.

        Raises TimeoutError after ``deadline_s``."""
        until_s = perf_counter() + deadline_s
        while self._waits_for is not None:
            _run_until(loop, self._waits_for, max(0.0, until_s - perf_counter()))
            self._waits_for = self._resume()
        if self._raised is not None:
            raise self._raised
        return self._returned

    def settle(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> None:
        """Runs the coroutine until it has ended or :attr:`failed`.

        Raises TimeoutError after ``deadline_s``."""
        until_s = perf_counter() + deadline_s
        while self._waits_for is not None:
            _run_until(loop, self._waits_for, max(0.0, until_s - perf_counter()))
            if self.failed:
                return
            self._waits_for = self._resume()

    def _resume(self) -> asyncio.Future[Any] | None:
        """Runs the coroutine until it waits; returns the future it waits for, or None if it has ended."""
        try:
            return self._coroutine.send(None)
        except StopIteration as end:
            self._returned = end.value
        except (Exception, asyncio.CancelledError) as error:
            self._raised = error
        return None


def _run_until(loop: asyncio.AbstractEventLoop, awaited: asyncio.Future[Any], deadline_s: float) -> None:
    """Runs the event loop until ``awaited`` is done. Raises TimeoutError after ``deadline_s``."""
    if awaited.done():
        return
    expired = loop.create_future()
    timer = loop.call_later(deadline_s, expired.cancel)
    for future in (awaited, expired):
        future.add_done_callback(lambda _: loop.stop())
    while not awaited.done():
        if expired.done():
            raise TimeoutError
        loop.run_forever()
    timer.cancel()


async def _start_call(
    address: str, token: ClusterToken | None
) -> tuple[grpc.aio.Channel, Any, "asyncio.Task[None]"]:
    """Starts an Attend call; returns (channel, call, task that ends when the call is connected)."""
    channel = aio_channel(address, token)
    call = pb_grpc.AttentionStub(channel).Attend()
    return channel, call, asyncio.get_running_loop().create_task(call.wait_for_connection())


async def _await(future: asyncio.Future[Any]) -> Any:
    return await future


def _run_task(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
    """Runs a coroutine as a task, for operations that need a running event loop. Returns its result.

    Raises TimeoutError after ``deadline_s``."""
    task = loop.create_task(coroutine)
    _run_until(loop, task, deadline_s)
    return task.result()
