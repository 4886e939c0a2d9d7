"""Runs chat templates in processes of their own, and kills those that take too long.

Called by ``prompts`` from the gateway's tokenizing threads. Templates are untrusted programs, so a process
renders one conversation at a time under limits of time and memory, and its end fails that conversation alone.
A process lives as long as the gateway, since a start takes a tenth of a second and a rendering less than a
millisecond. It must not know what templates or conversations contain.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from farshore.errors import InvalidRequest, ModelError
from farshore.models.chat.protocol import ANSWER_S, COMPILE_S, GRACE_S, HEADER, RENDER_S, START_S

PROCESSES = 2
"""One for each tokenizing thread: a template that uses up its second delays no other request. The second one
starts when both threads render at once for the first time."""
_SLICE_CHARS = 1 << 16
"""Characters that one call converts to JSON: it keeps the interpreter's lock meanwhile."""
_READ_BYTES = 1 << 20


class Rendered(NamedTuple):
    """A prompt's text. ``named``: its control tokens stand under private names. ``control_tokens``: how many
    it has, else."""

    text: str
    named: bool
    control_tokens: int


class TemplateProcesses:
    """The template processes of one model. Thread-safe. They end with the object, at ``close`` or with this
    process."""

    def __init__(self, greeting: Mapping[str, Any], *, where: str) -> None:
        """Starts a process and does not wait for it. ``where``: the model's name, for messages."""
        self._greeting = _frame(greeting)
        self._where = where
        self._free = threading.BoundedSemaphore(PROCESSES)
        self._idle = [_Process(self._greeting)]
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _end_all, self._idle, self._lock)

    def await_compiled(self) -> None:
        """Blocks until the templates are compiled. Raises ModelError if they are not valid."""
        with self._free:
            process = self._take()
            try:
                self._await_start(process)
            finally:
                self._give_back(process)

    def render(self, request: Mapping[str, Any]) -> Rendered:
        """Raises InvalidRequest if the templates refuse the conversation or exceed a limit, ModelError if
        they can't be compiled."""
        frame = _frame(request)
        with self._free:
            process = self._take()
            try:
                self._await_start(process)
                header, text = self._ask(process, frame)
            finally:
                self._give_back(process)
        if "error" in header:
            raise InvalidRequest(f"{self._where}: {header['error']}")
        return Rendered(text, header["named"], header.get("control_tokens", 0))

    def _take(self) -> "_Process":
        """An idle process that has not been killed meanwhile, or a new one."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.is_running():
                    return process
                process.end()
        return _Process(self._greeting)

    def _give_back(self, process: "_Process") -> None:
        """Replaces the process if it has ended, so that the next request finds one that has started."""
        if process.ended:
            process = _Process(self._greeting)
        with self._lock:
            if self.close.alive:
                self._idle.append(process)
                return
        process.end()

    def _await_start(self, process: "_Process") -> None:
        try:
            header, _ = process.await_start()
        except _Ended as error:
            raise ModelError(
                f"{self._where}: its chat template can't be compiled ({error}); use another model"
            ) from error
        if "error" in header:
            raise ModelError(
                f"{self._where}: its chat template isn't valid Jinja ({header['error']}); use another model"
            )

    def _ask(self, process: "_Process", frame: bytes) -> tuple[dict[str, Any], str]:
        try:
            return process.call(frame)
        except _Ended as error:
            raise InvalidRequest(
                f"{self._where}: its chat template can't render these messages: {error}; shorten them, or "
                "leave out what it loops over"
            ) from error


class _Ended(Exception):
    """A process has ended without an answer; the text says why."""


class _Process:
    """One template process. ``ended``: it can't be used again."""

    def __init__(self, greeting: bytes) -> None:
        self._child = subprocess.Popen(
            # -P keeps the current directory, which may be a checkout, off sys.path.
            [sys.executable, "-P", "-m", "farshore.models.chat.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Ctrl-C in a terminal must reach only the gateway.
            start_new_session=True,
        )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._stdin, self._stdout = self._child.stdin.fileno(), self._child.stdout.fileno()
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe, False)
        self._deadline_s = time.monotonic() + START_S
        self._started: tuple[dict[str, Any], str] | None = None
        self.ended = False
        # A pipe takes the beginning at once, as a rule all of it: templates compile while others wait.
        self._unsent = memoryview(greeting)
        self._send_some()

    def await_start(self) -> tuple[dict[str, Any], str]:
        """The answer to the greeting. Raises _Ended."""
        if self._started is None:
            self._started = self._answer(self._deadline_s, START_S, COMPILE_S)
        return self._started

    def call(self, frame: bytes) -> tuple[dict[str, Any], str]:
        """Sends a frame; returns the answer's header and text. Raises _Ended; the process has ended then."""
        self._unsent = memoryview(frame)
        return self._answer(time.monotonic() + ANSWER_S, ANSWER_S, RENDER_S)

    def is_running(self) -> bool:
        return self._child.poll() is None

    def end(self) -> None:
        """Kills the process. Idempotent."""
        self.ended = True
        self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(GRACE_S)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self, deadline_s: float, most_s: float, cpu_s: float) -> tuple[dict[str, Any], str]:
        """``cpu_s``: the processor time after which the process ends itself; the deadline, which is
        ``most_s`` after the beginning, is for one that does not."""
        try:
            frame = self._exchange(deadline_s)
            if frame is None:
                raise _Ended(self._why(most_s, cpu_s))
        except BaseException:
            self.end()
            raise
        line = frame.index(b"\n")
        header = json.loads(frame[:line])
        if header.get("last"):
            self.end()
        return header, str(memoryview(frame)[line + 1 :], "utf-8")

    def _exchange(self, deadline_s: float) -> bytearray | None:
        """Sends what is unsent and reads a frame. None if the process ends or the deadline passes."""
        polled = select.poll()
        polled.register(self._stdout, select.POLLIN)
        received = bytearray()
        size = None
        while size is None or len(received) < size:
            if self._unsent:
                polled.register(self._stdin, select.POLLOUT)
            events = dict(polled.poll(max(0.0, deadline_s - time.monotonic()) * 1000))
            if not events:
                return None
            if self._stdin in events and not self._send_some():
                polled.unregister(self._stdin)
            if self._stdout in events:
                piece = os.read(self._stdout, _READ_BYTES)
                if not piece:
                    return None
                received += piece
            if size is None and len(received) >= HEADER.size:
                (size,) = HEADER.unpack(received[: HEADER.size])
                del received[: HEADER.size]
        return received

    def _why(self, most_s: float, cpu_s: float) -> str:
        """Why there was no answer."""
        try:
            code = self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return f"it took more than {most_s:g} s"
        if code in (-signal.SIGPROF, -signal.SIGXCPU):
            return f"it took more than {cpu_s:g} s"
        return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"

    def _send_some(self) -> bool:
        """Writes what the pipe takes. Returns whether something is left to send."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self._stdin, self._unsent) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # Reading shows how the process has ended.
            self._unsent = memoryview(b"")
        return False


def _end_all(processes: list[_Process], lock: threading.Lock) -> None:
    with lock:
        while processes:
            processes.pop().end()


def _frame(value: Mapping[str, Any]) -> bytes:
    payload = "".join(_json(value)).encode()
    return HEADER.pack(len(payload)) + payload


def _json(value: Any) -> Iterator[str]:
    """The JSON text of ``value``, in pieces that are short enough to let other threads run between them."""
    if isinstance(value, Mapping):
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield f"{', ' if index else ''}{json.dumps(key)}: "
            yield from _json(item)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for index, item in enumerate(value):
            if index:
                yield ", "
            yield from _json(item)
        yield "]"
    elif isinstance(value, str) and len(value) > _SLICE_CHARS:
        yield '"'
        for first in range(0, len(value), _SLICE_CHARS):
            yield json.dumps(value[first : first + _SLICE_CHARS], ensure_ascii=False)[1:-1]
        yield '"'
    else:
        yield json.dumps(value, ensure_ascii=False)
