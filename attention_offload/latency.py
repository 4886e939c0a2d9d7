"""How long shards take to answer: a histogram for each, cheap enough to feed with every frame.

Fed by ``fanout``, shown by the engine's Status. It must not know what a frame is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log2
from statistics import median
from typing import NamedTuple

from farshore.attention_offload.frames import Transport
from farshore.ids import WorkerId

STEPS_AN_OCTAVE = 4
"""A bucket ends 19% above where it begins."""
LEAST_S = 1e-6
OCTAVES = 27
"""Up to 134 s, above every deadline."""
WINDOW_FRAMES = 4096
"""Percentiles are of the newest one to two windows: a link that was slow is forgotten."""

SLOW_TIMES = 3.0
SLOW_LEAST_FRAMES = 100


class Histogram:
    """Written by one thread; others may ask meanwhile, and see a frame or two less."""

    def __init__(self) -> None:
        self._newest = [0] * (OCTAVES * STEPS_AN_OCTAVE + 1)
        self._before = list(self._newest)
        self._in_window = 0
        self.count = 0

    def add(self, seconds: float) -> None:
        if self._in_window == WINDOW_FRAMES:
            self._before, self._newest = self._newest, [0] * len(self._newest)
            self._in_window = 0
        octaves = log2(seconds / LEAST_S) if seconds > LEAST_S else 0.0
        self._newest[min(int(octaves * STEPS_AN_OCTAVE), len(self._newest) - 1)] += 1
        self._in_window += 1
        self.count += 1

    def quantile_s(self, share: float) -> float:
        """The upper end of the bucket that the quantile lies in; 0 where nothing has been added."""
        counts = [a + b for a, b in zip(self._newest, self._before, strict=True)]
        below, wanted = 0, share * sum(counts)
        for bucket, count in enumerate(counts):
            below += count
            if count and below >= wanted:
                return LEAST_S * 2.0 ** ((bucket + 1) / STEPS_AN_OCTAVE)
        return 0.0


@dataclass(slots=True)
class LinkRecord:
    """What happened on the way to one shard and back since the engine started."""

    latency: Histogram = field(default_factory=Histogram)
    frames: int = 0
    failures: int = 0
    """Steps that were dropped, and run again, because this shard did not answer or not in time."""


class Link(NamedTuple):
    """What status shows of the way to one shard: from sending q to having its state."""

    worker_id: WorkerId
    transport: Transport | None
    """None: not connected now."""
    frames: int
    failures: int
    p50_ms: float
    p99_ms: float
    slow: bool
    """Its median is three times that of the other shards, or more."""


def links(
    records: Mapping[WorkerId, LinkRecord], transports: Mapping[WorkerId, Transport | None]
) -> list[Link]:
    """Of the shards that have answered, or should have."""
    p50_s = {worker: it.latency.quantile_s(0.5) for worker, it in records.items() if it.latency.count}
    found = []
    for worker, it in records.items():
        if not it.frames and not it.failures:
            continue
        mine = p50_s.get(worker, 0.0)
        others = [value for other, value in p50_s.items() if other != worker]
        enough = bool(others) and it.latency.count >= SLOW_LEAST_FRAMES
        found.append(
            Link(
                worker_id=worker,
                transport=transports[worker],
                frames=it.frames,
                failures=it.failures,
                p50_ms=mine * 1e3,
                p99_ms=it.latency.quantile_s(0.99) * 1e3,
                slow=enough and mine >= SLOW_TIMES * median(others),
            )
        )
    return found
