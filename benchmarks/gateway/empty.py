"""Servers that only send: the least that a stream costs in grpc.aio and in uvicorn.

``python -m farshore.benchmarks.gateway.empty``, run by ``streams``. A stream is made of the messages that the
gateway sent before: the first at once, the tokens' by the clock, the last ones behind them.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from farshore import rpc
from farshore.benchmarks.gateway.load import GENERATE, Messages
from farshore.benchmarks.gateway.pace import Pace, parser
from farshore.benchmarks.gateway.processes import serve_until_told
from farshore.interpreter import share_interpreter
from farshore.proto import inference_pb2 as api


async def serve_grpc(messages: Messages, pace: Pace) -> None:
    """Answers Generate."""

    async def generate(raw: bytes, context: grpc.aio.ServicerContext) -> None:
        sampling = api.GenerateRequest.FromString(raw).sampling
        await context.write(messages.first)
        async with contextlib.aclosing(pace.ticks(sampling.seed, sampling.max_tokens)) as ticks:
            async for index in ticks:
                await context.write(messages.tokens[index])
        for message in messages.last:
            await context.write(message)

    service, _, method = GENERATE[1:].partition("/")
    handlers = {method: grpc.unary_stream_rpc_method_handler(generate)}
    server = grpc.aio.server(options=rpc.OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await serve_until_told(f"127.0.0.1:{port}")
    await server.stop(None)


async def serve_http(messages: Messages, pace: Pace) -> None:
    """Answers every request with server-sent events."""

    async def stream(number: int, tokens: int) -> AsyncIterator[bytes]:
        yield messages.first + b"\n\n"
        async with contextlib.aclosing(pace.ticks(number, tokens)) as ticks:
            async for index in ticks:
                yield messages.tokens[index] + b"\n\n"
        yield b"\n\n".join(messages.last) + b"\n\n"

    async def answer(request: Request) -> Response:
        body = await request.json()
        return StreamingResponse(
            stream(body["seed"], body["max_tokens"]), media_type="text/event-stream; charset=utf-8"
        )

    application = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])

    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(application, lifespan="off", log_config=None, access_log=False, loop="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await serve_until_told(f"127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    await serving


def main() -> None:
    options = parser()
    options.add_argument("--face", choices=("grpc", "http"), required=True)
    options.add_argument("--messages", type=Path, required=True)
    args = options.parse_args()
    serve = serve_grpc if args.face == "grpc" else serve_http
    messages = Messages.read(args.messages)
    pace = Pace(tokens_per_s=args.tokens_per_s, log=args.log)
    share_interpreter()
    asyncio.run(serve(messages, pace))


if __name__ == "__main__":
    main()
