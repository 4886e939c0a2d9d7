"""The clock by which the scripted engine and the empty servers send tokens, and the record of when they did.

Used by ``engine`` and ``empty``, so that both send alike. The streams of a process send at the same instants,
as the rows of an engine's step do. Times are of the system's monotonic clock, which all processes share.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path


class Pace:
    """``tokens_per_s``: of each stream. ``log``: a file that gets one line of JSON for each stream that has
    ended: its number, and when each of its tokens was sent."""

    def __init__(self, *, tokens_per_s: float, log: Path) -> None:
        self._period_s = 1 / tokens_per_s
        self._log = log

    async def ticks(self, number: int, count: int) -> AsyncIterator[int]:
        """Yields 0 to ``count`` - 1, each when the token with this index is to be sent. ``number``: of the
        stream."""
        sent_s: list[float] = []
        try:
            for index in range(count):
                await asyncio.sleep(self._period_s - time.monotonic() % self._period_s)
                sent_s.append(time.monotonic())
                yield index
        finally:
            with self._log.open("a") as log:
                log.write(json.dumps([number, sent_s]) + "\n")


def parser() -> argparse.ArgumentParser:
    """A parser with the options of a :class:`Pace`."""
    made = argparse.ArgumentParser()
    made.add_argument("--tokens-per-s", type=float, required=True)
    made.add_argument("--log", type=Path, required=True)
    return made


def sent(log: Path) -> dict[int, list[float]]:
    """The times of each stream in a log, by the stream's number."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {number: times_s for number, times_s in map(json.loads, lines)}
