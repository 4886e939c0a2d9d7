"""Terminal output and signals: text that can't command a terminal, progress, tables, one clean stop.

Used by the subcommands' modules. Must not know what they do.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

_CLEAR_LINE = "\r\x1b[2K"
_STYLES = {"bold": "1", "dim": "2", "red": "31"}

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that command a terminal, or reorder the text around them: all of C0 but tab and newline, DEL,
C1, embeddings, overrides and isolates of bidirectional text."""


def printable(text: str) -> str:
    """``text`` with the characters that command a terminal as escapes, such as ``\\x1b``, and with plain
    newlines."""
    return _COMMANDS.sub(_escape, text.replace("\r\n", "\n"))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def write(text: str, stream: TextIO | None = None) -> None:
    """Writes ``text`` at once, to stdout if no stream is given: to a terminal what is :func:`printable`, to a
    pipe or a file as it is."""
    stream = sys.stdout if stream is None else stream
    if text:
        stream.write(printable(text) if stream.isatty() else text)
        stream.flush()


def takes_escapes(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that knows escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def decorated(stream: TextIO) -> bool:
    """Whether colours and progress may be shown: :func:`takes_escapes`, and NO_COLOR is not set."""
    return takes_escapes(stream) and not os.environ.get("NO_COLOR")


def styled(text: str, style: str, stream: TextIO) -> str:
    """``text``, bold, dim or red where ``stream`` is :func:`decorated`; ``style`` may be empty: as it is."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if style and decorated(stream) else text


class Progress:
    """Progress messages. On a terminal each replaces the one before, and ``clear`` removes the last."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = decorated(self._stream)
        self._shown = False

    def step(self, text: str) -> None:
        """Shows a message: replaceable on a terminal, a line elsewhere."""
        if self._is_terminal:
            self.update(text)
        else:
            self.note(text)

    def update(self, text: str) -> None:
        """Shows a replaceable message on a terminal; does nothing elsewhere."""
        if self._is_terminal:
            self._stream.write(f"{_CLEAR_LINE}{printable(text)}")
            self._stream.flush()
            self._shown = True

    def note(self, text: str) -> None:
        """Writes a line that stays."""
        self.clear()
        self._stream.write(f"{printable(text)}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Removes the replaceable message, if one is shown."""
        if self._shown:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._shown = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, inside :func:`interrupts`: it ends what goes on now, not the command."""


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Every SIGINT raises Interrupted, where :func:`stop_signals` would end the command."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end of the context."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def stop_signals(*, again: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, but only the first one does: a second signal must not
    interrupt the cleaning up. It calls ``again``, which may shorten that.

    Yields a function that installs the handlers again, to be called after ``ray.init``, which replaces the
    handler of SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Only the main thread gets signals.
        return
    raised = False

    def stop(*_: object) -> None:
        nonlocal raised
        if raised:
            again()
        else:
            raised = True
            raise KeyboardInterrupt

    def take() -> None:
        for number in before:
            signal.signal(number, stop)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    take()
    try:
        yield take
    except SystemExit as leaving:
        if leaving.code == signal.SIGTERM:  # Raised by Ray's handler, before ours was installed again.
            raise KeyboardInterrupt from leaving
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines with aligned columns; a column whose cells all begin with a digit is aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]
    right = [all(row[column][:1].isdigit() for row in cells) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(header), *cells]
    ]


def size(count_bytes: int) -> str:
    """The number of bytes in a binary unit, such as "1.5 GiB"."""
    value, units = float(count_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count_bytes} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
