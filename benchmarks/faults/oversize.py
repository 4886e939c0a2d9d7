"""Parts ``tokenize`` and ``refuse``: sends very long prompts and oversize messages to the gateway.

Called by ``faults.benchmark``, which compares the findings with the bars. Must not know the bars.
"""

import asyncio
import json
import shutil
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from farshore.benchmarks.faults.cluster import Process, Server, serving
from farshore.benchmarks.faults.sender import CASES
from farshore.benchmarks.faults.setting import Setting
from farshore.benchmarks.faults.stream import ClientStream, follow, longest_gap_s
from farshore.errors import ModelError, StartupError
from farshore.models.files.source import DEMO, resolve
from farshore.proto import inference_pb2 as api
from farshore.proto import inference_pb2_grpc

POSITIONS = 2_000_000
TOKENIZE_SERVE = ("--dtype", "float32", "--kv-format", "int4", "--kv-memory", "4GiB")
"""Memory for 500,000 tokens, so that neither length nor memory refuses the prompts. The pages stay
untouched."""
REFUSE_SERVE = ("--dtype", "float32", "--kv-memory", "64MiB")
PROBE_EVERY_S = 0.01
TOKENIZE_DEADLINE_S = 180.0
SENDER_DEADLINE_S = 120.0
IDLE_S = 2.0
"""How long only probes run, before and between measurements."""
_TEXT = Path(__file__).parents[1] / "texts" / "alice.txt"


@dataclass(slots=True)
class TokenizeFindings:
    """The findings of part ``tokenize``. None: not measured."""

    probes_s: list[float] = field(default_factory=list)
    idle_probes_s: list[float] = field(default_factory=list)
    gap_s: float | None = None
    accepted: int | None = None
    """The number of long prompts that were tokenized; each was then cancelled."""
    refused: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    took_s: float | None = None


@dataclass(slots=True)
class RefuseFindings:
    """The findings of part ``refuse`` for one oversize request; each list has one entry per sending."""

    answers: list[str] = field(default_factory=list)
    loop_s: list[float] = field(default_factory=list)
    """The CPU time of the event loop's thread, less that of the probes."""
    delay_s: list[float] = field(default_factory=list)
    """The longest wait of a probe meanwhile."""
    took_s: list[float] = field(default_factory=list)


async def tokenize(setting: Setting, found: TokenizeFindings) -> None:
    """Fills ``found`` with the times of probes and of a stream while long prompts are tokenized."""
    with tempfile.TemporaryDirectory(prefix="farshore-faults-") as folder:
        model = _with_positions(Path(folder), POSITIONS)
        async with serving(*TOKENIZE_SERVE, "--model", str(model), progress=setting.progress) as server:
            await _tokenize(server, setting, found)


async def _tokenize(server: Server, setting: Setting, found: TokenizeFindings) -> None:
    text = _TEXT.read_text(encoding="utf-8")
    requests = [
        api.GenerateRequest(
            text=long_text(text, number, setting.sizes.prompt_chars), sampling=api.Sampling(max_tokens=1)
        )
        for number in range(setting.sizes.prompts)
    ]
    beside = ClientStream("beside")
    sampling = api.Sampling(max_tokens=4000, temperature=0.0, ignore_eos=True)
    task = asyncio.create_task(
        follow(
            server.stub,
            api.GenerateRequest(text="Once upon a time", sampling=sampling),
            beside,
            deadline_s=2 * TOKENIZE_DEADLINE_S,
        )
    )
    try:
        await asyncio.wait_for(beside.first.wait(), TOKENIZE_DEADLINE_S)
        if beside.ended is not None:
            raise StartupError(f"the stream beside ended with {beside.ended}: {beside.details[:200]}")
        found.idle_probes_s = await _probing(server, asyncio.create_task(asyncio.sleep(IDLE_S)))
        setting.progress(
            f"tokenize: {setting.sizes.prompts} prompts of {setting.sizes.prompt_chars} characters"
        )
        begun_s = time.perf_counter()
        sent = asyncio.gather(*(_accepted(server, request, found) for request in requests))
        found.probes_s = await _probing(server, sent)
        found.took_s = time.perf_counter() - begun_s
        found.accepted = sum(await sent)
        found.gap_s = longest_gap_s(beside.times_s, first_s=begun_s, last_s=begun_s + found.took_s)
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _accepted(server: Server, request: api.GenerateRequest, found: TokenizeFindings) -> bool:
    """Sends a prompt and cancels it when it has been tokenized, before its prefill. Returns whether it was
    accepted.

    It uses its own connection: on a shared one probes would wait for the prompt's bytes."""
    stream = ClientStream("long")
    async with server.channel([("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        task = asyncio.create_task(follow(stub, request, stream, deadline_s=TOKENIZE_DEADLINE_S))
        call = asyncio.create_task(stream.accepted.wait())
        await asyncio.wait({task, call}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        await asyncio.wait({task})
    if stream.accepted_s is None:
        found.refused.append(f"{stream.ended}: {stream.details[:200]}")
        return False
    return True


async def _probing(server: Server, until: "asyncio.Future[object]") -> list[float]:
    """Sends a probe every 10 ms until ``until`` is done. Returns the probes' times in seconds."""
    probes: list[asyncio.Task[float]] = []
    next_s = time.perf_counter()
    while not until.done():
        probes.append(asyncio.create_task(server.probe()))
        next_s = max(next_s + PROBE_EVERY_S, time.perf_counter())
        await asyncio.sleep(next_s - time.perf_counter())
    return list(await asyncio.gather(*probes))


def long_text(text: str, number: int, chars: int) -> str:
    """A prompt of ``chars`` characters that begins unlike any other. Every fourth one is a single word, or
    contains non-ASCII characters; the others are prose."""
    if number % 8 == 3:
        return ("ab" * (chars // 2 + 1))[:chars]
    if number % 8 == 7:
        return ("día über 北京 🎉 " * (chars // 14 + 1))[:chars]
    turned = text[number * 997 :] + text[: number * 997]
    return (f"{number}. " + turned * (chars // len(turned) + 1))[:chars]


def _with_positions(folder: Path, positions: int) -> Path:
    """Writes a copy of the demo model to ``folder``, with ``positions`` in its GGUF header."""
    source = resolve(DEMO).path
    copy = folder / source.name
    shutil.copyfile(source, copy)
    key = b"llama.context_length"
    # GGUF stores a key's length, the key, its type (4: uint32) and its value, little-endian.
    before = struct.pack("<Q", len(key)) + key + struct.pack("<I", 4)
    with copy.open("r+b") as file:
        beginning = file.read(1 << 20)
        offset = beginning.find(before)
        if offset < 0:
            raise ModelError(f"{source}: no {key.decode()} at the beginning")
        file.seek(offset + len(before))
        file.write(struct.pack("<I", positions))
    return copy


async def refuse(setting: Setting, found: dict[str, RefuseFindings]) -> None:
    """Sends each oversize message several times. Fills ``found``, by the case's name."""
    async with serving(*REFUSE_SERVE, progress=setting.progress) as server:
        gateway = server.gateway()
        for case in CASES:
            case_found = found.setdefault(case, RefuseFindings())
            for _ in range(setting.sizes.refusals):
                setting.progress(f"refuse: {case}")
                await _refuse(server, gateway, case, case_found)


async def _refuse(server: Server, gateway: Process, case: str, found: RefuseFindings) -> None:
    """Sends one oversize message from another process: building and sending 64 MiB would delay the probes
    here."""
    idle_cpu_s, begun_s = gateway.main_thread_cpu_s(), time.perf_counter()
    await _probing(server, asyncio.create_task(asyncio.sleep(IDLE_S)))
    idle_rate = (gateway.main_thread_cpu_s() - idle_cpu_s) / (time.perf_counter() - begun_s)
    sender = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "farshore.benchmarks.faults.sender", server.address, case),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert sender.stdin is not None and sender.stdout is not None
        await asyncio.wait_for(sender.stdout.readline(), SENDER_DEADLINE_S)
        cpu_s, begun_s = gateway.main_thread_cpu_s(), time.perf_counter()
        sender.stdin.write(b"\n")
        line = asyncio.create_task(sender.stdout.readline())
        probes_s = await _probing(server, asyncio.create_task(asyncio.wait_for(line, SENDER_DEADLINE_S)))
        took_s = time.perf_counter() - begun_s
        answer = json.loads(await line)
        found.answers.append(f"{answer['code']}: {answer['details'][:120]}")
        found.loop_s.append(max(0.0, gateway.main_thread_cpu_s() - cpu_s - idle_rate * took_s))
        found.delay_s.append(max(probes_s, default=0.0))
        found.took_s.append(answer["took_s"])
    finally:
        if sender.returncode is None:
            sender.kill()
        await sender.wait()
