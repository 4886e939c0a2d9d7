"""Part ``freeze``: one of three attention workers is stopped in mid-stream, for a while and then for good.

Called by ``faults``, which holds what this finds against the bars. The undisturbed tokens come from a second
server behind the first one, which no fault has touched. Must not know the bars.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from farshore.benchmarks.faults.cluster import Process, Server, offers, serving
from farshore.benchmarks.faults.setting import Setting
from farshore.benchmarks.faults.stream import Stream, differs, follow, longest_gap_s
from farshore.errors import StartupError
from farshore.proto import inference_pb2 as api

SERVE = ("--dtype", "float32", "--attention-workers", "3")
GRACE_S = 10.0
NEW_REQUEST_AFTER_S = 0.5
"""From the stop on."""
STREAM_DEADLINE_S = 240.0
CHOOSE_DEADLINE_S = 60.0
FRAMES_DEADLINE_S = 60.0
GOOD_DEADLINE_S = 60.0
"""How long the streams that were hit may take to end, before the thaw comes anyway."""
WHOLE_DEADLINE_S = 60.0
POLL_S = 0.2
PROMPT_TOKENS = (20, 40, 80, 160, 270, 300, 420, 530)
"""One after the other: some fit into a tail, others need a block or two of a shard."""
_VOCAB_TOKENS = range(1000, 40_000)


@dataclass(slots=True)
class Found:
    """What came of it; None where it could not be measured. Streams are *hit* if they had spans there."""

    readers: int | None = None
    frames: int | None = None
    deadline_ms: float | None = None
    streams: list[Stream] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Streams that didn't come to their own end after the short freeze."""
    different: list[str] | None = None
    gap_s: float | None = None
    """The longest of those that were not hit, while and after the worker was frozen."""
    hit_gap_s: float | None = None
    new_first_s: float | None = None
    hit_for_good: int | None = None
    hit_ended_s: float | None = None
    """From the stop to the last end of those hit; None while one had not ended."""
    hit_errors: Counter[str] = field(default_factory=Counter)
    unclear: list[str] | None = None
    """Ends of those hit that were no retryable error with words to it."""
    bystanders_for_good: Counter[str] = field(default_factory=Counter)
    whole_s: float | None = None
    """From the thaw on."""
    missing_bytes: int | None = None


class _Streams:
    """Requests that run, and the sequences that they are in the server's status."""

    def __init__(self, server: Server, at: Setting, first_prompt: int) -> None:
        self._server = server
        self._tokens = at.sizes.stream_tokens
        self._prompt = first_prompt
        self.sequences: dict[str, Stream] = {}
        self.tasks: dict[str, asyncio.Task[Stream]] = {}

    async def start(self) -> None:
        """One more; returns when it has a token and status shows it. Sequences are told apart by which of
        them is new: their ids are the gateway's."""
        before = {sequence.sequence_id for sequence in (await self._server.status()).sequences}
        stream = Stream(str(self._prompt))
        request = prompt_request(self._prompt, self._tokens)
        self._prompt += 1
        task = asyncio.create_task(follow(self._server.stub, request, stream, deadline_s=STREAM_DEADLINE_S))
        begun_s = time.perf_counter()
        while time.perf_counter() - begun_s < CHOOSE_DEADLINE_S:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stream.first.wait(), POLL_S)
            new = {sequence.sequence_id for sequence in (await self._server.status()).sequences} - before
            if stream.ended is not None:
                break
            if len(new) == 1 and stream.tokens:
                self.sequences[name := new.pop()] = stream
                self.tasks[name] = task
                return
        task.cancel()
        raise StartupError(f"a stream did not begin: {stream.ended}: {stream.details[:200]}")

    async def end(self, name: str) -> None:
        """One of them, by its client's leaving."""
        del self.sequences[name]
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.wait({task})

    async def end_all(self) -> None:
        for name in list(self.sequences):
            await self.end(name)

    async def read_from(self) -> dict[str, set[str]]:
        """The sequences, of these, that have spans on each attention worker."""
        status = await self._server.status()
        found = {worker.worker_id: set[str]() for worker in status.workers if worker.kind == "attention"}
        for sequence in status.sequences:
            if sequence.sequence_id in self.sequences:
                for span in sequence.spans:
                    if span.worker_id in found:
                        found[span.worker_id].add(sequence.sequence_id)
        return found

    async def choose(self, wanted: int, *, deadline_s: float = CHOOSE_DEADLINE_S) -> tuple[str, set[str]]:
        """The worker that exactly ``wanted`` of these read from, while all of them run; while there is none,
        one stream makes room for another. At the deadline the worker that comes closest."""
        begun_s = time.perf_counter()
        while True:
            for name in [name for name, stream in self.sequences.items() if stream.ended is not None]:
                await self.end(name)
                await self.start()
            readers = await self.read_from()
            worker = nearest(readers, wanted)
            surplus = len(readers[worker]) - wanted
            running = all(stream.ended is None for stream in self.sequences.values())
            if (not surplus and running) or time.perf_counter() - begun_s > deadline_s:
                return worker, readers[worker]
            if surplus:
                others = [name for name in self.sequences if name not in readers[worker]]
                await self.end((sorted(readers[worker]) if surplus > 0 else others)[0])
                await self.start()


async def measure(at: Setting, found: Found) -> None:
    """Fills ``found`` as it goes, so that what was found before a failure is not lost."""
    grace = ("--shard-grace", f"{GRACE_S:g}") if await offers("--shard-grace") else ()
    async with serving(*SERVE, *grace, progress=at.progress) as server:
        await _freeze(server, at, found)
        await _freeze_for_good(server, at, found)
    at.progress("freeze: the same prompts on a server without faults")
    async with serving(*SERVE, progress=at.progress) as server:
        await _compare(server, at, found)


def prompt_request(number: int, tokens: int) -> api.GenerateRequest:
    """Prompts of several lengths, none of which begins like another; greedy."""
    length = PROMPT_TOKENS[number % len(PROMPT_TOKENS)]
    first, step = _VOCAB_TOKENS[number * 37 % len(_VOCAB_TOKENS)], 13 + number
    ids = [_VOCAB_TOKENS[(first + place * step) % len(_VOCAB_TOKENS)] for place in range(length)]
    sampling = api.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return api.GenerateRequest(tokens=api.TokenIds(ids=ids), sampling=sampling)


def nearest(readers: Mapping[str, set[str]], wanted: int) -> str:
    """The worker whose readers' number comes closest; the first of several. StartupError without workers."""
    if not readers:
        raise StartupError("status shows no attention worker")
    return min(readers, key=lambda worker: (abs(len(readers[worker]) - wanted), worker))


async def _started(server: Server, at: Setting, first_prompt: int) -> _Streams:
    streams = _Streams(server, at, first_prompt)
    for _ in range(at.sizes.sequences):
        await streams.start()
    return streams


async def _freeze(server: Server, at: Setting, found: Found) -> None:
    at.progress(f"freeze: {at.sizes.sequences} streams, half of which shall read from one worker")
    streams = await _started(server, at, 0)
    try:
        worker, hit = await streams.choose(at.sizes.sequences // 2)
        at.progress(f"freeze: {len(hit)} read from {worker}; waiting for {at.sizes.frames} frames to it")
        await _await_frames(server, at, worker, found)
        # Blocks may have moved there meanwhile: chosen anew, which costs nothing if not.
        worker, hit = await streams.choose(at.sizes.sequences // 2)
        await _await_frames(server, at, worker, found)
        found.readers, found.streams = len(hit), list(streams.sequences.values())
        process = await _process_of(server, worker)
        at.progress(f"freeze: {worker} is stopped; deadline in force: {found.deadline_ms} ms")
        stopped_s = time.perf_counter()
        server.freeze(process)
        fresh = asyncio.create_task(_fresh(server, found))
        await asyncio.sleep(max(0.0, at.sizes.frozen_s - (time.perf_counter() - stopped_s)))
        server.thaw()
        at.progress(f"freeze: {worker} goes on")
        await asyncio.wait(streams.tasks.values(), timeout=STREAM_DEADLINE_S)
        await asyncio.wait({fresh}, timeout=STREAM_DEADLINE_S)
    finally:
        server.thaw()
        unended = dict(streams.sequences)
        await streams.end_all()
    for stream in unended.values():
        if not stream.whole:
            found.failed.append(f"stream {stream.name}: {stream.ended or 'cut off'}: {stream.details[:200]}")
    found.gap_s = _longest(unended, hit, stopped_s, was_hit=False)
    found.hit_gap_s = _longest(unended, hit, stopped_s, was_hit=True)


def _longest(streams: Mapping[str, Stream], hit: set[str], from_s: float, *, was_hit: bool) -> float | None:
    """From the stop to each stream's own end; one that failed waited until it did."""
    gaps = [
        longest_gap_s(stream.times_s, first_s=from_s, last_s=_last_s(stream))
        for name, stream in streams.items()
        if (name in hit) == was_hit and _last_s(stream) > from_s
    ]
    return max(gaps, default=None)


def _last_s(stream: Stream) -> float:
    if stream.whole or stream.ended is None:
        return stream.times_s[-1] if stream.times_s else stream.ended_s
    return stream.ended_s


async def _fresh(server: Server, found: Found) -> None:
    """A new request while the worker is frozen."""
    await asyncio.sleep(NEW_REQUEST_AFTER_S)
    stream = Stream("new")
    request = api.GenerateRequest(
        text="The keeper of the lighthouse said", sampling=api.Sampling(max_tokens=8, ignore_eos=True)
    )
    await follow(server.stub, request, stream, deadline_s=STREAM_DEADLINE_S)
    if stream.times_s:
        found.new_first_s = stream.times_s[0] - stream.sent_s


async def _await_frames(server: Server, at: Setting, worker: str, found: Found) -> None:
    """Until the engine has sent this worker so many. What it says of the deadline is kept."""
    begun_s = time.perf_counter()
    while time.perf_counter() - begun_s < FRAMES_DEADLINE_S:
        for dense in (await server.status()).workers:
            for link in dense.links:
                if link.worker_id == worker:
                    found.frames = link.frames
                    found.deadline_ms = getattr(link, "deadline_ms", None) or None
        if (found.frames or 0) >= at.sizes.frames:
            return
        await asyncio.sleep(POLL_S)


async def _process_of(server: Server, worker: str) -> Process:
    processes = server.processes()
    for each in (await server.status()).workers:
        if each.worker_id == worker and each.process_id in processes:
            return processes[each.process_id]
    raise StartupError(f"{worker} has no process here")


async def _freeze_for_good(server: Server, at: Setting, found: Found) -> None:
    at.progress("freeze: for good this time")
    streams = await _started(server, at, 1000)
    try:
        worker, hit = await streams.choose(at.sizes.sequences // 2)
        process = await _process_of(server, worker)
        stopped_s = time.perf_counter()
        server.freeze(process)
        found.hit_for_good = len(hit)
        waiting = [streams.tasks[name] for name in hit if name in streams.tasks]
        if waiting:
            await asyncio.wait(waiting, timeout=GOOD_DEADLINE_S)
        _judge([streams.sequences[name] for name in hit], stopped_s, found)
        found.bystanders_for_good.update(
            stream.ended or "running" for name, stream in streams.sequences.items() if name not in hit
        )
    finally:
        await streams.end_all()
        server.thaw()
    await _await_whole(server, found)


def _judge(hit: Sequence[Stream], stopped_s: float, found: Found) -> None:
    """How those that were hit ended."""
    found.unclear = []
    for stream in hit:
        found.hit_errors[stream.ended or "running"] += 1
        if stream.ended != "UNAVAILABLE" or not stream.details:
            found.unclear.append(f"{stream.ended or 'running'}: {stream.details[:200] or 'no words'}")
    if hit and all(stream.ended is not None for stream in hit):
        found.hit_ended_s = max(stream.ended_s for stream in hit) - stopped_s


async def _await_whole(server: Server, found: Found) -> None:
    """Until every worker answers and nothing is held any more."""
    thawed_s = time.perf_counter()
    while time.perf_counter() - thawed_s < WHOLE_DEADLINE_S:
        with contextlib.suppress(grpc.aio.AioRpcError):
            workers = (await server.status()).workers
            found.missing_bytes = sum(worker.budget_bytes - worker.free_bytes for worker in workers)
            ready = all(worker.state == "ready" and worker.budget_bytes for worker in workers)
            if ready and not found.missing_bytes:
                found.whole_s = time.perf_counter() - thawed_s
                return
        await asyncio.sleep(POLL_S)


async def _compare(server: Server, at: Setting, found: Found) -> None:
    """Each prompt again, all at once: in float32 the tokens don't depend on who is in the batch."""
    undisturbed = [Stream(stream.name) for stream in found.streams]
    requests = [prompt_request(int(stream.name), at.sizes.stream_tokens) for stream in undisturbed]
    async with asyncio.TaskGroup() as group:
        for stream, request in zip(undisturbed, requests, strict=True):
            group.create_task(follow(server.stub, request, stream, deadline_s=STREAM_DEADLINE_S))
    found.different = []
    for stream, wanted in zip(found.streams, undisturbed, strict=True):
        if not wanted.whole:
            raise StartupError(f"undisturbed, a stream ended with {wanted.ended}: {wanted.details[:200]}")
        place = differs(stream.tokens, wanted.tokens)
        if place is not None:
            found.different.append(f"stream {stream.name} at token {place}")
