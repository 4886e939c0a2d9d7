"""The attention worker: one shard store behind one gRPC service, in a process of its own.

Placed by the controller as a Ray actor; Ray only starts and ends it, every byte of KV and every frame goes
over gRPC. It does not know models: an engine says what its frames mean when it opens a stream.
"""

import torch

from farshore.attention_offload.grpc_server import AttentionService, serve
from farshore.ids import WorkerId
from farshore.kvstore.arena import Arena
from farshore.kvstore.store import LocalStore

STOP_GRACE_S = 1.0


class AttentionWorker:
    def __init__(self, *, worker: WorkerId, kv_memory_bytes: int, listen: str, threads: int) -> None:
        """``listen`` is ``host:port``, port 0 for any. Raises PortInUse."""
        torch.set_num_threads(threads)
        store = LocalStore(worker=worker, arena=Arena(kv_memory_bytes))
        self._server, self._address = serve(AttentionService(worker, store), listen)

    def address(self) -> str:
        return self._address

    def stop(self) -> None:
        """End open streams and give the port back. Idempotent."""
        self._server.stop(STOP_GRACE_S).wait()
