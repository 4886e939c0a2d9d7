"""Reads the turns of a chat: typed at a terminal, with line editing, or piped in.

Used by ``command``. Must not know what a turn means.
"""

import contextlib
import sys

from farshore.errors import InvalidRequest

PROMPT, CONTINUED = "> ", ". "


class Lines:
    """``typed``: whether stdin is a terminal."""

    def __init__(self) -> None:
        self.typed = sys.stdin is not None and sys.stdin.isatty()
        if self.typed:
            # Optional: input() edits lines, and remembers them, where this module was imported.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401

    def read(self) -> str:
        """The next turn: a line, together with those that follow where a line ends with a backslash. Raises
        EOFError at the end, and InvalidRequest for a line that is not in stdin's encoding."""
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        try:
            if self.typed and sys.stdout.isatty():
                return input(prompt)
            if self.typed:
                # input() would write the prompt to stdout.
                sys.stderr.write(prompt)
                sys.stderr.flush()
            line = "" if sys.stdin is None else sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"that line is not {error.encoding} text: convert it first") from error
        if not line:
            raise EOFError
        return line.removesuffix("\n")
