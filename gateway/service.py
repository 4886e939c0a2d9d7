"""The client API over gRPC: Generate, Cancel, ClusterStatus.

Registered by ``server``. Translates between calls and the request log and turns errors into statuses, once.
Must not know how a request is run. Never logs a prompt.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

import grpc

from farshore import rpc
from farshore.errors import FarshoreError, Overloaded
from farshore.gateway import validate
from farshore.gateway.limits import Limits
from farshore.gateway.request import Request, RequestFailed
from farshore.gateway.requests import RequestLog
from farshore.gateway.served import Served
from farshore.proto import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from farshore.proto import inference_pb2 as api


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(
        self,
        *,
        served: Served,
        log: RequestLog,
        controller: cluster_pb2_grpc.ControllerStub,
        controller_address: str,
        tokenizing: Executor,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``tokenizing``: threads for prompts, so that a long one doesn't hold up everybody's tokens."""
        self._served = served
        self._log = log
        self._controller = controller
        self._controller_address = controller_address
        self._tokenizing = tokenizing
        self._limits = limits
        self._clock = clock

    # Writes instead of yielding: a client that leaves is then always noticed here, inside `reading`.
    async def Generate(self, request: api.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            entry = await self._open(request, self._clock())
            with self._log.reading(entry):
                async for event in entry.follow(request.resume_from):
                    await context.write(event)
        except FarshoreError as error:
            await self._abort(context, error)
        except RequestFailed as error:
            await context.abort(error.failure.code, error.failure.message, error.failure.trailing)

    async def Cancel(self, request: api.CancelRequest, context: grpc.aio.ServicerContext) -> api.CancelReply:
        try:
            await self._log.cancel(request.request_id)
        except FarshoreError as error:
            await self._abort(context, error)
        return api.CancelReply()

    async def ClusterStatus(
        self, request: api.ClusterStatusRequest, context: grpc.aio.ServicerContext
    ) -> api.ClusterStatusReply:
        try:
            return await self._controller.Status(
                cluster_pb2.StatusRequest(), timeout=self._limits.controller_s
            )
        except grpc.aio.AioRpcError as error:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"the controller at {self._controller_address} does not answer ({error.code().name}): "
                "status is unknown, generation goes on",
            )

    async def _open(self, request: api.GenerateRequest, arrived_s: float) -> Request:
        """The request to read: found, or checked, tokenized and started. No await after it is found."""
        validate.check_request_id(request, self._limits)
        fingerprint = validate.fingerprint(request)
        asked = fingerprint if validate.has_prompt(request) else None
        entry = self._log.find_same(request.request_id, asked, request.resume_from)
        if entry is not None:
            return entry
        validate.check_cheap(request, self._served, self._limits)
        with self._log.admission():
            job = await asyncio.get_running_loop().run_in_executor(
                self._tokenizing, validate.prepare, request, self._served, self._limits
            )
            # The same request may have come twice and been started by the other meanwhile.
            entry = self._log.find_same(request.request_id, asked, request.resume_from)
            if entry is not None:
                return entry
            return self._log.start(request.request_id, job, fingerprint=fingerprint, arrived_s=arrived_s)

    async def _abort(self, context: grpc.aio.ServicerContext, error: FarshoreError) -> None:
        code, message, trailing = rpc.status_of(error)
        if isinstance(error, Overloaded):
            # gRPC's own retry hint: clients with a retry policy wait this long.
            trailing += (("grpc-retry-pushback-ms", str(self._limits.retry_after_ms)),)
        await context.abort(code, message, trailing)
