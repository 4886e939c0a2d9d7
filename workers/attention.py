"""The attention worker: one shard store behind one gRPC service, in a process of its own.

Placed by the controller as a Ray actor; Ray only starts and ends it, every byte of KV and every frame goes
over gRPC. It does not know models: an engine says what its frames mean when it opens a stream.

``python -m farshore.workers.attention`` is the same without Ray, for benchmarks and tests of real hosts: it
prints its address, and ends when its input does, so that it never outlives who started it.
"""

import argparse
import sys

import torch

from farshore.attention_offload.shard.service import AttentionService, serve
from farshore.attention_offload.transport.core_sharing import share_cores
from farshore.ids import WorkerId
from farshore.interpreter import share_interpreter
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore

ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"}
"""What its process is to be started with: whoever waits for a message then reads its socket itself, instead
of being woken by gRPC's event engine, whose threads wake each other: a third of a hop. gRPC reads this when
it is imported."""

STOP_GRACE_S = 1.0


class AttentionWorker:
    def __init__(self, *, worker: WorkerId, kv_memory_bytes: int, listen: str, threads: int) -> None:
        """``listen`` is ``host:port``, port 0 for any. Raises PortInUse."""
        torch.set_num_threads(threads)
        share_cores()
        store = LocalStore(worker=worker, arena=Arena(kv_memory_bytes))
        share_interpreter()
        self._server, self._address = serve(AttentionService(worker, store), listen)

    def address(self) -> str:
        return self._address

    def stop(self) -> None:
        """End open streams and give the port back. Idempotent."""
        self._server.stop(STOP_GRACE_S).wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Lend this host's memory to engines.")
    parser.add_argument("--worker", required=True, metavar="ID")
    parser.add_argument("--kv-memory-bytes", required=True, type=int, metavar="N")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--threads", default=1, type=int, metavar="N")
    args = parser.parse_args()
    worker = AttentionWorker(
        worker=WorkerId(args.worker),
        kv_memory_bytes=args.kv_memory_bytes,
        listen=args.listen,
        threads=args.threads,
    )
    print(worker.address(), flush=True)
    sys.stdin.read()
    worker.stop()


if __name__ == "__main__":
    main()
