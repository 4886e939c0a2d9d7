"""A running `farshore serve`, as tests that disturb it look at it: its processes, its workers, its answers.

Used by the controller's tests of whole clusters.
"""

import contextlib
import re
import threading
import time
from pathlib import Path

from farshore.errors import FarshoreError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def until(result, what, *, deadline_s):
    """Calls ``result`` until it returns something true, and returns that. Errors count as false. ``what``:
    what is wrong if it does not in time."""
    end_s, pause = time.monotonic() + deadline_s, threading.Event()
    while time.monotonic() < end_s:
        with contextlib.suppress(FarshoreError):
            if found := result():
                return found
        pause.wait(0.05)
    raise AssertionError(what)


def answer(client):
    """The answer to QUESTION; ANSWER, if all is well."""
    return "".join(getattr(event, "text", "") for event in client.generate(messages=QUESTION, max_tokens=8))


def workers_of(client, kind):
    """Worker id -> the worker, of one kind."""
    return {worker.worker_id: worker for worker in client.status().workers if worker.kind == kind}


def processes(server, pattern):
    """Process ids of the command's descendants whose command line matches ``pattern``."""
    return [pid for pid in _descendants(server.process.pid) if re.search(pattern, _command_line(pid))]


def _descendants(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [below for child in map(int, children) for below in (child, *_descendants(child))]


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
