"""A client that sends one hostile request, and misbehaves as that request's kind says.

Called by ``faults_hostile``, which bounds each call's time. Must not know what is held against it.
"""

import asyncio
import contextlib
import time
from typing import Any

import grpc

from farshore.benchmarks.faults.cluster import Server
from farshore.benchmarks.faults.requests import Hostile, Kind
from farshore.proto import inference_pb2 as api

MOST_READ_S = 8.0
"""That a slow reader takes, before it reads the rest at once."""
GARBAGE_READ_S = 1.0
CALL_DEADLINE_S = 30.0
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 12))
"""Keeps an answer that is not read at the server."""
_GENERATE = f"/{api.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"


async def behave(server: Server, hostile: Hostile) -> tuple[str, int]:
    """(how it ended, tokens that came). Raises grpc.aio.AioRpcError where the request was refused."""
    if hostile.kind is Kind.GARBAGE:
        return await _garbage(server, hostile)
    options = SMALL_WINDOW if hostile.kind in (Kind.SLOW_READER, Kind.STALLED_READER) else ()
    async with server.channel(options) as channel:
        client = _Client(channel, hostile)
        match hostile.kind:
            case Kind.CANCEL_AT_ONCE:
                return await client.cancel_at_once()
            case Kind.CANCEL_MIDWAY:
                return await client.cancel_midway()
            case Kind.CANCEL_BEFORE:
                await client.cancel()
                return await client.read_all()
            case Kind.RESUME:
                return await client.resume()
            case Kind.DISCONNECT:
                return await client.leave()
            case Kind.SLOW_READER:
                return await client.read_slowly()
            case Kind.STALLED_READER:
                return await client.stall()
            case _:
                return await client.read_all()


class _Client:
    def __init__(self, channel: grpc.aio.Channel, hostile: Hostile) -> None:
        self._channel = channel
        self._hostile = hostile
        self._tokens = 0

    def _generate(self, message: bytes) -> Any:
        """The bytes as they are: no client library is in the way."""
        call = self._channel.unary_stream(
            _GENERATE, request_serializer=bytes, response_deserializer=api.GenerateEvent.FromString
        )
        return call(message)

    async def cancel(self) -> str:
        call = self._channel.unary_unary(
            _GENERATE.replace("/Generate", "/Cancel"),
            request_serializer=api.CancelRequest.SerializeToString,
            response_deserializer=api.CancelReply.FromString,
        )
        try:
            await call(api.CancelRequest(request_id=self._hostile.request_id), timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async def _read(self, call: Any, *, tokens: int | None = None) -> str:
        """Until so many tokens came, or the end."""
        seen = 0
        async for event in call:
            kind = event.WhichOneof("kind")
            seen += kind == "token"
            self._tokens += kind == "token"
            if kind == "finished":
                reasons = {api.FinishReason.Name(choice.reason) for choice in event.finished.choices}
                return " ".join(sorted(name.removeprefix("FINISH_REASON_").lower() for name in reasons))
            if tokens is not None and seen >= tokens:
                return "left"
        return "broken off"

    async def read_all(self) -> tuple[str, int]:
        return await self._read(self._generate(self._hostile.message)), self._tokens

    async def cancel_at_once(self) -> tuple[str, int]:
        """The Cancel is sent right behind the Generate, without waiting for an answer."""
        call = self._generate(self._hostile.message)
        cancelled = asyncio.create_task(self.cancel())
        try:
            ended = await self._read(call)
        finally:
            answer = await cancelled
        return f"{ended}; Cancel: {answer}", self._tokens

    async def cancel_midway(self) -> tuple[str, int]:
        call = self._generate(self._hostile.message)
        ended = await self._read(call, tokens=self._hostile.after_tokens)
        if ended != "left":
            return ended, self._tokens
        answer = await self.cancel()
        return f"{await self._read(call)}; Cancel: {answer}", self._tokens

    async def resume(self) -> tuple[str, int]:
        call = self._generate(self._hostile.message)
        await self._read(call, tokens=self._hostile.after_tokens)
        call.cancel()
        await asyncio.sleep(self._hostile.hold_s)
        return f"resumed: {await self._read(self._generate(self._hostile.resumed))}", self._tokens

    async def leave(self) -> tuple[str, int]:
        """The connection is closed behind it, by the caller's channel."""
        call = self._generate(self._hostile.message)
        return await self._read(call, tokens=self._hostile.after_tokens), self._tokens

    async def read_slowly(self) -> tuple[str, int]:
        call, begun_s = self._generate(self._hostile.message), time.perf_counter()
        while time.perf_counter() - begun_s < MOST_READ_S:
            ended = await self._read(call, tokens=1)
            if ended != "left":
                return ended, self._tokens
            await asyncio.sleep(self._hostile.hold_s)
        return await self._read(call), self._tokens

    async def stall(self) -> tuple[str, int]:
        """Reads a little, then nothing for seconds; what the server does meanwhile is its own affair."""
        call = self._generate(self._hostile.message)
        ended = await self._read(call, tokens=self._hostile.after_tokens)
        if ended != "left":
            return ended, self._tokens
        await asyncio.sleep(self._hostile.hold_s)
        with contextlib.suppress(grpc.aio.AioRpcError):
            ended = await self._read(call)
        return ended, self._tokens


async def _garbage(server: Server, hostile: Hostile) -> tuple[str, int]:
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    ended = "answered"
    try:
        writer.write(hostile.garbage)
        async with asyncio.timeout(GARBAGE_READ_S + hostile.hold_s):
            await writer.drain()
            while await reader.read(1 << 16):
                pass
        ended = "closed"
    except TimeoutError:
        ended = "left open"
    except ConnectionError:
        ended = "closed"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return ended, 0
