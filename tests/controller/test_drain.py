"""Workers of a running `farshore serve` are drained, by an operator or by a signal."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from farshore.client.events import Finished, Token
from farshore.client.sdk import Client
from farshore.errors import FarshoreError, TransportError

END_DEADLINE_S = 90
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def _until(result, what):
    """Calls ``result`` until it returns something true, and returns that. Errors count as false."""
    end_s = time.monotonic() + END_DEADLINE_S
    pause = threading.Event()
    while time.monotonic() < end_s:
        with contextlib.suppress(FarshoreError):
            if found := result():
                return found
        pause.wait(0.1)
    raise AssertionError(what)


def _workers(client, kind):
    return {worker.worker_id: worker for worker in client.status().workers if worker.kind == kind}


def _answer(client):
    return "".join(getattr(event, "text", "") for event in client.generate(messages=QUESTION, max_tokens=8))


def _kinds(client, subject):
    return [event.kind for event in client.watch_events() if event.subject == subject]


@pytest.mark.heavy
def test_workers_are_drained_and_replaced_and_requests_go_on(marked, serve):
    server, address = serve("--kv-memory", "64MiB", "--attention-workers", "1")
    with Client(address, resume_s=0) as client:
        # An operator drains the attention worker, by its slot: nothing reads from it.
        (first,) = _workers(client, "attention").values()
        done = marked.run("drain", "attention-0", "--server", address)
        assert (done.returncode, done.stdout) == (0, f"{first.worker_id} has ended\n"), done.stderr
        _until(
            lambda: _kinds(client, first.worker_id)[-3:] == ["draining", "drained", "retired"],
            "not retired",
        )
        (second,) = _until(lambda: _workers(client, "attention"), "no replacement").values()
        assert second.worker_id.startswith("attention-1-")
        refused = marked.run("drain", "attention-0", "--server", address)
        assert refused.returncode == 1 and second.worker_id in refused.stderr

        # A signal does the same.
        os.kill(second.process_id, signal.SIGTERM)
        _until(lambda: not Path(f"/proc/{second.process_id}").exists(), "SIGTERM ended nothing")
        _until(lambda: _kinds(client, second.worker_id)[-1] == "retired", "not retired")
        assert "lost" not in _kinds(client, second.worker_id)
        assert _until(lambda: _answer(client), "no answer") == ANSWER

        # A dense worker's request ends; one that takes too long fails, and says what to do.
        (dense,) = _workers(client, "dense").values()
        stream = client.generate("One", max_tokens=60, temperature=0, ignore_eos=True)
        next(event for event in stream if isinstance(event, Token))
        client.drain(dense.worker_id)
        assert isinstance(list(stream)[-1], Finished)
        _until(lambda: _answer(client) == ANSWER, "no engine answers")
        (dense,) = _workers(client, "dense").values()
        stream = client.generate("One", max_tokens=2000, temperature=0, ignore_eos=True)
        next(event for event in stream if isinstance(event, Token))
        client.drain(dense.worker_id, timeout_s=0)
        with pytest.raises(TransportError, match=f"{dense.worker_id} was drained: send the request again"):
            list(stream)
        _until(lambda: _answer(client) == ANSWER, "no engine answers")
        server.err.await_match(f"{dense.worker_id} drained")


@pytest.mark.heavy
def test_a_controller_that_is_told_to_end_comes_back_and_starts_nothing(serve):
    server, address = serve("--kv-memory", "64MiB", "--attention-workers", "1")
    with Client(address) as client:
        before = {worker.worker_id for worker in client.status().workers}
        workers = {worker.process_id for worker in client.status().workers}
        (controller,) = {
            int(pid.name)
            for pid in Path("/proc").glob("[0-9]*")
            if _is_controller_of(pid, server.process.pid) and int(pid.name) not in workers
        }
        os.kill(controller, signal.SIGTERM)
        _until(lambda: not Path(f"/proc/{controller}").exists(), "SIGTERM ended nothing")
        assert _answer(client) == ANSWER
        _until(lambda: {worker.worker_id for worker in client.status().workers} == before, "not the same")


def _is_controller_of(process, driver):
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text().startswith("ray::ControllerActor") and _is_below(
            int(process.name), driver
        )
    return False


def _is_below(pid, ancestor):
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False
