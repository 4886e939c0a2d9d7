"""How long a real ``farshore serve`` takes from the command until it says that it serves.

Called by ``serve``. The server is a process of its own with its own Ray, on a free port, and is ended again.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from farshore.benchmarks.report import Result
from farshore.benchmarks.serve.setting import Setting
from farshore.benchmarks.timing import Timing
from farshore.errors import StartupError
from farshore.models.source import DEMO, resolve

READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0
READY = "Farshore "
"""Begins the line that tells the address."""


def measure(at: Setting, *, cold: bool) -> Result:
    """``cold``: the first start after the files of model and packages were dropped from the page cache, as
    far as the system lets us (what another process has mapped stays). Warm: starts after another one."""
    if cold:
        dropped = sum(map(_drop, _files()))
        times_s = [_start_s()]
        figures: dict[str, float | int] = {"dropped_mbytes": dropped / 1e6}
    else:
        if not at.started:
            _start_s()
        times_s = [_start_s() for _ in range(at.sizes.starts)]
        figures = {}
    at.started = True
    timing = Timing(tuple(times_s))
    return Result(f"start-up, {'cold' if cold else 'warm'}", timing, {"ready_s": timing.median_s, **figures})


def _start_s() -> float:
    begun_s = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "farshore.client.cli.main", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None and server.stderr is not None
    told: list[str] = []
    # Or it would stop where the pipe is full.
    drain = threading.Thread(target=lambda: told.extend(server.stderr or ()), daemon=True)
    drain.start()
    overdue = threading.Timer(READY_DEADLINE_S, server.kill)
    overdue.start()
    try:
        line = server.stdout.readline()
        ready_s = time.perf_counter() - begun_s
    finally:
        overdue.cancel()
        _end(server)
        drain.join(STOP_DEADLINE_S)
        server.stdout.close()
        server.stderr.close()
    if not line.startswith(READY):
        raise StartupError(
            f"farshore serve did not start: {' '.join(told[-1:]).strip() or 'it said nothing'}"
        )
    return ready_s


def _end(server: "subprocess.Popen[str]") -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(STOP_DEADLINE_S)


def _files() -> Iterator[Path]:
    """The model's, and those of every installed package: whoever else uses them reads them again."""
    source = Path(resolve(DEMO).path)
    yield from source.rglob("*") if source.is_dir() else [source]
    for root in {
        Path(torch.__file__).parents[1],
        *(Path(p) for p in sys.path if p.endswith("site-packages")),
    }:
        yield from (path for path in root.rglob("*") if path.suffix in (".so", ".py", ".pyc"))


def _drop(path: Path) -> int:
    """Bytes of a file that the page cache was asked to forget."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)
