"""Records how long each shard takes to answer, sets the deadlines of its frames, and detects slow shards.

Called by the channels for every frame, by ``fanout`` for deadlines and warnings, and by the engine for its
Status. Recording is cheap: a latency is counted in a histogram. It must not know what a frame contains.
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
"""The number of buckets in a factor of two: the upper end of a bucket is 19% above its lower end."""
LEAST_S = 1e-6
"""The lower end of the first bucket, which also counts shorter latencies."""
OCTAVES = 27
"""The range of the histogram ends at 134 s, above every deadline."""
MOST_BUCKET = OCTAVES * STEPS_AN_OCTAVE
WINDOW_FRAMES = 4096
"""Quantiles cover the newest one to two windows of frames, so that old latencies are forgotten."""

SLOW_TIMES = 3.0
"""A shard is slow if it takes this many times as long as expected."""
SLOW_LEAST_FRAMES = 100
"""The number of recent frames without which no shard counts as slow."""
SLOW_LEAST_S = 200e-6
"""A shard with a shorter median is never slow: its hop may take three times another's because of its
transport alone."""
RECENT_FRAMES = 256
"""The window of the recent latencies: about a dozen steps of 30 layers."""
WORK_SMOOTHING = 1 / 8
"""The weight of a new step in the smoothed work."""
PAST_WORK_SMOOTHING = 1 / 128
"""The weight of a new step in the smoothed past work. It averages over about as many steps as the latency
histogram holds."""

LEAST_DEADLINE_S = 0.1
DEADLINE_TIMES = 4.0
"""A frame's deadline is LEAST_DEADLINE_S plus this many times the time that the frame is expected to take."""
DEADLINE_LEAST_FRAMES = 1000
"""The number of answered frames from which a shard's deadline is derived from its latencies."""

_LOG = logging.getLogger(__name__)


class Histogram:
    """Counts latencies in exponential buckets. One thread writes; other threads may read at the same time and
    then miss a frame or two."""

    def __init__(self, window_frames: int = WINDOW_FRAMES) -> None:
        self._window_frames = window_frames
        self._newest = [0] * (MOST_BUCKET + 1)
        self._before = list(self._newest)
        self._in_window = 0
        self.count = 0

    def add(self, *buckets: int) -> None:
        """Counts one frame in each of ``buckets``, which are results of :func:`bucket`."""
        if self._in_window >= self._window_frames:
            self._before, self._newest = self._newest, [0] * len(self._newest)
            self._in_window = 0
        for index in buckets:
            self._newest[index] += 1
        self._in_window += len(buckets)
        self.count += len(buckets)

    def quantile_s(self, share: float) -> float:
        """The upper end, in seconds, of the bucket in which the quantile ``share`` (0 to 1) lies. 0 if
        nothing was added."""
        counts = [a + b for a, b in zip(self._newest, self._before, strict=True)]
        below, wanted = 0, share * sum(counts)
        for index, count in enumerate(counts):
            below += count
            if count and below >= wanted:
                return LEAST_S * 2.0 ** ((index + 1) / STEPS_AN_OCTAVE)
        return 0.0


def bucket(seconds: float) -> int:
    """The index of the bucket for a latency. A latency outside the range counts in the first or last
    bucket."""
    return min(int(log2(seconds / LEAST_S) * STEPS_AN_OCTAVE), MOST_BUCKET) if seconds > LEAST_S else 0


@dataclass(slots=True)
class LinkRecord:
    """The frames to one shard since the engine started."""

    latency: Histogram = field(default_factory=Histogram)
    """The latencies of the last one to two WINDOW_FRAMES."""
    recent: Histogram = field(default_factory=lambda: Histogram(RECENT_FRAMES))
    """The latencies of the last one to two RECENT_FRAMES."""
    frames: int = 0
    """The number of frames that the shard has answered."""
    failures: int = 0
    """How often the shard did not answer in time. Each time, replicas were read instead, or the step was
    dropped and run again."""
    work: float = 0.0
    """The smoothed work of a frame, in a unit that is the same for all shards."""
    past_work: float = 0.0
    """The same, averaged over more steps."""
    deadline_s: float = MOST_DEADLINE_S
    """The deadline of the frames of the current step, or of the last one."""
    _median_s: float = 0.0
    """The median of ``latency``, renewed every RECENT_FRAMES frames."""
    _median_at: int = 0
    """The value of ``frames`` when the median was computed."""

    def expect(self, work: float) -> None:
        """Begins a step whose frames ask for ``work`` each, and sets ``deadline_s`` for them."""
        if self.frames - self._median_at >= RECENT_FRAMES:
            self._median_s, self._median_at = self.latency.quantile_s(0.5), self.frames
        self.deadline_s = frame_deadline_s(self.frames, self._median_s * _work_ratio(work, self.past_work))
        self.work += (work - self.work) * (WORK_SMOOTHING if self.work else 1.0)
        self.past_work += (work - self.past_work) * (PAST_WORK_SMOOTHING if self.past_work else 1.0)

    def answered(self, *times_s: float) -> None:
        """Adds the latencies of answered frames."""
        buckets = [bucket(seconds) for seconds in times_s]
        self.latency.add(*buckets)
        self.recent.add(*buckets)


def frame_deadline_s(frames: int, expected_s: float) -> float:
    """The deadline of a frame to a shard that has answered ``frames`` frames and is expected to take
    ``expected_s`` for this one."""
    if frames < DEADLINE_LEAST_FRAMES:
        return MOST_DEADLINE_S
    return min(LEAST_DEADLINE_S + DEADLINE_TIMES * expected_s, MOST_DEADLINE_S)


class Link(NamedTuple):
    """The state of the link to one shard, as Status shows it. A latency is the time from sending q to
    receiving the shard's state."""

    worker_id: WorkerId
    transport: str
    """The transport of hot frames, and that of bulk KV if it is another. Empty while not connected."""
    frames: int
    failures: int
    p50_ms: float
    p99_ms: float
    deadline_ms: float
    """The current deadline of a frame; a later answer is late."""
    slow: bool
    """Whether the shard takes SLOW_TIMES as long as in the past, or as the other shards, for equal work."""


def links(records: Mapping[WorkerId, LinkRecord], transports: Mapping[WorkerId, str]) -> list[Link]:
    """The links to the shards that have answered or failed at least once."""
    return [
        Link(
            worker_id=worker,
            transport=transports[worker],
            frames=record.frames,
            failures=record.failures,
            p50_ms=record.latency.quantile_s(0.5) * 1e3,
            p99_ms=record.latency.quantile_s(0.99) * 1e3,
            deadline_ms=record.deadline_s * 1e3,
            slow=_is_slow(record, [other for other in records.values() if other is not record]),
        )
        for worker, record in records.items()
        if record.frames or record.failures
    ]


def _is_slow(record: LinkRecord, others: Iterable[LinkRecord]) -> bool:
    """Reports whether the recent median latency is at least SLOW_TIMES the shard's own past median, or the
    median of the other shards, each scaled by the work ratio if this shard now has more work."""
    now_s = record.recent.quantile_s(0.5)
    if record.recent.count < SLOW_LEAST_FRAMES or now_s < SLOW_LEAST_S:
        return False
    past_s = record.latency.quantile_s(0.5) * _work_ratio(record.work, record.past_work)
    others_s = [
        other.recent.quantile_s(0.5) * _work_ratio(record.work, other.work)
        for other in others
        if other.recent.count
    ]
    return now_s >= SLOW_TIMES * past_s or (bool(others_s) and now_s >= SLOW_TIMES * median(others_s))


def _work_ratio(work: float, other: float) -> float:
    """``work`` divided by ``other``, but at least 1; 1 if ``other`` is 0."""
    return max(1.0, work / other) if other else 1.0


class SlowShards:
    """Logs each shard that becomes slow, and each that is no longer slow. Not thread-safe."""

    def __init__(self) -> None:
        self._slow: set[WorkerId] = set()

    def look(self, current: Iterable[Link]) -> None:
        """Compares the links with those of the last call and logs the changes."""
        for link in current:
            if link.slow and link.worker_id not in self._slow:
                self._slow.add(link.worker_id)
                _LOG.warning(
                    "attention worker %s is slow: it takes %g times as long as before, or as the others;"
                    " the median was %.3g ms. Is its host overloaded, or the network to it?",
                    link.worker_id,
                    SLOW_TIMES,
                    link.p50_ms,
                )
            elif not link.slow and link.worker_id in self._slow:
                self._slow.remove(link.worker_id)
                _LOG.info("attention worker %s is as fast as before", link.worker_id)
