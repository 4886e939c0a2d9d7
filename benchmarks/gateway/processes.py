"""Starts the benchmark's processes, ends them, and reads the CPU time that they used.

Used by ``streams``; ``serve_until_told`` by the processes themselves. A process prints one line of JSON when
it serves, and ends when its stdin does. Must not know what a process serves.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from farshore.errors import StartupError

_END_S = 30.0
_CPUCLOCK_SCHED = 2
"""The kind of a clock that counts the time for which the scheduler ran a process."""


class Process:
    """A running process. ``told``: what it printed when it served."""

    def __init__(self, popen: "subprocess.Popen[str]", told: dict[str, Any]) -> None:
        self.told = told
        self._popen = popen

    def cpu_s(self) -> float:
        """The CPU time that all its threads have used, in user and in system mode, to the nanosecond.

        Linux gives every process a clock: the pid's complement, with the kind of the clock in the low three
        bits, is its number (clock_getcpuclockid(3)). /proc/PID/stat counts in ticks of 10 ms, and a short
        window may see none. Raises OSError if the process has ended.
        """
        return time.clock_gettime(~self._popen.pid << 3 | _CPUCLOCK_SCHED)

    def read_line(self) -> dict[str, Any]:
        """The next line of JSON that it prints. Raises StartupError if it has ended."""
        return _line(self._popen)


@contextmanager
def running(module: str, *options: str) -> Iterator[Process]:
    """Runs a module of the package while the block runs. Raises StartupError if it ends before it serves."""
    popen = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert popen.stdin is not None and popen.stdout is not None
    try:
        yield Process(popen, _line(popen))
    finally:
        popen.stdin.close()
        try:
            popen.wait(_END_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        popen.stdout.close()


def _line(popen: "subprocess.Popen[str]") -> dict[str, Any]:
    assert popen.stdout is not None
    line = popen.stdout.readline()
    if not line:
        raise StartupError(f"{popen.args!r} ended with {popen.wait()}")
    return json.loads(line)


async def serve_until_told(address: str) -> None:
    """Prints the address at which this process serves, and returns when stdin ends."""
    print(json.dumps({"address": address}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
