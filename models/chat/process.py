"""A template process: ``python -m farshore.models.chat.process``.

Started and killed by ``processes``. Renders one conversation after another, each within RENDER_S and
MEMORY_BYTES; the kernel enforces both, because a template's single operation may run for hours in C. Ends
when its stdin does, so it can't outlive the gateway. Imports Jinja and nothing larger. ``protocol`` describes
the frames. It must not know about tokens' ids.
"""

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from farshore.models.chat.marks import ControlTokens, Marker
from farshore.models.chat.protocol import COMPILE_S, HEADER, MEMORY_BYTES, RENDER_S
from farshore.models.chat.template import ChatTemplates, Refused
from farshore.text import shortened

_OUT_OF_MEMORY = f"its chat template needs more than {MEMORY_BYTES >> 20} MiB for these messages"
_HALF_CHARACTER = r"a JSON text holds half of a surrogate pair, such as \ud83d: send whole characters"


def main() -> int:
    """Answers frames until stdin ends. Returns the exit code."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _limit_memory()
    greeting = _read(requests)
    if greeting is None:
        return 0
    _start_timer(COMPILE_S)
    try:
        service = _Service(json.loads(greeting))
    except Exception as error:  # Compiling evaluates constants, so it may raise anything.
        _answer(answers, {"error": shortened(f"{type(error).__name__}: {error}")})
        return 1
    _start_timer(0)
    _answer(answers, {})
    # A traceback would quote a prompt.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while (request := _read(requests)) is not None:
        _start_timer(RENDER_S)
        header, text = service.render(json.loads(request))
        _start_timer(0)
        _answer(answers, header, text)
        if header.get("last"):
            return 1
    return 0


class _Service:
    def __init__(self, greeting: Mapping[str, Any]) -> None:
        """``greeting``: templates by name, special tokens by role, and for each control token's text the name
        that it gets where text may look like it."""
        self._templates = ChatTemplates(greeting["templates"], greeting["special_tokens"])
        self._names = greeting["control_tokens"]
        self._tokens = ControlTokens(self._names)

    def render(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """(header, text) of the answer; control tokens are named if the user has typed one, or if the request
        says so."""
        tokens = self._tokens if request["mark"] else ControlTokens(())
        marker = Marker(tokens, besides=self._templates.sources)
        try:
            text = self._templates.render(request, marker, most_chars=request["most_chars"])
            if marker.used or request["named"]:
                return {"named": True}, marker.unmark(text, self._names).encode()
            return {"named": False, "control_tokens": len(tokens.compiled.findall(text))}, text.encode()
        except Refused as error:
            return {"error": str(error)}, b""
        except UnicodeEncodeError:
            return {"error": _HALF_CHARACTER}, b""
        except MemoryError:
            return {"error": _OUT_OF_MEMORY, "last": True}, b""


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _start_timer(limit_s: float) -> None:
    """Has the kernel end this process after ``limit_s`` of processor time, or some more should the timer
    fail; 0: never. A busy machine takes longer for the same work, which is not the template's fault."""
    # The parent may ignore the signal, and children inherit that.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    cpu_s = math.ceil(used.ru_utime + used.ru_stime + limit_s) + 1 if limit_s else most
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, most))


def _read(stream: BinaryIO) -> bytes | None:
    """The next frame; None if the stream has ended."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    frame = stream.read(size)
    return frame if len(frame) == size else None


def _answer(stream: BinaryIO, header: Mapping[str, Any], text: bytes = b"") -> None:
    line = json.dumps(header).encode() + b"\n"
    stream.write(HEADER.pack(len(line) + len(text)) + line)
    stream.write(text)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
