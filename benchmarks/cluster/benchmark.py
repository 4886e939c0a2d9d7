"""``farshore bench cluster``: what the loss of workers or of the controller costs, and the time to scale.

A real ``farshore serve`` on this machine, with real kills; three nodes that share nothing but a network; and
the controller's loop over a thousand workers that are not real. Called by the catalogue.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from signal import SIGCONT, SIGKILL, SIGSTOP
from statistics import quantiles
from typing import Self

from farshore.benchmarks.cluster import three_nodes
from farshore.benchmarks.cluster.fake import FakeWorkers
from farshore.benchmarks.faults.cluster import Process, Server, serving
from farshore.benchmarks.machine import Facts
from farshore.benchmarks.report import Bar, Report, Result
from farshore.benchmarks.timing import Timing
from farshore.client.events import Finished, Token
from farshore.client.sdk import Client
from farshore.controller.desired import Desired
from farshore.controller.events import Events
from farshore.controller.loop.loop import ROUND_S, Loop
from farshore.defaults import DRAIN_TIMEOUT_S
from farshore.errors import FarshoreError, StartupError
from farshore.kvstore.directory.embedded import EmbeddedDirectory

DEADLINE_S = 120.0
POLL_S = 0.05
PROMPT_TOKENS = 900
"""Enough blocks for three attention workers: a short sequence goes to few."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    fake_workers: int = 1000
    fake_rounds: int = 200
    frozen_s: float = 30.0
    stream_tokens: int = 8000


def run(facts: Facts, sizes: Sizes, *, only: str, progress: Callable[[str], None]) -> Report:
    """Measures the parts ``loop``, ``live`` and ``nodes`` whose name contains ``only``."""
    results: list[Result] = []
    bars: list[Bar] = []
    if only in "loop":
        progress(f"rounds of the controller over {sizes.fake_workers} workers")
        timing = _fake_rounds(sizes)
        results.append(Result("reconcile", timing))
        p99_s = quantiles(timing.samples_s, n=100, method="inclusive")[98]
        bars.append(Bar.at_most("round_p99", p99_s * 1e3, 100, "ms"))
    if only in "live":
        bars += asyncio.run(_live(sizes, progress))
    if only in "nodes":
        bars += asyncio.run(three_nodes.run(progress))
    return Report(asdict(facts), tuple(results), tuple(bars))


def _fake_rounds(sizes: Sizes) -> Timing:
    """Times of rounds while a tenth of the workers is lost at once and replaced. Raises StartupError if
    the desired state is not reached."""
    now_s = 0.0

    def clock() -> float:
        return now_s

    directory = EmbeddedDirectory(clock=clock)
    workers = FakeWorkers()
    loop = Loop(
        desired=Desired(
            {"dense": 1, "attention": sizes.fake_workers},
            controller="bench",
            load=lambda: None,
            store=lambda state: None,
            placement="offload",
            restarted=False,
        ),
        directory=directory,
        launcher=workers,
        probes=workers,
        events=Events(),
        grace_s=10.0,
        drain_timeout_s=DRAIN_TIMEOUT_S,
        clock=clock,
    )
    times_s = []
    for number in range(sizes.fake_rounds):
        if number == sizes.fake_rounds // 4:
            workers.lose(lambda slot: slot.kind == "attention" and slot.index % 10 == 3)
        workers.announce(directory)
        began_s = time.perf_counter()
        loop.round()
        times_s.append(time.perf_counter() - began_s)
        now_s += ROUND_S
    if len(directory.listing().workers) != sizes.fake_workers + 1:
        raise StartupError("the loop did not replace what was lost")
    return Timing(tuple(times_s))


async def _live(sizes: Sizes, progress: Callable[[str], None]) -> list[Bar]:
    async with serving("--kv-memory", "256MiB", progress=progress) as server:
        with Client(server.address) as client:
            return [
                *await _controller_killed(server, client, sizes, progress),
                *await _controller_frozen(server, client, sizes, progress),
                await _worker_killed(server, client, progress),
                await _scaled(client, progress),
            ]


async def _controller_killed(
    server: Server, client: Client, sizes: Sizes, progress: Callable[[str], None]
) -> list[Bar]:
    progress("killing the controller during a stream")
    before = await _worker_ids(client)
    async with _Streaming(client, sizes) as stream:
        for controller in _controllers(server):
            controller.send(SIGKILL)
        killed_s = time.perf_counter()
        answered_s = await asyncio.to_thread(_first_token_s, client)
        await _until(lambda: set(client_workers(client)) == before)
        back_s = time.perf_counter() - killed_s
        await asyncio.sleep(2.0)
    started = sum(event.kind == "started" for event in client.watch_events())
    return [
        Bar.at_most("controller_killed_token_gap", stream.longest_gap_ms(), 250, "ms"),
        Bar.at_most("controller_killed_new_request", answered_s, 5, "s", "its first token"),
        Bar.at_most("controller_killed_back", back_s, 5, "s", "status shows all workers"),
        Bar.at_most("controller_killed_started", started, 0, "workers"),
        Bar.at_most("controller_killed_failed", stream.failed, 0, "streams"),
    ]


async def _controller_frozen(
    server: Server, client: Client, sizes: Sizes, progress: Callable[[str], None]
) -> list[Bar]:
    progress(f"freezing the controller for {sizes.frozen_s:g} s")
    before = await _worker_ids(client)
    await asyncio.to_thread(_cached_tokens, client)
    kept_tokens = await asyncio.to_thread(_cached_tokens, client)
    if not kept_tokens:
        raise StartupError("the cluster found nothing of a prompt that it had stored")
    async with _Streaming(client, sizes) as stream:
        controllers = _controllers(server)
        for controller in controllers:
            controller.send(SIGSTOP)
        await asyncio.sleep(sizes.frozen_s)
        for controller in controllers:
            controller.send(SIGCONT)
        await asyncio.sleep(10.0)
        replaced = len(before - await _worker_ids(client))
    found_tokens = await asyncio.to_thread(_cached_tokens, client)
    return [
        Bar.at_most("controller_frozen_replaced", replaced, 0, "workers"),
        Bar.at_most("controller_frozen_token_gap", stream.longest_gap_ms(), 250, "ms"),
        Bar.at_most("controller_frozen_failed", stream.failed, 0, "streams"),
        Bar.at_least("controller_frozen_kv_found", found_tokens, kept_tokens, "tokens", "of a prompt's KV"),
    ]


async def _worker_killed(server: Server, client: Client, progress: Callable[[str], None]) -> Bar:
    progress("killing an attention worker")
    before = await _worker_ids(client)
    victim = next(worker for worker in client.status().workers if worker.kind == "attention")
    server.processes()[victim.process_id].send(SIGKILL)
    return Bar.at_most(
        "worker_killed_replaced", await _used_after_s(client, before), 8, "s", "answers frames"
    )


async def _scaled(client: Client, progress: Callable[[str], None]) -> Bar:
    progress("adding an attention worker")
    before = await _worker_ids(client)
    client.scale(attention=3)
    return Bar.at_most("scaled_up_used", await _used_after_s(client, before), 6, "s", "by a new sequence")


async def _used_after_s(client: Client, before: set[str]) -> float:
    """Seconds until a new sequence reads from an attention worker that is not in ``before``. None is sent
    before such a worker is ready: its prefill would take the cores that the worker starts on."""
    began_s = time.perf_counter()
    number = 0

    def used() -> bool:
        nonlocal number
        if set(client_workers(client)) <= before:
            return False
        number += 1
        prompt = [1000 + (number * 7919 + token) % 30_000 for token in range(PROMPT_TOKENS)]
        ends = [e for e in client.generate(token_ids=prompt, max_tokens=2) if isinstance(e, Finished)]
        return any(
            shard.attended_bytes and shard.worker_id not in before
            for end in ends
            for shard in end.shards
            if shard.worker_id.startswith("attention")
        )

    await _until(used)
    return time.perf_counter() - began_s


class _Streaming:
    """A long answer, read by a thread during the context. It is not resumed after a loss.

    ``failed``, after the context: how many streams failed in it, 0 or 1."""

    def __init__(self, client: Client, sizes: Sizes) -> None:
        self._failed = False
        self._times_s: list[float] = []
        self._client = Client(client.address, resume_s=0)
        self._stream = self._client.generate("One, two,", max_tokens=sizes.stream_tokens, ignore_eos=True)
        self._reading = threading.Thread(target=self._read)

    def _read(self) -> None:
        try:
            for event in self._stream:
                if isinstance(event, Token):
                    self._times_s.append(time.perf_counter())
        except FarshoreError:
            self._failed = True

    async def __aenter__(self) -> Self:
        self._reading.start()
        await _until(lambda: len(self._times_s) > 10)
        self._begun_s = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Raises StartupError if the answer was too short for the context."""
        self._ended_s = time.perf_counter()
        running, self.failed = self._reading.is_alive(), int(self._failed)
        self._client.close()
        await asyncio.to_thread(self._reading.join)
        if not running and not self.failed:
            raise StartupError("the stream ended by itself: it measured nothing")

    def longest_gap_ms(self) -> float:
        """During the context, from its begin to the first token and from the last token to its end
        included."""
        during_s = [at_s for at_s in self._times_s if self._begun_s < at_s < self._ended_s]
        return 1e3 * max(
            after - before for before, after in pairwise([self._begun_s, *during_s, self._ended_s])
        )


def _first_token_s(client: Client) -> float:
    began_s = time.perf_counter()
    for event in client.generate("Three, four,", max_tokens=4):
        if isinstance(event, Token):
            return time.perf_counter() - began_s
    raise StartupError("a request gave no token")


def _cached_tokens(client: Client) -> int:
    """Asks a prompt, always the same one. Returns how many of its tokens the cluster had."""
    prompt = [2000 + token * 7919 % 30_000 for token in range(PROMPT_TOKENS)]
    return client.generate(token_ids=prompt, max_tokens=1).result().finished.cached_tokens


async def _worker_ids(client: Client) -> set[str]:
    return set(await asyncio.to_thread(client_workers, client))


def client_workers(client: Client) -> list[str]:
    """The ids of the workers that are ready."""
    return [worker.worker_id for worker in client.status().workers if worker.state == "ready"]


def _controllers(server: Server) -> list[Process]:
    return [
        process for process in server.processes().values() if process.name.startswith("ray::ControllerActor")
    ]


async def _until(condition: Callable[[], bool]) -> None:
    """Waits until ``condition()``, called in a thread, is true. An error counts as false. Raises StartupError
    after DEADLINE_S."""
    end_s = time.perf_counter() + DEADLINE_S
    while time.perf_counter() < end_s:
        with contextlib.suppress(FarshoreError):
            if await asyncio.to_thread(condition):
                return
        await asyncio.sleep(POLL_S)
    raise StartupError(f"the cluster did not get there within {DEADLINE_S:g} s")
