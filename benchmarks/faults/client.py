"""A client that sends one hostile request and misbehaves as the request's kind says.

Called by ``faults.hostile``, which limits the time of each call. Must not know the bars.
"""

import asyncio
import contextlib
import time
from typing import Any

import grpc

from farshore.benchmarks.faults.cluster import Server
from farshore.benchmarks.faults.requests import Hostile, HostileKind
from farshore.proto import inference_pb2 as api

MOST_READ_S = 8.0
"""How long a slow reader reads slowly, before it reads the rest at once."""
GARBAGE_READ_S = 1.0
CALL_DEADLINE_S = 30.0
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 12))
"""Channel options for a small HTTP/2 window, so that an unread answer stays at the server."""
_GENERATE = f"/{api.DESCRIPTOR.services_by_name['InferenceService'].full_name}/Generate"


async def behave(server: Server, hostile: Hostile) -> tuple[str, int]:
    """Sends the request. Returns (how it ended, number of tokens received).

    Raises grpc.aio.AioRpcError if the server refuses the request."""
    if hostile.kind is HostileKind.GARBAGE:
        return await _garbage(server, hostile)
    options = SMALL_WINDOW if hostile.kind in (HostileKind.SLOW_READER, HostileKind.STALLED_READER) else ()
    async with server.channel(options) as channel:
        client = _Client(channel, hostile)
        match hostile.kind:
            case HostileKind.CANCEL_AT_ONCE:
                return await client.cancel_at_once()
            case HostileKind.CANCEL_MIDWAY:
                return await client.cancel_midway()
            case HostileKind.CANCEL_BEFORE:
                await client.cancel()
                return await client.read_all()
            case HostileKind.RESUME:
                return await client.resume()
            case HostileKind.DISCONNECT:
                return await client.leave()
            case HostileKind.SLOW_READER:
                return await client.read_slowly()
            case HostileKind.STALLED_READER:
                return await client.stall()
            case _:
                return await client.read_all()


class _Client:
    """Sends one hostile request on a channel. Each public method is one behaviour; it returns as
    :func:`behave`."""

    def __init__(self, channel: grpc.aio.Channel, hostile: Hostile) -> None:
        self._channel = channel
        self._hostile = hostile
        self._tokens = 0

    def _generate(self, message: bytes) -> Any:
        """Calls Generate with serialised bytes, which need not be a valid message."""
        call = self._channel.unary_stream(
            _GENERATE, request_serializer=bytes, response_deserializer=api.GenerateEvent.FromString
        )
        return call(message)

    async def cancel(self) -> str:
        call = self._channel.unary_unary(
            _GENERATE.replace("/Generate", "/Cancel"),
            request_serializer=api.CancelRequest.SerializeToString,
            response_deserializer=api.CancelResponse.FromString,
        )
        try:
            await call(api.CancelRequest(request_id=self._hostile.request_id), timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async def _read(self, call: Any, *, tokens: int | None = None) -> str:
        """Reads up to ``tokens`` tokens, or to the end. Returns the finish reasons, "left" or "broken
        off"."""
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
        """Sends Cancel directly after Generate, without waiting for an answer."""
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
        """Stops reading in mid-stream; the caller closes the channel, and so the connection."""
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
        """Reads a few tokens, then nothing for ``hold_s`` seconds, then the rest if the server still sends
        it."""
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
