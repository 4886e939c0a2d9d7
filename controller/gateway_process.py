"""The gateway as a child process: started, watched and ended by the driver.

It reports its address as one line of JSON on its standard output, and ends when its standard input closes:
so it cannot outlive the driver, whatever ends that.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from queue import Empty, SimpleQueue

from farshore import errors
from farshore.controller.exits import how_it_ended
from farshore.errors import StartupError

READY_DEADLINE_S = 60.0
STOP_DEADLINE_S = 10.0


class GatewayProcess:
    """Constructed it reads the model's tokenizer; then :meth:`serve`."""

    def __init__(self, *, model: str, listen: str, controller: str) -> None:
        arguments = ["--model", model, "--listen", listen, "--controller", controller]
        self._process = subprocess.Popen(
            # -P: the current directory, which may be a checkout, stays off sys.path.
            [sys.executable, "-P", "-m", "farshore.gateway", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in a terminal is for the driver, which ends the parts in order.
            start_new_session=True,
        )
        self._stopping = False

    def serve(self, *, engine: str) -> str:
        """Tell it the engine's address, and wait until it serves. Returns its own. Raises what it reports
        (PortInUse, ModelError), or StartupError; it has ended then."""
        assert self._process.stdin is not None
        try:
            # One that has ended already says why in its report.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._process.stdin.fileno(), f"{engine}\n".encode())
            return self._await_report()
        except errors.FarshoreError:
            self.stop()
            raise

    def ended(self) -> str | None:
        """That it has ended though it was not asked to, and how; None while it runs. A code of 0 is no better
        than another: nothing serves then."""
        code = self._process.poll()
        if code is None or self._stopping:
            return None
        return f"the gateway (process {self._process.pid}) {how_it_ended(code)}"

    def stop(self) -> None:
        """Close its standard input, which ends it; a signal besides would meet it half closed. Idempotent."""
        self._stopping = True
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_DEADLINE_S)

    def _await_report(self) -> str:
        lines: SimpleQueue[str] = SimpleQueue()
        stdout = self._process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=READY_DEADLINE_S)
        except Empty:
            raise StartupError(f"the gateway was not ready within {READY_DEADLINE_S:.0f} s") from None
        if not line.strip():
            code = self._process.wait(STOP_DEADLINE_S)
            raise StartupError(f"the gateway (process {self._process.pid}) {how_it_ended(code)}")
        report = json.loads(line)
        if "error" in report:
            kind = getattr(errors, report.get("kind", ""), StartupError)
            raise kind(report["error"])
        return report["address"]
