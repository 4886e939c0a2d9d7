"""A process of a running `farshore serve` is killed: the command names it, and ends if it can't go on."""

import os
import re
import signal
from pathlib import Path

import pytest

from farshore.client.sdk import Client

END_DEADLINE_S = 60


def _processes(server, pattern):
    """Process ids of the command's descendants whose command line matches ``pattern``."""
    return [pid for pid in _descendants(server.process.pid) if re.search(pattern, _name(pid))]


def _descendants(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [below for child in map(int, children) for below in (child, *_descendants(child))]


def _name(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("farshore.gateway", "the gateway (process {}) was killed by SIGKILL"),
        ("ray::ControllerActor", "the controller (process {}) was killed"),
        ("/raylet/raylet", "Ray's raylet (process {}) was killed by SIGKILL"),
        ("/gcs/gcs_server", "Ray's GCS (process {}) was killed by SIGKILL"),
    ],
)
def test_the_end_of_a_process_that_serving_needs(serve, pattern, message):
    server, _ = serve("--attention-workers", "1", "--kv-memory", "64MiB")
    (victim,) = _processes(server, pattern)
    os.kill(victim, signal.SIGKILL)
    assert server.process.wait(END_DEADLINE_S) == 1
    server.err.await_match(re.escape(f"farshore: error: {message.format(victim)}"))


@pytest.mark.heavy
@pytest.mark.parametrize("last", ["attention", "dense"])
def test_the_ends_of_workers(serve, last):
    """Serving goes on without one of two attention workers, but not without both or without the engine."""
    server, address = serve("--kv-memory", "64MiB")
    with Client(address) as client:
        workers = client.status().workers
        attention, dense = ([w for w in workers if w.kind == kind] for kind in ("attention", "dense"))
        first, second = attention
        os.kill(first.process_id, signal.SIGKILL)
        server.err.await_match(rf"farshore: warning: {first.worker_id} \(process {first.process_id}\)")
        states = {worker.worker_id: worker.state for worker in client.status().workers}
        assert states.pop(first.worker_id) == "unreachable"
        assert set(states.values()) == {"ready"}
    assert server.process.poll() is None
    (victim,) = dense if last == "dense" else [second]
    os.kill(victim.process_id, signal.SIGKILL)
    assert server.process.wait(END_DEADLINE_S) == 1
    server.err.await_match(
        rf"farshore: error: .*{victim.worker_id} \(process {victim.process_id}\) was killed"
    )
