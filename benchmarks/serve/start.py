"""Measures how long ``farshore serve`` takes from the command to the line that says that it serves.

Called by ``benchmark``. Each server is a process with a private Ray, on a free port, and is ended afterwards.
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
from farshore.models.files.source import DEMO, resolve

READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0
READY = "Farshore "
"""The beginning of the line with the server's address."""


def measure(setting: Setting, *, cold: bool) -> Result:
    """``cold``: one start, after the files of the model and of the packages were dropped from the page cache
    (files that another process has mapped stay). Else: ``starts`` starts, each after an earlier one."""
    if cold:
        dropped = sum(map(_drop, _files()))
        times_s = [_start_s()]
        figures: dict[str, float | int] = {"dropped_mbytes": dropped / 1e6}
    else:
        if not setting.started:
            _start_s()
        times_s = [_start_s() for _ in range(setting.sizes.starts)]
        figures = {}
    setting.started = True
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
    errors: list[str] = []
    # stderr is read all the time: the server would block on a full pipe.
    drain = threading.Thread(target=lambda: errors.extend(server.stderr or ()), daemon=True)
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
            f"farshore serve did not start: {' '.join(errors[-1:]).strip() or 'it said nothing'}"
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
    """The files of the model and of all installed packages. Other processes must read them again."""
    source = Path(resolve(DEMO).path)
    yield from source.rglob("*") if source.is_dir() else [source]
    for root in {
        Path(torch.__file__).parents[1],
        *(Path(folder) for folder in sys.path if folder.endswith("site-packages")),
    }:
        yield from (path for path in root.rglob("*") if path.suffix in (".so", ".py", ".pyc"))


def _drop(path: Path) -> int:
    """Asks the page cache to forget a file; returns its size in bytes."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)
