"""Starts the benchmark's processes, ends them, and reads the CPU time that they used.

Used by ``streams``; ``serve_until_told`` by the processes themselves. A process prints one line of JSON when
it serves, and ends when its stdin does. Must not know what a process serves.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farshore.errors import StartupError

_END_S = 30.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process:
    """A running process. ``told``: what it printed when it served."""

    def __init__(self, popen: "subprocess.Popen[str]", told: dict[str, Any]) -> None:
        self.told = told
        self._popen = popen

    def cpu_s(self) -> float:
        """The CPU time that all its threads have used, in user and in system mode. In steps of a clock
        tick."""
        fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

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
