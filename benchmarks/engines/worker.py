"""The process of one worker of a cluster without Ray: an engine, or a shard, listed in a directory.

Started by ``cluster`` of this folder, and by tests. Its argument is a JSON object with the fields of
:class:`Options`. It prints its address when it serves, and ends when its standard input is closed, so that it
never outlives its parent process.
"""

import json
import sys
from dataclasses import dataclass
from typing import Literal

from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory
from farshore.kvstore.directory.connect import open_directory
from farshore.model_spec import ModelSpec
from farshore.workers.attention import AttentionWorker
from farshore.workers.dense import DenseConfig, DenseWorker
from farshore.workers.engine.admission import EngineLimits

HOST = "127.0.0.1"
SHARD_GRACE_S = 120.0
"""Longer than a cluster's: a machine that others use may hold up a shard that is not lost."""
KV_FORMATS = {"bfloat16": "bf16", "float32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of a worker."""

    kind: Literal["dense", "attention"]
    worker: str
    """Its id, which is also the name of its slot."""
    directory: str
    """URL of the directory that lists it."""
    kv_memory_bytes: int
    threads: int
    spec: str
    """The model, as :meth:`ModelSpec.to_json` writes it. Only an engine uses it and ``dtype``."""
    dtype: str


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    directory = open_directory(options.directory)
    worker, address = (_attention if options.kind == "attention" else _dense)(options, directory)
    print(address, flush=True)
    sys.stdin.read()
    worker.stop()


def _attention(options: Options, directory: Directory) -> tuple[AttentionWorker, str]:
    worker = AttentionWorker(
        worker=WorkerId(options.worker),
        slot=options.worker,
        kv_memory_bytes=options.kv_memory_bytes,
        listen=f"{HOST}:0",
        threads=options.threads,
        token=None,
        directory=directory,
    )
    return worker, worker.address()


def _dense(options: Options, directory: Directory) -> tuple[DenseWorker, str]:
    config = DenseConfig(
        worker=WorkerId(options.worker),
        slot=options.worker,
        spec=ModelSpec.from_json(options.spec),
        dtype=options.dtype,
        kv_format=KV_FORMATS[options.dtype],
        kv_memory_bytes=options.kv_memory_bytes,
        offload=True,
        shard_by="range",
        listen=f"{HOST}:0",
        token=None,
        threads=options.threads,
        limits=EngineLimits(shard_grace_s=SHARD_GRACE_S),
    )
    worker = DenseWorker(config, directory, host=HOST)
    worker.load()
    return worker, worker.serve()
