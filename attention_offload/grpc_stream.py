"""The gRPC stream transport, engine's end. It works wherever gRPC does: TLS, flow control, keepalive, and any
kernels at the shard.

Asynchronous gRPC, without a thread for it: the engine's thread starts an operation itself, and turns the
event loop only where it has to wait. A thread in between would be woken twice a layer, and the interpreter's
lock would change hands each time (decision 009).
"""

import asyncio
import math
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import grpc
import torch
from torch import Tensor

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.connect import shard_error
from farshore.attention_offload.frames import Sent, Transport
from farshore.attention_offload.plan import ShardStep
from farshore.errors import TransportError
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
    """A :class:`~farshore.attention_offload.frames.HotStream`: one Attend call. One frame is written at a
    time, and one answer is read ahead."""

    transport = Transport.GRPC

    def __init__(
        self, address: str, model: AttentionModel, dtype: torch.dtype, *, frame_deadline_s: float
    ) -> None:
        self._address = address
        self._deadline_s = frame_deadline_s
        self.under_way = 0
        self._loop = _OWN.loop
        opening = pb.Frame(open=codec.model_to_pb(model, dtype))
        with self._mapped():
            self._channel, self._call = _run(self._loop, _attend(address, opening, frame_deadline_s))
        self._writing = _Started(self._call.wait_for_connection())
        self._reading = _Started(self._call.read())

    def begin(self, step: ShardStep) -> None:
        self._write(pb.Frame(begin=codec.step_to_pb(step)))

    def again(self, step: int) -> None:
        self._write(pb.Frame(again=pb.Again(step=step)))

    def send(self, sent: Sent, q: Tensor) -> None:
        frame = pb.LayerFrame(
            step=sent.step, layer=sent.layer, micro_batch=sent.micro_batch, q=codec.to_bytes(q)
        )
        self._write(pb.Frame(layer=frame))
        self.under_way += 1

    def wait(self, sent: Sent, out: State) -> None:
        with self._mapped():
            answer = self._reading.finish(self._loop, self._deadline_s)
        if answer is grpc.aio.EOF:
            raise TransportError(f"{self._address}: the shard ended the stream")
        self._reading = _Started(self._call.read())
        if (answer.step, answer.layer, answer.micro_batch) != sent[:3]:
            raise TransportError(
                f"{self._address}: answered step {answer.step} layer {answer.layer} micro-batch"
                f" {answer.micro_batch}, not {sent}"
            )
        codec.bytes_into(out.o.view(torch.uint8), answer.o)
        codec.bytes_into(out.lse.view(torch.uint8), answer.lse)
        self.under_way -= 1

    def close(self) -> None:
        self._call.cancel()
        for operation in (self._writing, self._reading):
            with suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError, TimeoutError):
                operation.finish(self._loop, self._deadline_s)
        _run(self._loop, self._channel.close())

    def _write(self, frame: pb.Frame) -> None:
        """It leaves now. gRPC has taken the one before long ago, unless the shard does not keep up."""
        # Why a call has ended, whoever reads its answers is told: of what a shard refused, perhaps not before
        # the next attempt, since gRPC says INTERNAL where it came to a call that was being written to.
        with self._mapped(), suppress(asyncio.InvalidStateError, grpc.RpcError):
            self._writing.finish(self._loop, self._deadline_s)
        self._writing = _Started(self._call.write(frame))

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise TransportError(f"{self._address}: no answer within {self._deadline_s:g} s") from None
        except grpc.RpcError as failure:
            raise shard_error(failure, self._address) from failure


class _Started:
    """A coroutine that its caller runs itself, at once and as far as it gets: a task would begin when the
    loop is turned next (but for the eager ones of Python 3.12)."""

    def __init__(self, coroutine: Coroutine[asyncio.Future[Any], None, Any]) -> None:
        self._coroutine = coroutine
        self._returned: Any = None
        self._raised: BaseException | None = None
        self._waits_for = self._resume()

    def finish(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> Any:
        """What it returns, or raises. TimeoutError where it waits for longer than ``deadline_s``."""
        while self._waits_for is not None:
            _turn(loop, self._waits_for, deadline_s)
            self._waits_for = self._resume()
        if self._raised is not None:
            raise self._raised
        return self._returned

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


def _run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """To its end, as a task: what needs a loop that runs."""
    task = loop.create_task(coroutine)
    _turn(loop, task, math.inf)
    return task.result()


async def _attend(address: str, opening: pb.Frame, deadline_s: float) -> tuple[grpc.aio.Channel, Any]:
    channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    try:
        call = pb_grpc.AttentionStub(channel).Attend()
        async with asyncio.timeout(deadline_s):
            await call.write(opening)
    except BaseException:
        await channel.close()
        raise
    return channel, call
