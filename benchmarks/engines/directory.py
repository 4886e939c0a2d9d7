"""The part of ``farshore bench engines`` that looks prefixes up in a Redis.

Called by the benchmark of several engines. It runs a Redis of its own on this machine, so a look-up includes
the hop over loopback, the parsing in Python, and whatever else the machine does.
"""

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from farshore.benchmarks.engines.redis_server import RedisServer, binaries
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Announcement, Directory, WorkerRecord
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.kvstore.directory.redis.directory import RedisDirectory

BLOCKS = 100_000
HASHES = 32
"""A prompt of 8K tokens."""
LOOK_UPS = 1_000
WORKERS = 16
"""Attention workers that share the blocks."""
MORE_WORKERS = 1_000
TRIES = 5
"""Of an announcement, on a machine that is too busy to answer in time."""
LEASE_S = 600.0
"""So long that the measurement needs no renewals."""
MOST_P50_MS = 1.0


def redis_bars() -> tuple[list[Result], list[Bar]]:
    """Measures ``find_prefix`` over 100,000 announced blocks. Takes some 10 s. Without a Redis or Valkey on
    this machine there is no result, and the bar is missed with a note that says so."""
    found = binaries()
    program = found.get("redis") or found.get("valkey")
    if program is None:
        note = "no redis-server and no valkey-server on this machine: install one"
        return [], [Bar.at_most("redis_find_prefix_p50", None, MOST_P50_MS, "ms", note)]
    results = []
    with tempfile.TemporaryDirectory() as folder, RedisServer(program, Path(folder)) as server:
        for workers in (WORKERS, MORE_WORKERS):
            directory = RedisDirectory(
                RedisAddress.parse(f"{server.url}?cluster=bench-{workers}"), lease_s=LEASE_S
            )
            results.append(_look_ups(directory, workers))
            directory.disconnect()
    p50_ms = results[0].timing.median_s * 1e3
    note = f"{BLOCKS:,} blocks of {WORKERS} workers, {HASHES} a look-up, {Path(program).name}"
    return results, [Bar.at_most("redis_find_prefix_p50", p50_ms, MOST_P50_MS, "ms", note)]


def _look_ups(directory: Directory, workers: int) -> Result:
    began_s = time.perf_counter()
    names = [hashlib.sha256(number.to_bytes(8, "little")).digest() for number in range(BLOCKS)]
    for index, record in enumerate(_records(workers)):
        directory.renew(record)
        own = tuple(names[index::workers])
        _announce(directory, record.worker, Announcement(since=0, until=1, added=own))
    announced_s = time.perf_counter() - began_s
    samples_s = []
    for look_up in range(LOOK_UPS):
        first = look_up * HASHES % (BLOCKS - HASHES)
        asked = names[first : first + HASHES]
        start_s = time.perf_counter()
        holders = directory.find_prefix(asked)
        samples_s.append(time.perf_counter() - start_s)
        assert all(holders), "every block was announced"
    figures = {"blocks": BLOCKS, "workers": workers, "hashes": HASHES, "announce_all_s": announced_s}
    return Result(f"find_prefix in redis, {workers} workers", Timing(tuple(samples_s)), figures)


def _announce(directory: Directory, worker: WorkerId, blocks: Announcement) -> None:
    for _ in range(TRIES - 1):
        with contextlib.suppress(TransportError):
            directory.announce(worker, blocks)
            return
    directory.announce(worker, blocks)


def _records(workers: int) -> Iterator[WorkerRecord]:
    for index in range(workers):
        yield WorkerRecord(
            worker=WorkerId(f"attention-{index}-abcdef"),
            kind="attention",
            slot=f"attention-{index}",
            address=f"127.0.0.1:{20_000 + index}",
            host="127.0.0.1",
            process_id=1 + index,
            state="serving",
        )
