"""The attention worker: a process that runs one shard behind one gRPC service.

The controller starts it as a Ray actor. Ray only starts and ends it; KV and frames travel over gRPC and the
hot connections. The worker knows no models: an engine describes its model when it connects.

``python -m farshore.workers.attention`` starts the same worker without Ray, for benchmarks and for tests that
use several hosts. It prints its address, and ends when its standard input is closed, so that it never
outlives its parent process. After SIGTERM it drains first.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from grpc_health.v1 import health

from farshore.attention_offload.base import ShardIdentity
from farshore.attention_offload.shard.server import serve
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.transport.core_sharing import share_cores
from farshore.cluster_token import ClusterToken
from farshore.defaults import DRAIN_TIMEOUT_S
from farshore.errors import InvalidRequest
from farshore.ids import WorkerId
from farshore.interpreter import share_interpreter
from farshore.kvstore.directory.base import Directory, WorkerRecord
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.workers.announcer import Announcer
from farshore.workers.device import CPU, Device, resolve
from farshore.workers.ending import Ending
from farshore.workers.lease import Lease
from farshore.workers.whereabouts import whereabouts

STOP_GRACE_S = 1.0


class AttentionWorker:
    """One shard and its server. It serves from construction until :meth:`stop`."""

    def __init__(
        self,
        *,
        worker: WorkerId,
        kv_memory_bytes: int,
        listen: str,
        threads: int,
        token: ClusterToken | None,
        device: Device = CPU,
        slot: str = "",
        directory: Directory | None = None,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """``listen`` is ``host:port``; port 0 takes any free port. ``token``: what callers must prove; None
        is allowed on a loopback address only. ``device``: where KV is and is attended to. ``directory``:
        lists the worker, in ``slot``, and its named blocks, until :meth:`stop`; None: nothing does.
        ``on_failed``: called once, from any thread, if the device fails for good. Raises PortInUse, and
        InvalidRequest for a device that can't give the memory."""
        self._on_failed = on_failed
        torch.set_num_threads(threads)
        share_cores()
        self._store = LocalStore(worker=worker, arena=Arena(kv_memory_bytes, device=device.torch))
        share_interpreter()
        self._service = AttentionService(worker, self._store, token=token, on_failed=self._fail)
        self._checks = health.HealthServicer()
        self._server, self._address = serve(self._service, listen, checks=self._checks)
        self._record = WorkerRecord(
            worker=worker,
            kind="attention",
            slot=slot,
            address=self._address,
            host=listen.rpartition(":")[0],
            process_id=os.getpid(),
            **whereabouts(),
            state="serving",
            device=str(device),
        )
        self._lease = self._announcer = None
        if directory is not None:
            self._lease = Lease(directory, lambda: self._record)
            self._announcer = Announcer(directory, worker, self._store.names)
            self._announcer.start()

    def address(self) -> str:
        """Returns the address that the worker listens on."""
        return self._address

    def memory(self) -> ShardIdentity:
        """The shard's identity, with its memory and what it attended to."""
        return self._service.identity()

    def begin_drain(self) -> None:
        """Says in the directory and in its health that the worker takes nothing new: engines move their
        spans elsewhere. Idempotent."""
        self._record = replace(self._record, state="draining")
        self._checks.enter_graceful_shutdown()

    def _fail(self, reason: str) -> None:
        """Says that the worker can't go on."""
        if self._record.state != "failed":
            self._record = replace(self._record, state="failed", failure=reason)
            self._checks.enter_graceful_shutdown()
            self._on_failed()

    @property
    def is_drained(self) -> bool:
        """Whether no sequence of an engine holds a span here. Cached prefixes are given up."""
        return not self._store.sequences()

    def stop(self) -> None:
        """Withdraws from the directory, ends open streams and frees the port. Idempotent."""
        if self._announcer is not None and self._lease is not None:
            self._announcer.end()
            self._lease.end()
        self._server.stop(STOP_GRACE_S).wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Lend this host's memory to engines.")
    parser.add_argument("--worker", required=True, metavar="ID")
    parser.add_argument("--kv-memory-bytes", required=True, type=int, metavar="N")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, or cuda:N: that one of the visible GPUs"
    )
    parser.add_argument("--threads", default=1, type=int, metavar="N")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="the cluster's token, which engines must prove (default: none, on a loopback address only)",
    )
    parser.add_argument(
        "--drain-timeout",
        default=DRAIN_TIMEOUT_S,
        type=float,
        metavar="S",
        dest="drain_timeout_s",
        help="how long engines may go on reading from it after SIGTERM",
    )
    args = parser.parse_args()
    try:
        worker = _worker(args)
    except InvalidRequest as error:
        parser.error(str(error))
    Ending(worker).on_sigterm(args.drain_timeout_s)
    print(worker.address(), flush=True)
    sys.stdin.read()
    worker.stop()


def _worker(args: argparse.Namespace) -> AttentionWorker:
    return AttentionWorker(
        worker=WorkerId(args.worker),
        kv_memory_bytes=args.kv_memory_bytes,
        device=resolve(args.device),
        listen=args.listen,
        threads=args.threads,
        token=ClusterToken.read(args.token_file) if args.token_file else None,
        on_failed=lambda: os._exit(1),
    )


if __name__ == "__main__":
    main()
