"""Measures what a token costs in the gateway, and how long it takes through it, against an empty server.

Called by ``gateway.benchmark`` for each face. The gateway is a real process in front of one scripted engine;
clients and servers are processes of their own. Must not know the bars, nor how streams are made.
"""

import base64
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from farshore import rpc
from farshore.benchmarks.faults.stream import percentile
from farshore.benchmarks.gateway.engine import script
from farshore.benchmarks.gateway.load import Messages
from farshore.benchmarks.gateway.pace import sent
from farshore.benchmarks.gateway.processes import Process, running
from farshore.benchmarks.gateway.setting import Setting, Sizes
from farshore.benchmarks.timing import median_if_all
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.models.files.source import DEMO, resolve
from farshore.models.tokenizer.load import load_tokenizer
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.proto import inference_pb2 as api

_PACKAGE = "farshore.benchmarks.gateway"


@dataclass(slots=True)
class Found:
    """The figures of one server, from all rounds."""

    cpu_s: list[float | None] = field(default_factory=list)
    """CPU seconds per token, of each round; None: no token came in the window."""
    delays_s: list[float] = field(default_factory=list)
    """From the sending of a token to its receipt, within the windows."""
    lost: int = 0
    errors: list[str] = field(default_factory=list)

    def delay_ms(self, percent: float) -> float | None:
        """This percentile of the delays; None: no token came in any window."""
        delay_s = percentile(self.delays_s, percent)
        return None if delay_s is None else 1e3 * delay_s

    @property
    def cpu_us(self) -> float | None:
        """The median of the rounds; None unless all were measured."""
        cpu_s = median_if_all(self.cpu_s)
        return None if cpu_s is None else 1e6 * cpu_s


def measure(face: str, setting: Setting) -> tuple[Found, Found]:
    """The figures of the gateway and of the empty server. ``face``: of the streams, ``grpc`` or ``http``."""
    with tempfile.TemporaryDirectory(prefix="farshore-bench-") as folder:
        return _Part(face, setting, Path(folder)).run()


class _Part:
    def __init__(self, face: str, setting: Setting, folder: Path) -> None:
        self._face = face
        self._sizes = setting.sizes
        self._progress = setting.progress
        self._folder = folder
        self._texts = _texts(setting.sizes)
        self._next = 1

    def run(self) -> tuple[Found, Found]:
        gateway, empty = Found(), Found()
        messages = self._folder / "messages"
        with contextlib.ExitStack() as stack:
            engine_log = self._folder / "engine.log"
            address, process = stack.enter_context(self._gateway(engine_log))
            first = self._round(address, process, engine_log, Found())  # Not counted: it warms up.
            _of(self._face, first[0]).write(messages)
            empty_log = self._folder / "empty.log"
            options = ("--face", self._face, "--messages", str(messages), *self._pace(empty_log))
            peer = stack.enter_context(running(f"{_PACKAGE}.empty", *options))
            for number in range(self._sizes.rounds):
                self._progress(f"{self._face}: round {number + 1} of {self._sizes.rounds}")
                self._round(address, process, engine_log, gateway)
                self._round(peer.told["address"], peer, empty_log, empty)
        return gateway, empty

    def _round(self, address: str, process: Process, log: Path, found: Found) -> list[list[bytes]]:
        """Runs all streams and adds what was found. Returns the messages of each."""
        sizes, out = self._sizes, self._folder / "received"
        first = self._next
        self._next += sizes.streams
        options = [f"--face={self._face}", f"--address={address}", f"--first={first}", f"--out={out}"]
        options += [f"--streams={sizes.streams}", f"--tokens={sizes.tokens}"]
        with running(f"{_PACKAGE}.load", *options) as clients:
            time.sleep(1 / sizes.tokens_per_s)
            begin_s, before_s = time.monotonic(), process.cpu_s()
            time.sleep(sizes.window_s)
            end_s, after_s = time.monotonic(), process.cpu_s()
            clients.read_line()
        sent_s = sent(log)
        streams = json.loads(out.read_text())
        received = 0
        messages = [[base64.b64decode(one) for one in stream["messages"]] for stream in streams]
        for stream, own in zip(streams, messages, strict=True):
            tokens = [
                (at_s, text)
                for at_s, text in zip(stream["received_s"], map(_TEXT[self._face], own), strict=True)
                if text
            ]
            matching = sum(text == asked for (_, text), asked in zip(tokens, self._texts, strict=False))
            found.lost += len(self._texts) - matching
            found.errors += [stream["error"]] if stream["error"] else []
            inside = [
                at_s - out_s
                for (at_s, _), out_s in zip(tokens, sent_s.get(stream["number"], ()), strict=False)
                if begin_s <= at_s < end_s
            ]
            received += len(inside)
            found.delays_s += inside
        found.cpu_s.append((after_s - before_s) / received if received else None)
        return messages

    def _pace(self, log: Path) -> tuple[str, ...]:
        return ("--tokens-per-s", str(self._sizes.tokens_per_s), "--log", str(log))

    @contextlib.contextmanager
    def _gateway(self, log: Path) -> Iterator[tuple[str, Process]]:
        """(address of the face, process) of a gateway in front of a scripted engine, which a directory
        lists."""
        # The clock stands still: the engine's lease never runs out.
        directory = EmbeddedDirectory(clock=lambda: 0.0)
        server, address = rpc.serve(
            lambda server: cluster_pb2_grpc.add_DirectoryServicer_to_server(
                DirectoryService(directory), server
            ),
            service=cluster_pb2.DESCRIPTOR.services_by_name["Directory"].full_name,
            listen="127.0.0.1:0",
            threads=4,
            token=None,
        )
        try:
            with running(f"{_PACKAGE}.engine", *self._pace(log)) as engine:
                directory.renew(
                    WorkerRecord(
                        worker=WorkerId("scripted"),
                        kind="dense",
                        slot="dense-0",
                        address=engine.told["address"],
                        host="127.0.0.1",
                        process_id=1,
                        state="serving",
                    )
                )
                options = [f"--directory=grpc://{address}", "--listen=127.0.0.1:0", "--http=127.0.0.1:0"]
                options += ["--child", f"--spec={json.dumps({'model': DEMO})}"]
                with running("farshore.gateway", *options) as gateway:
                    yield gateway.told["http" if self._face == "http" else "address"], gateway
        finally:
            server.stop(None).wait()


def _texts(sizes: Sizes) -> list[str]:
    """The text of each token of the script."""
    stream = load_tokenizer(resolve(DEMO)).stream()
    return [stream.push(token_id) for token_id in script()[: sizes.tokens]]


def _grpc_text(message: bytes) -> str:
    return api.GenerateEvent.FromString(message).token.text


def _http_text(message: bytes) -> str:
    data = message.removeprefix(b"data: ")
    if data == b"[DONE]":
        return ""
    choices = json.loads(data).get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


_TEXT: dict[str, Callable[[bytes], str]] = {"grpc": _grpc_text, "http": _http_text}


def _of(face: str, messages: list[bytes]) -> Messages:
    """One stream's messages, parted."""
    tokens = [message for message in messages if _TEXT[face](message)]
    return Messages(messages[0], tokens, messages[1 + len(tokens) :])
