"""Ends a private Ray's processes after the driver was killed.

Run as ``python -m farshore.controller.driver.reaper``. Started by ``ray_runtime``, which writes the processes
to its stdin, one "pid start" a line. When stdin closes, the driver has ended. Most of Ray's processes then
end by themselves; its agents do not. A process that has ended meanwhile is not mistaken for another with its
number: the start time tells.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

GRACE_S = 3.0
"""How long the processes may take to end by themselves."""


class Reaper:
    """The driver's end. The constructor starts the process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "farshore.controller.driver.reaper"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._noted: set[int] = set()

    def note(self, process_ids: Iterable[int]) -> None:
        """Adds processes to be ended."""
        new = {pid: start for pid in process_ids if pid not in self._noted and (start := _started(pid))}
        self._noted |= new.keys()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            for pid, start in new.items():
                self._process.stdin.write(f"{pid} {start}\n")
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """Ends the process, which then ends no other."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    noted = [line.split() for line in sys.stdin]
    end_s = time.monotonic() + GRACE_S
    while (left := [pid for pid, start in noted if _started(int(pid)) == start]) and time.monotonic() < end_s:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _started(process_id: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


if __name__ == "__main__":
    main()
