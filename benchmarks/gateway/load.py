"""The clients of all streams of one round, in a process of their own.

``python -m farshore.benchmarks.gateway.load``, run by ``streams``. Each stream has a connection of its own.
Prints a line of JSON when every stream has its first token, and one when all have ended. Must not know which
server answers.
"""

import argparse
import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc

from farshore import rpc
from farshore.interpreter import share_interpreter
from farshore.models.files.source import DEMO
from farshore.proto import inference_pb2 as api

DEADLINE_S = 120.0
GENERATE = f"/{api.DESCRIPTOR.services_by_name['InferenceService'].full_name}/Generate"
PROMPT = "Tell me the story."


@dataclass(slots=True)
class Stream:
    """The events that one client received. ``error``: why the stream broke, or ""."""

    number: int
    received_s: list[float] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)
    error: str = ""


class Messages(NamedTuple):
    """One stream's messages: before, for, and behind its tokens."""

    first: bytes
    tokens: list[bytes]
    last: list[bytes]

    def write(self, file: Path) -> None:
        lists = [[self.first], self.tokens, self.last]
        file.write_text(json.dumps([[base64.b64encode(one).decode() for one in some] for some in lists]))

    @classmethod
    def read(cls, file: Path) -> "Messages":
        first, tokens, last = (
            [base64.b64decode(one) for one in some] for some in json.loads(file.read_text())
        )
        return cls(first[0], tokens, last)


async def grpc_messages(address: str, number: int, tokens: int) -> AsyncIterator[bytes]:
    """The serialised events of one Generate call."""
    sampling = api.Sampling(max_tokens=tokens, seed=number, ignore_eos=True)
    request = api.GenerateRequest(text=PROMPT, sampling=sampling)
    options = [*rpc.OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        generate = channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)
        async for message in generate(request.SerializeToString()):
            yield message


async def http_messages(address: str, number: int, tokens: int) -> AsyncIterator[bytes]:
    """The server-sent events of one chat, without the blank lines between them."""
    host, _, port = address.partition(":")
    body = json.dumps(
        {
            "model": DEMO,
            "messages": [{"role": "user", "content": PROMPT}],
            "stream": True,
            "max_tokens": tokens,
            "seed": number,
            "ignore_eos": True,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    async for line in reader:
        if line.startswith(b"data: "):
            yield line.rstrip()
            if line.startswith(b"data: [DONE]"):
                break
    writer.close()


FACES = {"grpc": grpc_messages, "http": http_messages}


async def follow(stream: Stream, face: str, address: str, tokens: int, begun: asyncio.Event) -> None:
    """Fills ``stream``; sets ``begun`` at its second message, the first token's, or at its end."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            async for message in FACES[face](address, stream.number, tokens):
                stream.received_s.append(time.monotonic())
                stream.messages.append(message)
                if len(stream.messages) == 2:
                    begun.set()
    except Exception as error:
        stream.error = f"{type(error).__name__}: {error}"[:300]
    finally:
        begun.set()


async def run(args: argparse.Namespace) -> list[Stream]:
    """All streams, to their ends."""
    streams = [Stream(args.first + index) for index in range(args.streams)]
    begun = [asyncio.Event() for _ in streams]
    following = [
        asyncio.create_task(follow(stream, args.face, args.address, args.tokens, event))
        for stream, event in zip(streams, begun, strict=True)
    ]
    for event in begun:
        await event.wait()
    print(json.dumps({"running": len(streams)}), flush=True)
    await asyncio.gather(*following)
    return streams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--face", choices=tuple(FACES), required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first stream")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    share_interpreter()
    streams = asyncio.run(run(args))
    told = []
    for stream in streams:
        record = asdict(stream)
        record["messages"] = [base64.b64encode(one).decode() for one in stream.messages]
        told.append(record)
    args.out.write_text(json.dumps(told))
    print(json.dumps({"ended": len(streams)}), flush=True)


if __name__ == "__main__":
    main()
