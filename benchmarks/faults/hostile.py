"""Part ``hostile``: bystanders stream while hostile requests come, and must notice nothing of them.

Called by ``faults``, which holds what this finds against the bars. Must not know the bars.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from farshore.benchmarks.faults.client import behave
from farshore.benchmarks.faults.cluster import Process, Server, serving
from farshore.benchmarks.faults.requests import Hostile, deal
from farshore.benchmarks.faults.setting import ISSUE_REQUESTS, Setting
from farshore.benchmarks.faults.stream import Stream, Tokens, differs, follow
from farshore.errors import StartupError
from farshore.proto import inference_pb2 as api

SERVE = ("--dtype", "float32", "--kv-memory", "64MiB")
RSS_FROM_REQUEST = 500
"""Of ``ISSUE_REQUESTS``: memory is compared from there on."""
REQUEST_DEADLINE_S = 240.0
"""For one hostile request, from its first byte to its end."""
BYSTANDER_DEADLINE_S = 600.0
QUIET_DEADLINE_S = 60.0
"""For all memory to be back: longer than a request lives on without a reader."""
WATCH_S = 2.0
REPORT_S = 10.0
MOST_BYSTANDER_FAILURES = 40
"""Behind them the server is taken for dead, and the part ends early."""
PROMPTS = (
    "The capital of France is",
    "Write a short poem about the sea and the lamp of a lighthouse keeper.\n\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE",
)


@dataclass(slots=True)
class Found:
    """What came of it; None where it could not be measured."""

    seed: int
    sent: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    generated: int = 0
    bystander_runs: int = 0
    bystander_failures: list[str] = field(default_factory=list)
    bystander_differences: list[str] = field(default_factory=list)
    exits: list[str] | None = None
    stopped: str = ""
    parkings: int | None = None
    held_bytes: int | None = None
    sequences_left: int | None = None
    quiet_s: float | None = None
    rss_before: dict[str, tuple[Process, int]] = field(default_factory=dict)
    rss_growth: dict[str, float] = field(default_factory=dict)
    """By process, in percent."""
    times_s: list[float] = field(default_factory=list)


async def measure(at: Setting, found: Found) -> None:
    """Fills ``found`` as it goes, so that what was found before a failure is not lost."""
    async with serving(*SERVE, progress=at.progress) as server:
        at.progress("hostile: the bystanders' undisturbed runs")
        undisturbed = [await _undisturbed(server, number, at) for number in range(at.sizes.bystanders)]
        dead = asyncio.Event()
        parts = await _named(server)
        at.progress(f"hostile: {at.sizes.requests} requests of seed {at.seed}")
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(_report(at, found)), group.create_task(_watch(parts, dead, found))]
            done = asyncio.Event()
            bystanders = [
                group.create_task(_bystand(server, number, at, undisturbed[number], found, done, dead))
                for number in range(at.sizes.bystanders)
            ]
            await _send_all(server, at, found, parts, dead)
            done.set()
            await asyncio.wait(bystanders)
            for helper in helpers:
                helper.cancel()
        found.exits = _exits(server, parts)
        at.progress("hostile: waiting for all memory to come back")
        await _settle(server, found)
        _compare_rss(found)


def bystander(number: int, tokens: int) -> api.GenerateRequest:
    """Greedy, so that the answer is always the same."""
    text = PROMPTS[number % len(PROMPTS)]
    sampling = api.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return api.GenerateRequest(text=text, sampling=sampling)


async def _undisturbed(server: Server, number: int, at: Setting) -> Tokens:
    stream = Stream(f"bystander {number}")
    request = bystander(number, at.sizes.bystander_tokens)
    await follow(server.stub, request, stream, deadline_s=BYSTANDER_DEADLINE_S)
    if not stream.whole:
        raise StartupError(f"a bystander alone ended with {stream.ended}: {stream.details[:200]}")
    return tuple(stream.tokens)


async def _bystand(
    server: Server,
    number: int,
    at: Setting,
    undisturbed: Tokens,
    found: Found,
    done: asyncio.Event,
    dead: asyncio.Event,
) -> None:
    """The same request over and over, for as long as hostile ones come."""
    request = bystander(number, at.sizes.bystander_tokens)
    while not done.is_set() and not dead.is_set():
        stream = Stream(f"bystander {number}")
        await follow(server.stub, request, stream, deadline_s=BYSTANDER_DEADLINE_S)
        found.bystander_runs += 1
        if not stream.whole:
            found.bystander_failures.append(f"{stream.name}: {stream.ended}: {stream.details[:200]}")
            if len(found.bystander_failures) >= MOST_BYSTANDER_FAILURES:
                found.stopped = found.stopped or "the bystanders failed again and again"
                dead.set()
            # A server that refuses at once is not asked in a tight loop.
            await asyncio.sleep(0.5)
            continue
        place = differs(stream.tokens, undisturbed)
        if place is not None:
            found.bystander_differences.append(f"{stream.name} at token {place}")


async def _send_all(
    server: Server, at: Setting, found: Found, parts: dict[str, Process], dead: asyncio.Event
) -> None:
    waiting = deal(at.seed, at.sizes.requests)
    rss_from = at.sizes.requests * RSS_FROM_REQUEST // ISSUE_REQUESTS

    async def send(requests: Iterator[Hostile]) -> None:
        for hostile in requests:
            if dead.is_set():
                return
            if hostile.number == rss_from:
                found.rss_before = _rss(server, parts)
            await _send(server, hostile, found)

    senders = [asyncio.create_task(send(waiting)) for _ in range(at.sizes.concurrency)]
    stop = asyncio.create_task(dead.wait())
    everything = asyncio.gather(*senders)
    await asyncio.wait({everything, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not everything.done():
        everything.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await everything


async def _send(server: Server, hostile: Hostile, found: Found) -> None:
    kind, begun_s = str(hostile.kind), time.perf_counter()
    outcomes = found.outcomes.setdefault(kind, Counter())
    found.sent[kind] += 1
    tokens = 0
    try:
        async with asyncio.timeout(REQUEST_DEADLINE_S):
            outcome, tokens = await behave(server, hostile)
    except TimeoutError:
        outcome = "late"
    except grpc.aio.AioRpcError as error:
        outcome = error.code().name
    except OSError as error:
        outcome = type(error).__name__
    outcomes[outcome] += 1
    found.generated += tokens > 0
    found.times_s.append(time.perf_counter() - begun_s)


async def _report(at: Setting, found: Found) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        at.progress(
            f"hostile: {len(found.times_s)} of {at.sizes.requests} ended, {found.generated} generated; "
            f"bystanders: {found.bystander_runs} runs, {len(found.bystander_failures)} failed, "
            f"{len(found.bystander_differences)} differ"
        )


async def _watch(parts: dict[str, Process], dead: asyncio.Event, found: Found) -> None:
    while True:
        await asyncio.sleep(WATCH_S)
        gone = [name for name, process in parts.items() if not process.alive]
        if gone:
            found.stopped = f"{', '.join(gone)} ended"
            dead.set()
            return


async def _named(server: Server) -> dict[str, Process]:
    """The server's processes by name: workers by their ids, each other one by its title and, where several
    share one, by a number."""
    running, parts = server.processes(), dict[str, Process]()
    workers = {worker.process_id: worker.worker_id for worker in (await server.status()).workers}
    for pid, process in sorted(running.items()):
        name = workers.get(pid, process.name)
        count = sum(other.partition(" #")[0] == name for other in parts)
        parts[f"{name} #{count + 1}" if count else name] = process
    return parts


def _exits(server: Server, parts: dict[str, Process]) -> list[str]:
    gone = [name for name, process in parts.items() if not process.alive]
    return gone if server.exit_code is None else [*gone, f"serve with code {server.exit_code}"]


async def _settle(server: Server, found: Found) -> None:
    """Asks until nothing is held any more, or the deadline."""
    begun_s = time.perf_counter()
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            status = await server.status()
            workers: list[Any] = list(status.workers)
            found.held_bytes = sum(worker.budget_bytes - worker.free_bytes for worker in workers)
            found.sequences_left = len(status.sequences)
            told = [getattr(worker, "parkings", None) for worker in workers if worker.kind == "dense"]
            found.parkings = sum(each for each in told if each is not None) if told != [None] else None
            if not found.held_bytes and not found.sequences_left:
                found.quiet_s = time.perf_counter() - begun_s
                return
        if time.perf_counter() - begun_s > QUIET_DEADLINE_S:
            return
        await asyncio.sleep(0.5)


def _rss(server: Server, parts: dict[str, Process]) -> dict[str, tuple[Process, int]]:
    sizes = {name: (process, process.rss_bytes) for name, process in parts.items()}
    return {name: (process, size) for name, (process, size) in sizes.items() if size is not None}


def _compare_rss(found: Found) -> None:
    for name, (process, before) in found.rss_before.items():
        after = process.rss_bytes
        if after is not None:
            found.rss_growth[name] = 100 * (after - before) / before
