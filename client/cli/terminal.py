"""Terminal output and signals: progress on stderr, tables, and one clean stop on a signal.

Used by the subcommands' modules. Must not know what they do.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

_CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Progress messages. On a terminal each replaces the one before, and ``clear`` removes the last."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
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
            self._stream.write(f"{_CLEAR_LINE}{text}")
            self._stream.flush()
            self._shown = True

    def note(self, text: str) -> None:
        """Writes a line that stays."""
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Removes the replaceable message, if one is shown."""
        if self._shown:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._shown = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, but only the first one does: a second signal must not
    interrupt the cleaning up.

    Yields a function that installs the handlers again, to be called after ``ray.init``, which replaces the
    handler of SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Only the main thread gets signals.
        return
    raised = False

    def stop(*_: object) -> None:
        nonlocal raised
        if not raised:
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
