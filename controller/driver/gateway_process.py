"""Runs the gateway as a child process of the driver.

Used by ``cluster``. The gateway reports its address as one line of JSON on stdout once an engine takes
requests. It ends when its stdin closes, so it can't outlive the driver, however the driver ends. Must not
know what the gateway does.
"""

import json
import os
import subprocess
import sys
import threading

from farshore import errors
from farshore.controller.launch.exits import exit_in_words
from farshore.defaults import GATEWAY_ALLOCATOR
from farshore.errors import StartupError
from farshore.model_spec import ModelSpec

READY_DEADLINE_S = 60.0
STOP_DEADLINE_S = 10.0
"""For the gateway to end, beside the time for which running requests may go on."""


class GatewayProcess:
    """The constructor starts the process, which loads the tokenizer, listens, and looks for engines;
    :meth:`serve` waits for it."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        listen: str,
        http: str | None,
        directory: str,
        controller: str,
        token_file: str,
        drain_s: float,
    ) -> None:
        """``listen``, ``http``: HOST:PORT of gRPC and of HTTP (None: off). ``directory``: its URL.
        ``controller``: HOST:PORT. ``token_file``: the cluster's token. ``drain_s``: how long running requests
        go on when the gateway is stopped."""
        self.http_address: str | None = None
        self._drain_s = drain_s
        arguments = ["--child", "--spec", spec.to_json(), "--listen", listen, "--directory", directory]
        arguments += ["--controller", controller, "--drain-timeout", str(drain_s)]
        arguments += ["--token-file", token_file]
        arguments += ["--http", http] if http else []
        self._process = subprocess.Popen(
            # -P keeps the current directory, which may be a checkout, off sys.path.
            [sys.executable, "-P", "-m", "farshore.gateway", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=GATEWAY_ALLOCATOR | os.environ,
            # Ctrl-C in a terminal must reach only the driver, which ends the processes in order.
            start_new_session=True,
        )
        self._stopping = False
        self._report = ""
        self._reported = threading.Event()
        threading.Thread(target=self._read_report, daemon=True).start()

    def serve(self) -> str:
        """Blocks until an engine takes the gateway's requests. Returns the gateway's address. Raises the
        error that the gateway reports (PortInUse, ModelError), or StartupError after READY_DEADLINE_S or if
        it has ended; the process has ended then."""
        try:
            return self._await_report()
        except errors.FarshoreError:
            self.stop()
            raise

    def check_start(self) -> None:
        """Raises the error that the gateway has reported, if it ended while it was loading. Blocks only for
        the report of a process that has ended."""
        if self._process.poll() is not None:
            self._reported.wait(STOP_DEADLINE_S)
        if self._reported.is_set() and self._report:
            self._address()

    def ended(self) -> str | None:
        """How the gateway ended, if it ended without :meth:`stop`; None while it runs. An exit code of 0 is
        an unexpected end too: nothing serves any more."""
        code = self._process.poll()
        if code is None or self._stopping:
            return None
        return f"the gateway (process {self._process.pid}) {exit_in_words(code)}"

    def stop(self, *, drains: bool = False) -> None:
        """Closes stdin, which ends the gateway, and kills it after STOP_DEADLINE_S. Sends no SIGTERM, which
        would arrive while the gateway is already closing. ``drains``: the workers go on, so that requests can
        end; it is killed after ``drain_s`` more. Idempotent."""
        self._stopping = True
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_DEADLINE_S + (self._drain_s if drains else 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_DEADLINE_S)
        # Closed last: closing waits for the thread that reads, which sees the end of the process.
        self._reported.wait(STOP_DEADLINE_S)
        self._process.stdout.close()

    def end_now(self) -> None:
        """Makes a :meth:`stop` that waits end at once. A signal handler may call it."""
        self._process.kill()

    def _read_report(self) -> None:
        assert self._process.stdout is not None
        self._report = self._process.stdout.readline().strip()
        self._reported.set()

    def _await_report(self) -> str:
        if not self._reported.wait(READY_DEADLINE_S):
            raise StartupError(f"the gateway was not ready within {READY_DEADLINE_S:.0f} s")
        if not self._report:
            code = self._process.wait(STOP_DEADLINE_S)
            raise StartupError(f"the gateway (process {self._process.pid}) {exit_in_words(code)}")
        return self._address()

    def _address(self) -> str:
        """The address that the gateway has reported. Raises the error that it reported instead."""
        report = json.loads(self._report)
        if "error" in report:
            kind = getattr(errors, report.get("kind", ""), StartupError)
            raise kind(report["error"])
        self.http_address = report["http"]
        return report["address"]
