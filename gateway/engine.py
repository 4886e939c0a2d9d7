"""The gateway's side of an engine: one call per sequence, its stream pulled into a request's log.

Used by ``requests`` alone. Must not know who reads the log, nor about the controller: tokens go on while
the controller is away.
"""

import asyncio

import grpc

from farshore import rpc
from farshore.gateway.limits import Limits
from farshore.gateway.request import Failure, Request
from farshore.gateway.served import Served
from farshore.gateway.validate import Job
from farshore.models.text_stream import TextStream
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import cluster_pb2_grpc
from farshore.proto import inference_pb2 as api


class Engine:
    """Owns the channel; ``close`` it. On the event loop only."""

    def __init__(self, address: str, *, served: Served, limits: Limits) -> None:
        self._address = address
        self._served = served
        self._limits = limits
        self._channel = grpc.aio.insecure_channel(address, options=rpc.OPTIONS)
        self._stub = cluster_pb2_grpc.EngineStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def pump(self, request: Request, job: Job) -> None:
        """Run ``job`` and fill ``request``; it has ended when this returns, whatever happened.

        Cancelling the task cuts the stream, which ends the sequence in the engine too.
        """
        text = self._served.tokenizer.stream()
        call = self._stub.Generate(_sequence_request(request.request_id, job))
        try:
            async with asyncio.timeout(None) as stall:
                loop = asyncio.get_running_loop()
                while not request.ended:
                    stall.reschedule(loop.time() + self._limits.stall_s)
                    event = await call.read()
                    if event is grpc.aio.EOF:
                        await request.fail(await self._broken_off(call))
                    else:
                        await self._take(event, request, job, text)
        except asyncio.CancelledError:
            await request.finish(api.FINISH_REASON_CANCELLED, text=text.finish())
            raise
        except TimeoutError:
            await request.fail(
                Failure(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"dense worker {self._address} sent nothing for {self._limits.stall_s:g} s",
                )
            )
        except grpc.aio.AioRpcError as error:
            if request.cancelling and error.code() == grpc.StatusCode.CANCELLED:
                await request.finish(api.FINISH_REASON_CANCELLED, text=text.finish())
            else:
                await request.fail(self._failure(error))
        finally:
            call.cancel()

    async def cancel(self, request_id: str) -> None:
        """Ask the engine to end a sequence. Best effort: cutting the stream says the same."""
        try:
            await self._stub.Cancel(
                cluster.CancelSequence(sequence_id=request_id), timeout=self._limits.cancel_s
            )
        except grpc.aio.AioRpcError:
            return

    async def _take(self, event: cluster.SequenceEvent, request: Request, job: Job, text: TextStream) -> None:
        kind = event.WhichOneof("kind")
        if kind == "token_id":
            # A stop token ends the answer and is no part of its text, even where it isn't a special one.
            silent = event.token_id in job.stop_ids
            await request.add_token(event.token_id, "" if silent else text.push(event.token_id))
        elif kind == "prefill":
            await request.add_prefill(event.prefill)
        elif kind == "finished":
            done = event.finished
            await request.finish(
                done.reason, text=text.finish(), queued_ms=done.queued_ms, shards=done.shards
            )

    async def _broken_off(self, call: grpc.aio.UnaryStreamCall) -> Failure:
        code = await call.code()
        if code == grpc.StatusCode.OK:
            return Failure(
                grpc.StatusCode.UNAVAILABLE,
                f"dense worker {self._address} ended the stream without finishing",
            )
        return Failure(code, await call.details() or "no details")

    def _failure(self, error: grpc.aio.AioRpcError) -> Failure:
        message = error.details() or "no details"
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            # Otherwise a client can't tell it from a gateway that is unreachable.
            message = f"dense worker {self._address}: {message}"
        trailing = tuple(
            (key, value) for key, value in error.trailing_metadata() or () if key.startswith("farshore-")
        )
        return Failure(error.code(), message, trailing)


def _sequence_request(sequence_id: str, job: Job) -> cluster.SequenceRequest:
    return cluster.SequenceRequest(
        sequence_id=sequence_id,
        prompt=job.prompt,
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        top_p=job.top_p,
        seed=job.seed,
        stop_ids=job.stop_ids,
    )
