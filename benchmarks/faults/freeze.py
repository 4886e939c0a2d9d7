"""Part ``freeze``: stops one of three attention workers during streams, first for a while, then for good.

Called by ``faults.benchmark``, which compares the findings with the bars. The undisturbed tokens come from a
second server, started after the first one, in which nothing is frozen. Must not know the bars.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from farshore.benchmarks.faults.cluster import Process, Server, serving
from farshore.benchmarks.faults.setting import Setting
from farshore.benchmarks.faults.stream import ClientStream, differs, follow, longest_gap_s
from farshore.errors import StartupError
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api

SERVE = ("--dtype", "float32", "--attention-workers", "3")
GRACE_S = 10.0
NEW_REQUEST_AFTER_S = 0.5
"""After the worker is stopped."""
STREAM_DEADLINE_S = 240.0
CHOOSE_DEADLINE_S = 60.0
FRAMES_DEADLINE_S = 60.0
AFFECTED_DEADLINE_S = 60.0
"""How long affected streams may take to end, before the worker is thawed anyway."""
RECOVERY_DEADLINE_S = 60.0
POLL_S = 0.2
PROMPT_TOKENS = (20, 40, 80, 160, 270, 300, 420, 530)
"""The lengths of successive prompts: some fit into a tail, others need a block or two in a shard."""
_VOCAB_TOKENS = range(1000, 40_000)


@dataclass(slots=True)
class FreezeFindings:
    """The findings of part ``freeze``. None: not measured.

    A stream is *affected* if its sequence has spans in the stopped worker. ``*_for_good`` are of the second
    stop."""

    readers: int | None = None
    frames: int | None = None
    deadline_ms: float | None = None
    streams: list[ClientStream] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Streams that did not complete after the first stop, with their errors."""
    different: list[str] | None = None
    gap_s: float | None = None
    """The longest gap of the unaffected streams, from the first stop on."""
    affected_gap_s: float | None = None
    new_first_s: float | None = None
    affected_for_good: int | None = None
    affected_ended_s: float | None = None
    """From the second stop to the end of the last affected stream; None if one did not end."""
    affected_errors: Counter[str] = field(default_factory=Counter)
    unclear: list[str] | None = None
    """Ends of affected streams other than a retryable error with a message."""
    bystanders_for_good: Counter[str] = field(default_factory=Counter)
    recovered_s: float | None = None
    """From the thaw until all memory is free."""
    missing_bytes: int | None = None


class _Streams:
    """The running streams, by the ids of their sequences in the server's status."""

    def __init__(self, server: Server, setting: Setting, first_prompt: int) -> None:
        self._server = server
        self._tokens = setting.sizes.stream_tokens
        self._prompt = first_prompt
        self.sequences: dict[str, ClientStream] = {}
        self.tasks: dict[str, asyncio.Task[ClientStream]] = {}

    async def start(self) -> None:
        """Starts one more stream; returns when it has a token and status shows its sequence.

        The gateway makes the sequence's id, so the stream's sequence is the one that is new in status. Raises
        StartupError if the stream ends or does not begin."""
        before = {sequence.sequence_id for sequence in (await self._server.status()).sequences}
        stream = ClientStream(str(self._prompt))
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
        """Ends a stream by cancelling its client."""
        del self.sequences[name]
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.wait({task})

    async def end_all(self) -> None:
        for name in list(self.sequences):
            await self.end(name)

    async def read_from(self) -> dict[str, set[str]]:
        """Per attention worker, the sequences of these streams that have spans there."""
        status = await self._server.status()
        attention = [each for each in status.workers if each.kind == admin.WORKER_KIND_ATTENTION]
        found = {worker.worker_id: set[str]() for worker in attention}
        for sequence in status.sequences:
            if sequence.sequence_id in self.sequences:
                for span in sequence.spans:
                    if span.worker_id in found:
                        found[span.worker_id].add(sequence.sequence_id)
        return found

    async def choose(self, wanted: int, *, deadline_s: float = CHOOSE_DEADLINE_S) -> tuple[str, set[str]]:
        """Finds a worker from which exactly ``wanted`` streams read while all streams run.

        Replaces streams one at a time until there is such a worker. Returns (worker, the sequences that read
        from it); after ``deadline_s``, of the worker whose number of readers is closest."""
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


async def measure(setting: Setting, found: FreezeFindings) -> None:
    """Runs the part. Fills ``found`` step by step, so that a failure does not lose earlier findings."""
    async with serving(*SERVE, "--shard-grace", f"{GRACE_S:g}", progress=setting.progress) as server:
        await _freeze(server, setting, found)
        await _freeze_for_good(server, setting, found)
    setting.progress("freeze: the same prompts on a server without faults")
    async with serving(*SERVE, progress=setting.progress) as server:
        await _compare(server, setting, found)


def prompt_request(number: int, tokens: int) -> api.GenerateRequest:
    """A greedy request for ``tokens`` tokens. Prompts differ in length, and begin unlike each other."""
    length = PROMPT_TOKENS[number % len(PROMPT_TOKENS)]
    first, step = _VOCAB_TOKENS[number * 37 % len(_VOCAB_TOKENS)], 13 + number
    ids = [_VOCAB_TOKENS[(first + index * step) % len(_VOCAB_TOKENS)] for index in range(length)]
    sampling = api.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return api.GenerateRequest(tokens=api.TokenIds(ids=ids), sampling=sampling)


def nearest(readers: Mapping[str, set[str]], wanted: int) -> str:
    """The worker whose number of readers is closest to ``wanted``; the first by id if several are.

    Raises StartupError if there are no workers."""
    if not readers:
        raise StartupError("status shows no attention worker")
    return min(readers, key=lambda worker: (abs(len(readers[worker]) - wanted), worker))


async def _started(server: Server, setting: Setting, first_prompt: int) -> _Streams:
    streams = _Streams(server, setting, first_prompt)
    for _ in range(setting.sizes.sequences):
        await streams.start()
    return streams


async def _freeze(server: Server, setting: Setting, found: FreezeFindings) -> None:
    setting.progress(f"freeze: {setting.sizes.sequences} streams, half of which shall read from one worker")
    streams = await _started(server, setting, 0)
    try:
        worker, affected = await streams.choose(setting.sizes.sequences // 2)
        setting.progress(
            f"freeze: {len(affected)} read from {worker}; waiting for {setting.sizes.frames} frames to it"
        )
        await _await_frames(server, setting, worker, found)
        # Hand-offs may have moved blocks to this worker meanwhile, so the choice is repeated.
        worker, affected = await streams.choose(setting.sizes.sequences // 2)
        await _await_frames(server, setting, worker, found)
        found.readers, found.streams = len(affected), list(streams.sequences.values())
        process = await _process_of(server, worker)
        setting.progress(f"freeze: {worker} is stopped; deadline in force: {found.deadline_ms} ms")
        stopped_s = time.perf_counter()
        server.freeze(process)
        fresh = asyncio.create_task(_fresh(server, found))
        await asyncio.sleep(max(0.0, setting.sizes.frozen_s - (time.perf_counter() - stopped_s)))
        server.thaw()
        setting.progress(f"freeze: {worker} goes on")
        await asyncio.wait(streams.tasks.values(), timeout=STREAM_DEADLINE_S)
        await asyncio.wait({fresh}, timeout=STREAM_DEADLINE_S)
    finally:
        server.thaw()
        unended = dict(streams.sequences)
        await streams.end_all()
    for stream in unended.values():
        if not stream.is_complete:
            found.failed.append(f"stream {stream.name}: {stream.ended or 'cut off'}: {stream.details[:200]}")
    found.gap_s = _longest(unended, affected, stopped_s, was_affected=False)
    found.affected_gap_s = _longest(unended, affected, stopped_s, was_affected=True)


def _longest(
    streams: Mapping[str, ClientStream], affected: set[str], from_s: float, *, was_affected: bool
) -> float | None:
    """The longest gap of the affected or unaffected streams from ``from_s`` to their ends, in seconds.

    A stream that failed counts until its error."""
    gaps = [
        longest_gap_s(stream.times_s, first_s=from_s, last_s=_last_s(stream))
        for name, stream in streams.items()
        if (name in affected) == was_affected and _last_s(stream) > from_s
    ]
    return max(gaps, default=None)


def _last_s(stream: ClientStream) -> float:
    if stream.is_complete or stream.ended is None:
        return stream.times_s[-1] if stream.times_s else stream.ended_s
    return stream.ended_s


async def _fresh(server: Server, found: FreezeFindings) -> None:
    """Sends a new request while the worker is frozen, and records the time to its first token."""
    await asyncio.sleep(NEW_REQUEST_AFTER_S)
    stream = ClientStream("new")
    request = api.GenerateRequest(
        text="The keeper of the lighthouse said", sampling=api.Sampling(max_tokens=8, ignore_eos=True)
    )
    await follow(server.stub, request, stream, deadline_s=STREAM_DEADLINE_S)
    if stream.times_s:
        found.new_first_s = stream.times_s[0] - stream.sent_s


async def _await_frames(server: Server, setting: Setting, worker: str, found: FreezeFindings) -> None:
    """Waits until the engine has sent ``sizes.frames`` frames to the worker, or FRAMES_DEADLINE_S.

    Records their number and the link's deadline."""
    begun_s = time.perf_counter()
    while time.perf_counter() - begun_s < FRAMES_DEADLINE_S:
        for dense in (await server.status()).workers:
            for link in dense.links:
                if link.worker_id == worker:
                    found.frames = link.frames
                    found.deadline_ms = getattr(link, "deadline_ms", None) or None
        if (found.frames or 0) >= setting.sizes.frames:
            return
        await asyncio.sleep(POLL_S)


async def _process_of(server: Server, worker: str) -> Process:
    processes = server.processes()
    for each in (await server.status()).workers:
        if each.worker_id == worker and each.process_id in processes:
            return processes[each.process_id]
    raise StartupError(f"{worker} has no process here")


async def _freeze_for_good(server: Server, setting: Setting, found: FreezeFindings) -> None:
    setting.progress("freeze: for good this time")
    streams = await _started(server, setting, 1000)
    try:
        worker, affected = await streams.choose(setting.sizes.sequences // 2)
        process = await _process_of(server, worker)
        stopped_s = time.perf_counter()
        server.freeze(process)
        found.affected_for_good = len(affected)
        waiting = [streams.tasks[name] for name in affected if name in streams.tasks]
        if waiting:
            await asyncio.wait(waiting, timeout=AFFECTED_DEADLINE_S)
        _judge([streams.sequences[name] for name in affected], stopped_s, found)
        found.bystanders_for_good.update(
            stream.ended or "running" for name, stream in streams.sequences.items() if name not in affected
        )
    finally:
        await streams.end_all()
        server.thaw()
    await _await_recovery(server, found)


def _judge(affected: Sequence[ClientStream], stopped_s: float, found: FreezeFindings) -> None:
    """Records how the affected streams ended."""
    found.unclear = []
    for stream in affected:
        found.affected_errors[stream.ended or "running"] += 1
        if stream.ended != "UNAVAILABLE" or not stream.details:
            found.unclear.append(f"{stream.ended or 'running'}: {stream.details[:200] or 'no words'}")
    if affected and all(stream.ended is not None for stream in affected):
        found.affected_ended_s = max(stream.ended_s for stream in affected) - stopped_s


async def _await_recovery(server: Server, found: FreezeFindings) -> None:
    """Waits until every worker is ready and all memory is free, or RECOVERY_DEADLINE_S."""
    thawed_s = time.perf_counter()
    while time.perf_counter() - thawed_s < RECOVERY_DEADLINE_S:
        with contextlib.suppress(grpc.aio.AioRpcError):
            workers = (await server.status()).workers
            found.missing_bytes = sum(worker.budget_bytes - worker.free_bytes for worker in workers)
            states = {worker.state for worker in workers if worker.budget_bytes}
            ready = states == {admin.WORKER_STATE_READY} and all(worker.budget_bytes for worker in workers)
            if ready and not found.missing_bytes:
                found.recovered_s = time.perf_counter() - thawed_s
                return
        await asyncio.sleep(POLL_S)


async def _compare(server: Server, setting: Setting, found: FreezeFindings) -> None:
    """Runs each prompt again and records differences. All run at once: in float32 tokens do not depend on the
    batch."""
    undisturbed = [ClientStream(stream.name) for stream in found.streams]
    requests = [prompt_request(int(stream.name), setting.sizes.stream_tokens) for stream in undisturbed]
    async with asyncio.TaskGroup() as group:
        for stream, request in zip(undisturbed, requests, strict=True):
            group.create_task(follow(server.stub, request, stream, deadline_s=STREAM_DEADLINE_S))
    found.different = []
    for stream, wanted in zip(found.streams, undisturbed, strict=True):
        if not wanted.is_complete:
            raise StartupError(f"undisturbed, a stream ended with {wanted.ended}: {wanted.details[:200]}")
        index = differs(stream.tokens, wanted.tokens)
        if index is not None:
            found.different.append(f"stream {stream.name} at token {index}")
