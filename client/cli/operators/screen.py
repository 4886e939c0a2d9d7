"""A terminal as a screen that is drawn again and again, and given back as it was.

Used by ``top``. Must not know what is drawn.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, Self

from farshore.client.cli.operators.view import Line
from farshore.client.cli.terminal import printable, styled

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_RESIZED, _SUSPENDED = b"r", b"s"


class Screen:
    """A context manager, of the main thread. Draws on stdout, a terminal; keys are read where stdin is one,
    too. Ctrl-Z gives the terminal back until the command goes on."""

    def __enter__(self) -> Self:
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)
        self._handlers = {
            number: signal.signal(number, lambda *_, byte=byte: self._note(byte))
            for number, byte in ((signal.SIGWINCH, _RESIZED), (signal.SIGTSTP, _SUSPENDED))
        }
        self._keys = sys.stdin is not None and sys.stdin.isatty()
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._woken)

    def draw(self, lines: Sequence[Line]) -> None:
        """Draws as much of ``lines`` as the terminal has room for."""
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        if len(lines) > rows:
            lines = [*lines[: rows - 1], Line(f"({len(lines) - rows + 1} more lines)", "dim")]
        shown = [styled(printable(line.text)[:columns], line.style, sys.stdout) for line in lines]
        self._write("\x1b[H" + "\n".join(f"{text}\x1b[K" for text in shown) + "\x1b[J")

    def wait(self, timeout_s: float) -> Literal["quit", "redraw", "timeout"]:
        """Waits for a key that ends, for something after which the screen must be drawn, or for the time."""
        until_s = time.monotonic() + timeout_s
        sources = [self._wake, sys.stdin.fileno()] if self._keys else [self._wake]
        while (left_s := until_s - time.monotonic()) > 0:
            ready, _, _ = select.select(sources, [], [], left_s)
            if self._wake in ready:
                if _SUSPENDED in os.read(self._wake, 1024):
                    self._suspend()
                return "redraw"
            if ready:
                keys = os.read(sys.stdin.fileno(), 1024)
                if not keys or b"q" in keys.lower():  # Nothing: the terminal is gone.
                    return "quit"
        return "timeout"

    def _note(self, byte: bytes) -> None:
        # Refused only where the pipe is full of notes that were not read yet.
        with contextlib.suppress(BlockingIOError):
            os.write(self._woken, byte)

    def _suspend(self) -> None:
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()

    def _take(self) -> None:
        self._settings: Any = None
        if self._keys:
            # Imported here, because not every system on which the command line works has them.
            import termios
            import tty

            self._settings = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno(), termios.TCSANOW)
        self._write(_ENTER)

    def _give_back(self) -> None:
        self._write(_LEAVE)
        if self._settings is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._settings)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
