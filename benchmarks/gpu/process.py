"""Measures the sections of the GPU benchmark in a process that is replaced when it breaks or hangs.

After an illegal access every call to the GPU fails in that process, and a kernel that never ends is ended by
nothing but its process. A machine with a GPU is rarely at hand: the other sections must be measured all the
same, and what is known must be known at once. Called by ``benchmark``; such processes call
``end_with_input``. It must not know what a section does.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing


class Limits(NamedTuple):
    """Seconds. The defaults leave a machine that is lent for 15 minutes some for its start and the tests."""

    section_s: float = 120.0
    """For a section; the first one of a process includes its start."""
    total_s: float = 450.0


class Section(NamedTuple):
    """What a section gave."""

    results: list[Result]
    bars: list[Bar]
    machine: dict[str, Any]


class _Hung(Exception):
    """The process said nothing in time."""


class _Ended(Exception):
    """The process ended."""


def sections(
    names: Sequence[str],
    command: Callable[[Sequence[str]], Sequence[str]],
    *,
    limits: Limits,
    progress: Callable[[str], None],
) -> Iterator[Section]:
    """Measures sections in order, and yields each when it ends. ``command``: starts a process that measures
    those named, as ``farshore.benchmarks.gpu.sections`` does. A section that took too long, or whose process
    ended, gives a bar without a value, and a new process measures those after it."""
    left = deque(names)
    ends_s = time.monotonic() + limits.total_s
    while left and time.monotonic() < ends_s:
        with _started(command(tuple(left))) as (child, lines):
            while left:
                section_ends_s = min(time.monotonic() + limits.section_s, ends_s)
                begun_s = time.monotonic()
                try:
                    yield _next(lines, section_ends_s, progress)
                    left.popleft()
                except _Hung:
                    seconds = time.monotonic() - begun_s
                    yield _failed(left.popleft(), f"took more than {seconds:.0f} s")
                    break
                except _Ended:
                    yield _failed(left.popleft(), f"its process ended with {child.wait()}")
                    break
    for name in left:
        yield _failed(name, f"{limits.total_s:.0f} s had passed")


def failed(name: str, why: str) -> Bar:
    """The bar of what was not measured."""
    return Bar.at_most(name, None, 0, "errors", why)


def end_with_input() -> None:
    """Ends this process when its standard input ends, even while it hangs in a kernel: it must not outlive
    the one that reads its results."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _failed(name: str, why: str) -> Section:
    return Section([], [failed(name, why)], {})


@contextmanager
def _started(
    command: Sequence[str],
) -> Iterator[tuple["subprocess.Popen[str]", "queue.SimpleQueue[str | None]"]]:
    """The process and its lines, None behind the last. Killed at the end: it may hang."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8") as child:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(child, lines), daemon=True)
        reader.start()
        try:
            yield child, lines
        finally:
            child.kill()
            reader.join()


def _read(child: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str | None]") -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _next(lines: "queue.SimpleQueue[str | None]", ends_s: float, progress: Callable[[str], None]) -> Section:
    """Waits for the end of a section, and passes on what comes before. Raises _Hung and _Ended."""
    while True:
        try:
            line = lines.get(timeout=max(ends_s - time.monotonic(), 0.0))
        except queue.Empty:
            raise _Hung from None
        if line is None:
            raise _Ended
        message = json.loads(line)
        if "bars" in message:
            bars = [Bar(**bar) for bar in message["bars"]]
            return Section([_result(**result) for result in message["results"]], bars, message["machine"])
        progress(message.get("section") or message["progress"])


def _result(name: str, timing: dict[str, Any], figures: dict[str, Any]) -> Result:
    return Result(name, Timing(tuple(timing["samples_s"])), figures)
