"""A running `farshore serve`, as tests that disturb it look at it: its processes, its workers, its answers.

Used by the controller's tests of whole clusters.
"""

import concurrent.futures
import contextlib
import re
import threading
import time

import psutil

from farshore.client.events import Finished, Token
from farshore.errors import FarshoreError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
DEADLINE_S = 300.0
"""For what goes right by itself on a busy machine, where a process of Ray takes 20 s to start."""

ENDLESS = 6000
"""More tokens than any test waits for. They take 140 MiB of KV."""


def until(result, what):
    """Calls ``result`` until it returns something true, and returns that. Errors count as false. ``what``:
    what is wrong if it does not in time."""
    end_s, pause = time.monotonic() + DEADLINE_S, threading.Event()
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


def begun(client, prompt, **options):
    """An answer without an end of its own, whose first token has come."""
    stream = client.generate(prompt, max_tokens=ENDLESS, temperature=0, ignore_eos=True, **options)
    next(event for event in stream if isinstance(event, Token))
    return stream


class Reading:
    """Reads an answer in a thread, so that no gateway waits for its reader. A context manager: at its end
    nothing is read any more."""

    def __init__(self, client, stream):
        self._client, self._stream = client, stream
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._end = self._pool.submit(self._read)

    @property
    def is_over(self):
        return self._end.done()

    def end(self):
        """How the answer ended: the reason, or the error."""
        return self._end.result(DEADLINE_S)

    def cancel(self):
        """Ends an answer that must run until now."""
        assert not self.is_over, self.end()
        self._client.cancel(self._stream.request_id)
        assert self.end() == "cancelled"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stream.close()
        self._pool.shutdown()

    def _read(self):
        try:
            return next(event.reason for event in self._stream if isinstance(event, Finished))
        except FarshoreError as error:
            return error


def processes(server, pattern):
    """Process ids of the command's descendants whose command line matches ``pattern``, but not of their own
    descendants: a process that has been forked has its parent's command line until it executes another."""
    try:
        family = psutil.Process(server.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = {each.pid: each for each in family if re.search(pattern, _command_line(each))}
    return [pid for pid, each in found.items() if _parent(each) not in found]


def _command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parent(process):
    try:
        return process.ppid()
    except psutil.Error:
        return None
