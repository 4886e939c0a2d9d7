"""Follows the engine: finds its address in the directory, again and again.

Run by ``api.server``. While the directory does not answer, the last known engine is used. Must not know the
requests.
"""

import asyncio
import logging

import grpc

from farshore.gateway.engines.engine_client import GrpcEngineClient
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

PERIOD_S = 0.5
DEADLINE_S = 1.0

_logger = logging.getLogger(__name__)


class EngineDiscovery:
    """Moves ``engine`` to the address of the dense worker that serves. ``directory``: a channel to it. Use it
    on the event loop only."""

    def __init__(self, engine: GrpcEngineClient, directory: grpc.aio.Channel) -> None:
        self._engine = engine
        self._stub = pb_grpc.DirectoryStub(directory)

    async def watch(self) -> None:
        """Looks every PERIOD_S until the task is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.look()

    async def look(self) -> None:
        """Looks once. An engine that is still listed as serving is kept."""
        try:
            listing = await self._stub.List(pb.ListRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError:
            return
        serving = [
            record.address
            for record in listing.workers
            if record.kind == "dense" and record.state == "serving" and record.worker_id not in listing.closed
        ]
        if serving and self._engine.address not in serving:
            _logger.warning("the engine moved from %s to %s", self._engine.address, serving[0])
            self._engine.move(serving[0])
