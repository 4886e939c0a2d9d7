"""An engine that computes nothing: serves the Engine RPC, and sends the tokens of a text by a clock.

``python -m farshore.benchmarks.gateway.engine``, run by ``streams``. Prints its address as a line of JSON,
and ends when its stdin does. A request's seed is the number of its stream in the log.
"""

import asyncio
import contextlib
from importlib import resources

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.benchmarks.gateway.pace import Pace, parser
from farshore.benchmarks.gateway.processes import serve_until_told
from farshore.benchmarks.gateway.scripted import ScriptedService, Send
from farshore.models.files.source import DEMO, resolve
from farshore.models.tokenizer.load import load_tokenizer
from farshore.proto import cluster_pb2 as cluster
from farshore.proto import cluster_pb2_grpc
from farshore.proto import inference_pb2 as api

SERVICE = cluster.DESCRIPTOR.services_by_name["Engine"].full_name
TEXT_CHARS = 20_000


def script() -> list[int]:
    """The token ids of every answer: of an English text, in the demo model's vocabulary."""
    text = resources.files("farshore.benchmarks").joinpath("texts/alice.txt").read_text(encoding="utf-8")
    return load_tokenizer(resolve(DEMO)).encode(text[:TEXT_CHARS])


class ScriptedEngine(ScriptedService):
    """Answers each request with the script's first ``max_tokens`` tokens."""

    def __init__(self, pace: Pace, ids: list[int]) -> None:
        self._pace = pace
        self._ids = ids

    async def answer(self, request: cluster.SequenceRequest, send: Send) -> None:
        send(cluster.SequenceEvent(taken=True))
        sampling = request.sampling
        async with contextlib.aclosing(self._pace.ticks(sampling.seed, sampling.max_tokens)) as ticks:
            async for index in ticks:
                token = cluster.SampledToken(token_id=self._ids[index % len(self._ids)])
                send(cluster.SequenceEvent(token=token))
        done = cluster.SequenceFinished(reason=api.FINISH_REASON_LENGTH)
        send(cluster.SequenceEvent(finished=done))


async def main() -> None:
    args = parser().parse_args()
    server = grpc.aio.server(options=rpc.OPTIONS)
    engine = ScriptedEngine(Pace(tokens_per_s=args.tokens_per_s, log=args.log), script())
    cluster_pb2_grpc.add_EngineServicer_to_server(engine, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    await serve_until_told(f"127.0.0.1:{port}")
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
