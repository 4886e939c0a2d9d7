"""An engine in its own process, for tests that kill or freeze it.

``python engine_process.py PORT``, run by ``harness.EngineProcess``. Prints its port.
Answers each sequence with one token, 5; the next ones are 6, 7 and so on. Lines on stdin control it: ``more``
gives each sequence one token more, those to come too; ``finish`` ends all, those to come too, until ``hold``;
``serving`` and ``failed`` set its health.
"""

import asyncio
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.benchmarks.gateway.scripted import ScriptedService
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.proto import inference_pb2 as api

SERVICE = "farshore.cluster.v1.Engine"


class Engine(ScriptedService):
    def __init__(self):
        self._tokens = 1  # of each sequence
        self._finish = False
        self._changed = asyncio.Condition()

    async def answer(self, request, send):
        send(cluster_pb2.SequenceEvent(taken=True))
        sent = 0
        while await self._has_token(sent):
            send(cluster_pb2.SequenceEvent(token=cluster_pb2.SampledToken(token_id=5 + sent)))
            sent += 1
        done = cluster_pb2.SequenceFinished(reason=api.FINISH_REASON_STOP)
        send(cluster_pb2.SequenceEvent(finished=done))

    async def _has_token(self, sent):
        """Waits for the sequence's next token, or for its end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._tokens > sent or self._finish)
        return self._tokens > sent

    async def tell(self, *, more=0, finish=None):
        async with self._changed:
            self._tokens += more
            self._finish = self._finish if finish is None else finish
            self._changed.notify_all()


async def main(port):
    engine, checks = Engine(), health.aio.HealthServicer()
    server = grpc.aio.server(options=rpc.OPTIONS)
    cluster_pb2_grpc.add_EngineServicer_to_server(engine, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        match line.strip():
            case "serving":
                await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
            case "failed":
                await checks.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
            case "more":
                await engine.tell(more=1)
            case "finish":
                await engine.tell(finish=True)
            case "hold":
                await engine.tell(finish=False)
        print("done", flush=True)
    await server.stop(None)


asyncio.run(main(int(sys.argv[1])))
