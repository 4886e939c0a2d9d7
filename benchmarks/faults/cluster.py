"""Starts a real ``farshore serve``, observes and freezes its processes, and always ends all of them.

Called by the parts of the faults benchmark, on their event loop. Must not know what is requested of the
server.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore.errors import StartupError
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc, inference_pb2_grpc

READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 45.0
STATUS_DEADLINE_S = 15.0
"""Longer than a call usually takes: the controller waits some seconds for each unresponsive worker, in
series."""
_ADDRESS = re.compile(r"^Farshore .* at (\S+)\s*$")
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
"""The options of every channel: no message limit, so that the server's limit is tested, and no connection
that is shared with other channels."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the server. ``started`` is in clock ticks after boot; with it a reused pid is
    recognised."""

    pid: int
    started: int
    name: str

    @property
    def alive(self) -> bool:
        """Whether the process runs. False for a zombie, and if the pid belongs to another process now."""
        stat = _stat(self.pid)
        return stat is not None and int(stat[19]) == self.started and stat[0] != "Z"

    @property
    def rss_bytes(self) -> int | None:
        """The resident memory, or None if the process has ended."""
        try:
            text = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) * 1024 if found and self.alive else None

    def main_thread_cpu_s(self) -> float:
        """The CPU time of the main thread, in seconds, with nanosecond resolution."""
        run_ns = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]
        return int(run_ns) / 1e9

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def descendants(pid: int) -> dict[int, Process]:
    """The process ``pid`` and all its live descendants, by pid."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found: dict[int, Process] = {}
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        waiting += children.get(each, ())
        stat = _stat(each)
        if stat is not None and stat[0] != "Z":
            found[each] = Process(each, int(stat[19]), _name(each))
    return found


class Server:
    """One running ``farshore serve``; made by :func:`serving`."""

    def __init__(self, address: str, process: asyncio.subprocess.Process, output: list[str]) -> None:
        self.address = address
        self.pid = process.pid
        self._process = process
        self._output = output
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._operators = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)
        self._seen: dict[int, Process] = {}
        self.frozen: list[Process] = []

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    @property
    def last_words(self) -> str:
        return " ".join(line.strip() for line in self._output[-3:]) or "it said nothing"

    def processes(self) -> dict[int, Process]:
        """The server's process and all its live descendants, by pid."""
        found = descendants(self.pid)
        self._seen |= found
        return found

    def gateway(self) -> Process:
        for process in self.processes().values():
            if process.name == "gateway":
                return process
        raise StartupError("the gateway's process is gone")

    async def status(self) -> admin.ClusterStatusResponse:
        """Raises grpc.aio.AioRpcError."""
        return await self._operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=STATUS_DEADLINE_S)

    async def probe(self, *, deadline_s: float = 10.0) -> float:
        """Seconds until the gateway answers a health check, or until the check fails or its deadline
        expires."""
        begun_s = time.perf_counter()
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.health.Check(health_pb2.HealthCheckRequest(service=""), timeout=deadline_s)
        return time.perf_counter() - begun_s

    @contextlib.asynccontextmanager
    async def channel(self, options: Iterable[tuple[str, int]] = ()) -> AsyncIterator[grpc.aio.Channel]:
        """A channel with a connection of its own. The end of the context closes it and breaks its calls
        off."""
        channel = grpc.aio.insecure_channel(self.address, options=[*OPTIONS, *options])
        try:
            yield channel
        finally:
            await channel.close()

    def freeze(self, process: Process) -> None:
        self.frozen.append(process)
        process.send(signal.SIGSTOP)

    def thaw(self) -> None:
        while self.frozen:
            self.frozen.pop().send(signal.SIGCONT)

    async def close(self) -> None:
        """Thaws and ends the server and every process that it has started."""
        self.thaw()
        self.processes()
        await self._channel.close()
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_DEADLINE_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for process in self._seen.values():
            process.send(signal.SIGKILL)


@contextlib.asynccontextmanager
async def serving(*options: str, progress: Callable[[str], None]) -> AsyncIterator[Server]:
    """Runs ``farshore serve --port 0`` with the given options. Raises StartupError.

    ``progress`` receives the server's messages."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "farshore.client.cli.main", "serve", "--port", "0", *options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Ctrl-C interrupts the benchmark only, which then ends the server.
        start_new_session=True,
    )
    output: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    # The server would block on a full pipe.
    drains = [asyncio.create_task(_drain(process.stderr, output, progress))]
    server: Server | None = None
    try:
        address = await _address(process.stdout, output)
        drains.append(asyncio.create_task(_drain(process.stdout, [], None)))
        server = Server(address, process, output)
        server.processes()
        yield server
    finally:
        # A server that did not print its address is ended in the same way.
        await (server or Server("127.0.0.1:1", process, output)).close()
        await asyncio.wait(drains, timeout=STOP_DEADLINE_S)
        for drain in drains:
            drain.cancel()


async def _address(stdout: asyncio.StreamReader, output: list[str]) -> str:
    """The address in the server's first line. Raises StartupError, with the last message in ``output``."""
    try:
        line = (await asyncio.wait_for(stdout.readline(), READY_DEADLINE_S)).decode()
    except TimeoutError:
        line = f"it was not ready within {READY_DEADLINE_S:.0f} s"
    found = _ADDRESS.match(line)
    if found is None:
        raise StartupError(f"farshore serve did not start: {' '.join(output[-1:]).strip() or line.strip()}")
    return found[1]


async def _drain(
    pipe: asyncio.StreamReader, output: list[str], progress: Callable[[str], None] | None
) -> None:
    """Appends each line of ``pipe`` to ``output`` and reports it, until the pipe is closed."""
    while line := await pipe.readline():
        text = line.decode(errors="replace").strip()
        output.append(text)
        if progress is not None and text:
            progress(f"serve: {text[:120]}")


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat, beginning with the state, or None if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _name(pid: int) -> str:
    """The process's name: gateway, serve, or the title of a Ray process as ps shows it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        words = ""
    if "farshore.gateway" in words:
        return "gateway"
    if "farshore.client.cli.main serve" in words:
        return "serve"
    first = words.split(" ")[0]
    return first if first.startswith("ray::") else Path(first).name or "unnamed"
