"""The gateway's side of an engine: one call per request, its stream pulled into the request's log.

Used by ``requests`` alone. Must not know who reads the log, nor about the controller: tokens go on while
the controller is away.
"""

import asyncio

import grpc

from farshore import rpc
from farshore.gateway.answer import Answer
from farshore.gateway.limits import Limits
from farshore.gateway.request import Failure, Request
from farshore.gateway.served import Served
from farshore.gateway.validate import Job
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
        answer = Answer(request, job, self._served.tokenizer)
        call = self._stub.Generate(_sequence_request(request.request_id, job))
        try:
            await self._follow(call, request, answer)
        except asyncio.CancelledError:
            await answer.end(api.FINISH_REASON_CANCELLED)
            raise
        except TimeoutError:
            await self._break(
                request,
                answer,
                Failure(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"dense worker {self._address} sent nothing for {self._limits.stall_s:g} s",
                ),
            )
        except grpc.aio.AioRpcError as error:
            if request.cancelling and error.code() == grpc.StatusCode.CANCELLED:
                await answer.end(api.FINISH_REASON_CANCELLED)
            else:
                await self._break(request, answer, self._failure(error))
        finally:
            call.cancel()

    async def _follow(self, call: grpc.aio.UnaryStreamCall, request: Request, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as stall:
            while not request.ended:
                patience_s = self._limits.cancel_s if answer.complete else self._limits.stall_s
                stall.reschedule(loop.time() + patience_s)
                event = await call.read()
                if event is grpc.aio.EOF:
                    await self._break(request, answer, await self._broken_off(call))
                    return
                stopped = await answer.take(event)
                if stopped is not None:
                    # Stop strings are ours: the engine has to be told.
                    await self.cancel(request.request_id, choice=stopped)

    async def _break(self, request: Request, answer: Answer, failure: Failure) -> None:
        """The engine is gone; that takes nothing from an answer which is complete."""
        if answer.complete:
            await answer.end(api.FINISH_REASON_STOP)
        else:
            await request.fail(failure)

    async def cancel(self, request_id: str, *, choice: int | None = None) -> None:
        """Ask the engine to end a request, or one choice. Best effort: cutting the stream says the same."""
        try:
            await self._stub.Cancel(
                cluster.CancelSequence(sequence_id=request_id, choice=choice), timeout=self._limits.cancel_s
            )
        except grpc.aio.AioRpcError:
            return

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
        n=job.n,
        temperature=job.temperature,
        top_k=job.top_k,
        top_p=job.top_p,
        min_p=job.min_p,
        repetition_penalty=job.repetition_penalty,
        presence_penalty=job.presence_penalty,
        frequency_penalty=job.frequency_penalty,
        logit_bias=job.logit_bias,
        logprobs=job.logprobs,
        seed=job.seed,
        stop_token_ids=job.stop_token_ids,
        cache_salt=job.cache_salt,
    )
