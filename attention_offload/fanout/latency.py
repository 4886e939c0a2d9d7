"""How long shards take to answer: a histogram for each, cheap enough to feed with every frame; and which of
them are slow.

From the same records comes each shard's deadline. Fed by the channels, shown by the engine's Status. It must
not know what a frame is.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import log2
from statistics import median
from typing import NamedTuple

from farshore.attention_offload.transport.frames import MOST_DEADLINE_S
from farshore.ids import WorkerId

STEPS_AN_OCTAVE = 4
"""A bucket ends 19% above where it begins."""
LEAST_S = 1e-6
OCTAVES = 27
"""Up to 134 s, above every deadline."""
MOST_BUCKET = OCTAVES * STEPS_AN_OCTAVE
WINDOW_FRAMES = 4096
"""Percentiles are of the newest one to two windows: a link that was slow is forgotten."""

SLOW_TIMES = 3.0
SLOW_LEAST_FRAMES = 100
SLOW_LEAST_S = 200e-6
"""Below, a shard's hop may be three times another's for its transport alone."""
RECENT_FRAMES = 256
"""A dozen steps of 30 layers: what is slow now."""
WORK_SMOOTHING = 1 / 8
PAST_WORK_SMOOTHING = 1 / 128
"""Of the work a step brings, over as many steps as the histograms hold."""

LEAST_DEADLINE_S = 0.1
DEADLINE_TIMES = 4.0
"""Of the time that a frame is expected to take."""
DEADLINE_LEAST_FRAMES = 1000
"""Seen of a shard, before its deadline follows from them."""

_LOG = logging.getLogger(__name__)


class Histogram:
    """Written by one thread; others may ask meanwhile, and see a frame or two less."""

    def __init__(self, window_frames: int = WINDOW_FRAMES) -> None:
        self._window_frames = window_frames
        self._newest = [0] * (MOST_BUCKET + 1)
        self._before = list(self._newest)
        self._in_window = 0
        self.count = 0

    def add(self, *buckets: int) -> None:
        """Frames whose times lie in these, a few at a time; see :func:`bucket`."""
        if self._in_window >= self._window_frames:
            self._before, self._newest = self._newest, [0] * len(self._newest)
            self._in_window = 0
        for it in buckets:
            self._newest[it] += 1
        self._in_window += len(buckets)
        self.count += len(buckets)

    def quantile_s(self, share: float) -> float:
        """The upper end of the bucket that the quantile lies in; 0 where nothing has been added."""
        counts = [a + b for a, b in zip(self._newest, self._before, strict=True)]
        below, wanted = 0, share * sum(counts)
        for it, count in enumerate(counts):
            below += count
            if count and below >= wanted:
                return LEAST_S * 2.0 ** ((it + 1) / STEPS_AN_OCTAVE)
        return 0.0


def bucket(seconds: float) -> int:
    return min(int(log2(seconds / LEAST_S) * STEPS_AN_OCTAVE), MOST_BUCKET) if seconds > LEAST_S else 0


@dataclass(slots=True)
class LinkRecord:
    """What happened on the way to one shard and back since the engine started."""

    latency: Histogram = field(default_factory=Histogram)
    recent: Histogram = field(default_factory=lambda: Histogram(RECENT_FRAMES))
    frames: int = 0
    failures: int = 0
    """How often this shard did not answer, or not in time: its part was read from replicas then, or the step
    dropped and run again."""
    work: float = 0.0
    """What a step asks of it, in any unit that is the same for every shard; smoothed."""
    past_work: float = 0.0
    deadline_s: float = MOST_DEADLINE_S
    """In force: of the step under way, or the last one."""
    _median_s: float = 0.0
    _median_at: int = 0
    """Frames that were seen when the median was taken."""

    def expect(self, work: float) -> None:
        """A step begins that asks ``work`` of it with each frame. Sets the deadline of these."""
        if self.frames - self._median_at >= RECENT_FRAMES:
            self._median_s, self._median_at = self.latency.quantile_s(0.5), self.frames
        self.deadline_s = frame_deadline_s(self.frames, self._median_s * _more(work, self.past_work))
        self.work += (work - self.work) * (WORK_SMOOTHING if self.work else 1.0)
        self.past_work += (work - self.past_work) * (PAST_WORK_SMOOTHING if self.past_work else 1.0)

    def answered(self, *times_s: float) -> None:
        """Some frames, at most a step's."""
        buckets = [bucket(seconds) for seconds in times_s]
        self.latency.add(*buckets)
        self.recent.add(*buckets)


def frame_deadline_s(frames: int, expected_s: float) -> float:
    """Of a shard that has answered ``frames`` so far, and should take ``expected_s`` for the next one."""
    if frames < DEADLINE_LEAST_FRAMES:
        return MOST_DEADLINE_S
    return min(LEAST_DEADLINE_S + DEADLINE_TIMES * expected_s, MOST_DEADLINE_S)


class Link(NamedTuple):
    """What status shows of the way to one shard: from sending q to having its state."""

    worker_id: WorkerId
    transport: str
    """What carries frames, and KV where that is another; empty: not connected now."""
    frames: int
    failures: int
    p50_ms: float
    p99_ms: float
    deadline_ms: float
    """In force: an answer that takes longer is late."""
    slow: bool
    """It takes three times as long as it used to, or as the other shards take, for as much work."""


def links(records: Mapping[WorkerId, LinkRecord], transports: Mapping[WorkerId, str]) -> list[Link]:
    """Of the shards that have answered, or should have."""
    return [
        Link(
            worker_id=worker,
            transport=transports[worker],
            frames=it.frames,
            failures=it.failures,
            p50_ms=it.latency.quantile_s(0.5) * 1e3,
            p99_ms=it.latency.quantile_s(0.99) * 1e3,
            deadline_ms=it.deadline_s * 1e3,
            slow=_is_slow(it, [other for other in records.values() if other is not it]),
        )
        for worker, it in records.items()
        if it.frames or it.failures
    ]


def _is_slow(it: LinkRecord, others: Iterable[LinkRecord]) -> bool:
    """A frame's time is at most what another took, times the work that this one has more."""
    now_s = it.recent.quantile_s(0.5)
    if it.recent.count < SLOW_LEAST_FRAMES or now_s < SLOW_LEAST_S:
        return False
    past_s = it.latency.quantile_s(0.5) * _more(it.work, it.past_work)
    peers_s = [
        other.recent.quantile_s(0.5) * _more(it.work, other.work) for other in others if other.recent.count
    ]
    return now_s >= SLOW_TIMES * past_s or (bool(peers_s) and now_s >= SLOW_TIMES * median(peers_s))


def _more(work: float, other: float) -> float:
    return max(1.0, work / other) if other else 1.0


class SlowShards:
    """Logs when a shard becomes slow, and when it is no more."""

    def __init__(self) -> None:
        self._slow: set[WorkerId] = set()

    def look(self, found: Iterable[Link]) -> None:
        for link in found:
            if link.slow and link.worker_id not in self._slow:
                self._slow.add(link.worker_id)
                _LOG.warning(
                    "attention worker %s is slow: it takes %g times as long as before, or as the others;"
                    " the median was %.3g ms. Is its host overloaded, or the way there?",
                    link.worker_id,
                    SLOW_TIMES,
                    link.p50_ms,
                )
            elif not link.slow and link.worker_id in self._slow:
                self._slow.remove(link.worker_id)
                _LOG.info("attention worker %s is as fast as before", link.worker_id)
