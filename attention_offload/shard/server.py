"""Runs an attention service: its gRPC server, its listener for native connections, and its ticker.

Called by ``workers.attention``. Must not know what the service answers.
"""

import logging
import threading

import grpc
from grpc_health.v1 import health

from farshore import rpc
from farshore.attention_offload.shard.engine_holds import TICK_S
from farshore.attention_offload.shard.frame_loop import FrameListener
from farshore.attention_offload.shard.service import AttentionService
from farshore.periodic import PeriodicThread
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc

_LOG = logging.getLogger(__name__)

MAX_CALLS = 512
"""The number of threads, and so of concurrent calls, Attend streams included: two for each engine that cannot
use a native connection. A thread exists from the first call that needs it."""


class AttentionServer:
    """A running service: its gRPC server, its listener for native connections, and its ticker."""

    def __init__(self, server: grpc.Server, service: AttentionService, listener: FrameListener) -> None:
        self._server = server
        self._service = service
        self._listener = listener
        # Without further ticks no lease would ever expire.
        self._ticker = PeriodicThread(service.tick, name="leases", period_s=TICK_S, tell=_tell)
        self._ticker.start()

    def stop(self, grace_s: float | None) -> threading.Event:
        """Ends native connections at once, and gRPC calls after ``grace_s`` seconds (None: at once).

        Returns an event that is set when the gRPC server has stopped."""
        self._service.imports.end_copies()
        self._listener.close()
        self._ticker.stop()
        return self._server.stop(grace_s)

    def wait_for_termination(self) -> None:
        """Blocks until the gRPC server has stopped."""
        self._server.wait_for_termination()


def _tell(error: Exception) -> None:
    _LOG.error("engines' leases were not looked at", exc_info=error)


def serve(
    service: AttentionService, listen: str, *, checks: health.HealthServicer | None = None
) -> tuple[AttentionServer, str]:
    """Starts the service on ``listen``, ``host:port``. Returns the server and its address with the real port.
    ``checks``: see :func:`farshore.rpc.serve`.

    Native TCP connections are accepted on another, free port of the same host. Raises PortInUse as
    :func:`farshore.rpc.serve`, and InvalidRequest if the host has no such address, or if it is not loopback
    and the service has no token."""
    server, address = rpc.serve(
        lambda server: pb_grpc.add_AttentionServicer_to_server(service, server),
        service=pb.DESCRIPTOR.services_by_name["Attention"].full_name,
        listen=listen,
        threads=MAX_CALLS,
        token=service.token,
        checks=checks,
    )
    service.listener = FrameListener(listen.rpartition(":")[0].strip("[]"), token=service.token)
    return AttentionServer(server, service, service.listener), address
