"""The part of ``farshore bench engines`` that drains attention workers under load.

Called by the catalogue. A real ``farshore serve`` on this machine decodes, and an operator drains the
attention worker with the most KV, several times. The worker that takes its place runs before: on the cores of
one machine the start of a process costs more than the drain. It must not know how spans move.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from random import Random
from typing import NamedTuple

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.engines.streams import Streams, Window
from farshore.benchmarks.faults.cluster import serving
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing, median_if_all
from farshore.client.events import Worker
from farshore.client.sdk import Client
from farshore.errors import DeadlineExceeded, StartupError, TransportError

MOST_DRAIN_S = 60.0
MOST_GAP_TIMES = 2.0
LEAST_RATE_PERCENT = 80.0
DEADLINE_S = 900.0
"""For the prompts' prefill, for a drain, and for one token."""
POLL_S = 0.5
"""Shorter, and the answer would be the last one: asking all workers costs each of them."""
VOCABULARY = 40_000
"""The prompts' token ids are below it."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. Tests use tiny sizes."""

    sequences: int = 16
    prompt_tokens: int = 1600
    """Two workers share a sequence's tokens, each 22.5 KiB: a worker holds some 280 MiB."""
    max_tokens: int = 6000
    """More than are generated meanwhile."""
    least_bytes: int = 256 << 20
    """The KV that a drained worker holds at least."""
    drains: int = 3
    window_s: float = 10.0
    """The length of the times without a drain, one before and one after each drain."""
    workers: int = 2
    """Attention workers between two drains."""
    options: tuple[str, ...] = ("--kv-memory", "1GiB")


class Drain(NamedTuple):
    """One drain, and the times without one before and after it."""

    held_bytes: int
    ended_s: float
    """Seconds until the worker had ended."""
    before: Window
    during: Window
    """Until no sequence read from the worker."""
    after: Window

    @property
    def rate_percent(self) -> float | None:
        """None if a window has no token."""
        before, during, after = (window.tokens_per_s for window in self[2:])
        return 100 * 2 * during / (before + after) if before and during and after else None

    @property
    def gap_times(self) -> float | None:
        """None if a window has too few gaps."""
        during, beside = self.during.p99_gap_s, self.before.and_also(self.after).p99_gap_s
        return during / beside if during and beside else None


def drain_bars(sizes: Sizes, *, progress: Callable[[str], None]) -> Measured:
    """Drains attention workers while sequences decode. Takes some five minutes on two cores. Raises
    StartupError if the cluster or the sequences do not start, or too little KV is held."""
    return asyncio.run(_serve_and_measure(sizes, progress))


async def _serve_and_measure(sizes: Sizes, progress: Callable[[str], None]) -> Measured:
    count = ("--attention-workers", str(sizes.workers))
    async with serving(*sizes.options, *count, progress=progress) as server:
        return await asyncio.to_thread(_measure, server.address, sizes, progress)


def _measure(address: str, sizes: Sizes, progress: Callable[[str], None]) -> Measured:
    draw = Random(19)
    prompts = [
        [draw.randrange(VOCABULARY) for _ in range(sizes.prompt_tokens)] for _ in range(sizes.sequences)
    ]
    with Client(address) as client, Streams(address, prompts, max_tokens=sizes.max_tokens) as streams:
        progress(f"prefilling {sizes.sequences} prompts of {sizes.prompt_tokens} tokens")
        streams.await_tokens(2, deadline_s=DEADLINE_S)
        if streams.failures:
            raise StartupError(f"a request failed before the first drain: {streams.failures[0]}")
        drains = []
        for number in range(1, sizes.drains + 1):
            progress(f"drain {number} of {sizes.drains}")
            drains.append(_drain(client, streams, sizes, progress))
        if streams.finished:
            raise StartupError(f"{streams.finished} requests ended before the last drain did")
        return report(drains, failures=streams.failures)


def report(drains: Sequence[Drain], *, failures: Sequence[str]) -> Measured:
    """The result and the bars of these drains. ``failures``: the errors of the requests that failed."""
    ended = Timing(tuple(drain.ended_s for drain in drains))
    figures = {
        "held_bytes": [drain.held_bytes for drain in drains],
        "moved_s": [drain.during.seconds for drain in drains],
        "tokens_per_s": [[window.tokens_per_s for window in drain[2:]] for drain in drains],
        "p99_gap_ms": [[_ms(window.p99_gap_s) for window in drain[2:]] for drain in drains],
    }
    note = f"median of {len(drains)} drains, against the times before and after each"
    bars = [
        Bar.at_most("drain: longest", max(ended.samples_s), MOST_DRAIN_S, "s", "until the worker has ended"),
        Bar.at_most("drain: failed requests", len(failures), 0, "requests", " ".join(failures[:1])),
        Bar.at_most(
            "drain: p99 gap between tokens",
            median_if_all(drain.gap_times for drain in drains),
            MOST_GAP_TIMES,
            "times that without",
            note,
        ),
        Bar.at_least(
            "drain: tokens/s",
            median_if_all(drain.rate_percent for drain in drains),
            LEAST_RATE_PERCENT,
            "% of those without",
            note,
        ),
    ]
    return [Result("drain of an attention worker", ended, figures)], bars


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _drain(client: Client, streams: Streams, sizes: Sizes, progress: Callable[[str], None]) -> Drain:
    """Adds an attention worker, and drains the one that holds the most KV."""
    client.scale(attention=sizes.workers + 1)
    _until(lambda: sizes.workers + 1 == sum(each.state == "ready" for each in _attention_workers(client)))
    before = streams.during(lambda: _watch(client, sizes.window_s), deadline_s=DEADLINE_S)
    victim, held_bytes = max(_read_bytes(client).items(), key=itemgetter(1))
    if held_bytes < sizes.least_bytes:
        raise StartupError(f"{victim} holds {held_bytes} bytes of KV, not {sizes.least_bytes}")
    begun_s = time.perf_counter()
    client.drain(victim)
    client.scale(attention=sizes.workers)
    during = streams.during(lambda: _until(lambda: _is_free(client, victim)), deadline_s=DEADLINE_S)
    _until(lambda: victim not in (each.worker_id for each in _attention_workers(client)))
    ended_s = time.perf_counter() - begun_s
    progress(f"moved {held_bytes >> 20} MiB in {during.seconds:.1f} s, ended after {ended_s:.1f} s")
    after = streams.during(lambda: _watch(client, sizes.window_s), deadline_s=DEADLINE_S)
    return Drain(held_bytes, ended_s, before, during, after)


def _attention_workers(client: Client) -> list[Worker]:
    return [worker for worker in client.status().workers if worker.kind == "attention"]


def _read_bytes(client: Client) -> dict[str, int]:
    """The bytes of KV that sequences read from each worker from which any is read."""
    read = Counter[str]()
    for sequence in client.status().sequences:
        for span in sequence.spans:
            read[span.worker_id] += span.bytes
    return dict(read)


def _is_free(client: Client, worker: str) -> bool:
    """Whether no sequence reads from the worker; false while the engine does not say."""
    read = _read_bytes(client)
    return bool(read) and worker not in read


def _watch(client: Client, seconds: float) -> None:
    """Asks as often as during a drain, so that the asking is in every window."""
    end_s = time.perf_counter() + seconds
    _until(lambda: bool(_read_bytes(client)) and time.perf_counter() >= end_s)


def _until(condition: Callable[[], bool]) -> None:
    """Waits until ``condition()`` is true; while the cluster does not answer it is not. Raises
    DeadlineExceeded after DEADLINE_S."""
    end_s = time.perf_counter() + DEADLINE_S
    while time.perf_counter() < end_s:
        with suppress(TransportError):
            if condition():
                return
        time.sleep(POLL_S)
    raise DeadlineExceeded(f"the cluster did not get there within {DEADLINE_S:g} s")
