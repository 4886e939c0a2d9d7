"""Part ``hostile``: sends hostile requests while ordinary streams, the bystanders, run beside them.

Called by ``faults.benchmark``, which compares the findings with the bars. Must not know the bars.
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
from farshore.benchmarks.faults.stream import ClientStream, Tokens, differs, follow
from farshore.errors import StartupError
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api

SERVE = ("--dtype", "float32", "--kv-memory", "64MiB")
RSS_FROM_REQUEST = 500
"""The request, of ``ISSUE_REQUESTS``, before which memory is measured first."""
REQUEST_DEADLINE_S = 240.0
"""The deadline for one hostile request, from its first byte to its end."""
BYSTANDER_DEADLINE_S = 600.0
QUIET_DEADLINE_S = 60.0
"""How long all memory may take to be freed: longer than a request lives without a reader."""
WATCH_S = 2.0
REPORT_S = 10.0
MOST_BYSTANDER_FAILURES = 40
"""After this many failures the server is considered dead, and the part ends early."""
PROMPTS = (
    "The capital of France is",
    "Write a short poem about the sea and the lamp of a lighthouse keeper.\n\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE",
)


@dataclass(slots=True)
class HostileFindings:
    """The findings of part ``hostile``. None: not measured."""

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
    """In percent, by process."""
    times_s: list[float] = field(default_factory=list)


async def measure(setting: Setting, found: HostileFindings) -> None:
    """Runs the part. Fills ``found`` step by step, so that a failure does not lose earlier findings."""
    async with serving(*SERVE, progress=setting.progress) as server:
        setting.progress("hostile: the bystanders' undisturbed runs")
        undisturbed = [
            await _undisturbed(server, number, setting) for number in range(setting.sizes.bystanders)
        ]
        dead = asyncio.Event()
        processes = await _named(server)
        setting.progress(f"hostile: {setting.sizes.requests} requests of seed {setting.seed}")
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(_report(setting, found)),
                group.create_task(_watch(processes, dead, found)),
            ]
            done = asyncio.Event()
            bystanders = [
                group.create_task(_bystand(server, number, setting, undisturbed[number], found, done, dead))
                for number in range(setting.sizes.bystanders)
            ]
            await _send_all(server, setting, found, processes, dead)
            done.set()
            await asyncio.wait(bystanders)
            for helper in helpers:
                helper.cancel()
        found.exits = _exits(server, processes)
        setting.progress("hostile: waiting for all memory to come back")
        await _settle(server, found)
        _compare_rss(found)


def bystander(number: int, tokens: int) -> api.GenerateRequest:
    """A greedy request, so that its answer is always the same."""
    text = PROMPTS[number % len(PROMPTS)]
    sampling = api.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return api.GenerateRequest(text=text, sampling=sampling)


async def _undisturbed(server: Server, number: int, setting: Setting) -> Tokens:
    stream = ClientStream(f"bystander {number}")
    request = bystander(number, setting.sizes.bystander_tokens)
    await follow(server.stub, request, stream, deadline_s=BYSTANDER_DEADLINE_S)
    if not stream.is_complete:
        raise StartupError(f"a bystander alone ended with {stream.ended}: {stream.details[:200]}")
    return tuple(stream.tokens)


async def _bystand(
    server: Server,
    number: int,
    setting: Setting,
    undisturbed: Tokens,
    found: HostileFindings,
    done: asyncio.Event,
    dead: asyncio.Event,
) -> None:
    """Repeats a bystander's request until ``done`` or ``dead``; records failures and differences."""
    request = bystander(number, setting.sizes.bystander_tokens)
    while not done.is_set() and not dead.is_set():
        stream = ClientStream(f"bystander {number}")
        await follow(server.stub, request, stream, deadline_s=BYSTANDER_DEADLINE_S)
        found.bystander_runs += 1
        if not stream.is_complete:
            found.bystander_failures.append(f"{stream.name}: {stream.ended}: {stream.details[:200]}")
            if len(found.bystander_failures) >= MOST_BYSTANDER_FAILURES:
                found.stopped = found.stopped or "the bystanders failed again and again"
                dead.set()
            # Avoids a tight loop if the server refuses at once.
            await asyncio.sleep(0.5)
            continue
        index = differs(stream.tokens, undisturbed)
        if index is not None:
            found.bystander_differences.append(f"{stream.name} at token {index}")


async def _send_all(
    server: Server,
    setting: Setting,
    found: HostileFindings,
    processes: dict[str, Process],
    dead: asyncio.Event,
) -> None:
    waiting = deal(setting.seed, setting.sizes.requests)
    rss_from = setting.sizes.requests * RSS_FROM_REQUEST // ISSUE_REQUESTS

    async def send(requests: Iterator[Hostile]) -> None:
        for hostile in requests:
            if dead.is_set():
                return
            if hostile.number == rss_from:
                found.rss_before = _rss(server, processes)
            await _send(server, hostile, found)

    senders = [asyncio.create_task(send(waiting)) for _ in range(setting.sizes.concurrency)]
    stop = asyncio.create_task(dead.wait())
    everything = asyncio.gather(*senders)
    await asyncio.wait({everything, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not everything.done():
        everything.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await everything


async def _send(server: Server, hostile: Hostile, found: HostileFindings) -> None:
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


async def _report(setting: Setting, found: HostileFindings) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        setting.progress(
            f"hostile: {len(found.times_s)} of {setting.sizes.requests} ended, {found.generated} generated; "
            f"bystanders: {found.bystander_runs} runs, {len(found.bystander_failures)} failed, "
            f"{len(found.bystander_differences)} differ"
        )


async def _watch(processes: dict[str, Process], dead: asyncio.Event, found: HostileFindings) -> None:
    while True:
        await asyncio.sleep(WATCH_S)
        gone = [name for name, process in processes.items() if not process.alive]
        if gone:
            found.stopped = f"{', '.join(gone)} ended"
            dead.set()
            return


async def _named(server: Server) -> dict[str, Process]:
    """The server's processes by name: a worker's id, else the process's title, numbered if several share
    it."""
    running, processes = server.processes(), dict[str, Process]()
    workers = {worker.process_id: worker.worker_id for worker in (await server.status()).workers}
    for pid, process in sorted(running.items()):
        name = workers.get(pid, process.name)
        count = sum(other.partition(" #")[0] == name for other in processes)
        processes[f"{name} #{count + 1}" if count else name] = process
    return processes


def _exits(server: Server, processes: dict[str, Process]) -> list[str]:
    gone = [name for name, process in processes.items() if not process.alive]
    return gone if server.exit_code is None else [*gone, f"serve with code {server.exit_code}"]


async def _settle(server: Server, found: HostileFindings) -> None:
    """Polls status until all memory is free and no sequence is left, or QUIET_DEADLINE_S."""
    begun_s = time.perf_counter()
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            status = await server.status()
            workers: list[Any] = list(status.workers)
            found.held_bytes = sum(worker.budget_bytes - worker.free_bytes for worker in workers)
            found.sequences_left = len(status.sequences)
            dense = [worker for worker in workers if worker.kind == admin.WORKER_KIND_DENSE]
            parkings = [getattr(worker, "parkings", None) for worker in dense]
            known = [count for count in parkings if count is not None]
            found.parkings = sum(known) if known else None
            if not found.held_bytes and not found.sequences_left:
                found.quiet_s = time.perf_counter() - begun_s
                return
        if time.perf_counter() - begun_s > QUIET_DEADLINE_S:
            return
        await asyncio.sleep(0.5)


def _rss(server: Server, processes: dict[str, Process]) -> dict[str, tuple[Process, int]]:
    sizes = {name: (process, process.rss_bytes) for name, process in processes.items()}
    return {name: (process, size) for name, (process, size) in sizes.items() if size}


def _compare_rss(found: HostileFindings) -> None:
    for name, (process, before) in found.rss_before.items():
        after = process.rss_bytes
        if after is not None:
            found.rss_growth[name] = 100 * (after - before) / before
