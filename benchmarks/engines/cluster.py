"""Engines and shards in processes of their own, without Ray: each on its cores, all listed in one directory.

Used by parts of this benchmark, and by tests that kill engines. The directory is served by the calling
process. It must not know what is measured.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Literal, Self

from farshore import rpc
from farshore.attention_offload.transport.core_sharing import usable_cores
from farshore.benchmarks.engines.worker import HOST, Options
from farshore.errors import StartupError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Announcement
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.model_spec import ModelSpec
from farshore.proto import cluster_pb2, cluster_pb2_grpc

DEADLINE_S = 300.0
"""For anything of the cluster: a machine that others use loads a model slowly."""
END_S = 20.0
POLL_S = 0.05
KV_BYTES = 512 << 20
DIRECTORY_CALLS = 16
_SERVICE = cluster_pb2.DESCRIPTOR.services_by_name["Directory"].full_name
_CHILD = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv.pop(1).split(",")))
from farshore.benchmarks.engines.worker import main
main()
"""
"""Chooses the cores before anything is imported: every thread of the process inherits them."""


class HeardDirectory(EmbeddedDirectory):
    """Knows how many different blocks were announced to it."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[bytes] = set()

    @property
    def announced_blocks(self) -> int:
        return len(self._names)

    def announce(self, worker: WorkerId, blocks: Announcement) -> int:
        known = super().announce(worker, blocks)
        if known == blocks.until:
            self._names.update(blocks.added)
        return known


class WorkerProcess:
    """One worker. Construct it, then :meth:`await_address`: it starts meanwhile."""

    def __init__(self, options: Options, *, cores: Collection[int], environment: Mapping[str, str]) -> None:
        self.worker = WorkerId(options.worker)
        self.address = ""
        command = [sys.executable, "-P", "-c", _CHILD, ",".join(map(str, cores)), json.dumps(asdict(options))]
        pipe, env = subprocess.PIPE, {**os.environ, **environment}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def await_address(self) -> str:
        """Blocks until the worker serves, and returns where. Raises StartupError if it ends before."""
        assert self.process.stdout is not None
        self.address = self.address or self.process.stdout.readline().strip()
        if not self.address:
            raise StartupError(
                f"the process of {self.worker} ended with {self.process.wait()}: see its output"
            )
        return self.address

    def kill(self) -> None:
        """Ends the process by force. Idempotent."""
        self.process.kill()
        self._close()

    def end(self) -> None:
        """Ends the process in order, or by force after END_S. Idempotent."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._close()

    def _close(self) -> None:
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Cluster:
    """A directory, and the workers that are started. A context manager, which ends all of them."""

    def __init__(self, spec: ModelSpec, *, dtype: str = "bfloat16") -> None:
        self.directory = HeardDirectory()
        self._spec = spec.to_json()
        self._dtype = dtype
        self._workers: list[WorkerProcess] = []
        self._server, address = rpc.serve(
            lambda server: cluster_pb2_grpc.add_DirectoryServicer_to_server(
                DirectoryService(self.directory), server
            ),
            service=_SERVICE,
            listen=f"{HOST}:0",
            token=None,
            threads=DIRECTORY_CALLS,
        )
        self.url = f"grpc://{address}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Engines first: they drop what they hold.
        for worker in reversed(self._workers):
            worker.end()
        self._server.stop(None).wait()

    def shard(
        self, worker: str, *, cores: Sequence[int] = (), kv_bytes: int = KV_BYTES, threads: int = 1
    ) -> WorkerProcess:
        """Begins to start an attention worker. ``cores``: those that it may use; none given: all."""
        return self._start("attention", worker, cores, kv_bytes, threads, rpc.SHARD_ENVIRONMENT)

    def engine(
        self, worker: str, *, cores: Sequence[int] = (), kv_bytes: int = KV_BYTES, threads: int = 1
    ) -> WorkerProcess:
        """Begins to start a dense worker, whose tails have ``kv_bytes``."""
        return self._start("dense", worker, cores, kv_bytes, threads, {})

    def await_serving(self) -> None:
        """Blocks until all started workers serve and each engine has been answered by each shard that the
        directory lists. Raises StartupError if one ends, or after DEADLINE_S."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.await_address()
        alive = {worker.worker for worker in self._workers if worker.process.poll() is None}

        def connected() -> bool:
            records = self.directory.listing().workers
            shards = sum(record.kind == "attention" for record in records)
            return {record.worker for record in records} == alive and all(
                record.state == "serving" and (record.kind == "attention" or record.shards == shards)
                for record in records
            )

        await_true(connected, "the workers do not find each other")

    def await_announced(self, blocks: int) -> None:
        """Blocks until so many different blocks were announced. Raises StartupError after DEADLINE_S."""
        await_true(lambda: self.directory.announced_blocks >= blocks, "blocks were not announced")

    def _start(
        self,
        kind: Literal["dense", "attention"],
        worker: str,
        cores: Sequence[int],
        kv_bytes: int,
        threads: int,
        environment: Mapping[str, str],
    ) -> WorkerProcess:
        options = Options(
            kind=kind,
            worker=worker,
            directory=self.url,
            kv_memory_bytes=kv_bytes,
            threads=threads,
            spec=self._spec,
            dtype=self._dtype,
        )
        process = WorkerProcess(options, cores=cores or usable_cores(), environment=environment)
        self._workers.append(process)
        return process


def await_true(condition: Callable[[], bool], what: str) -> None:
    """Blocks until ``condition()``. Raises StartupError with ``what`` after DEADLINE_S."""
    end_s, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        if time.monotonic() > end_s:
            raise StartupError(f"{what} within {DEADLINE_S:g} s")
        pause.wait(POLL_S)
