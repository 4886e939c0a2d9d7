"""Workers of a running `farshore serve` are drained, by an operator or by a signal."""

import os
import signal
from pathlib import Path

import pytest

from farshore.client.sdk import Client
from farshore.errors import TransportError

from ..running import ANSWER, Reading, answer, begun, processes, until, workers_of


def _kinds(client, subject):
    return [event.kind for event in client.watch_events() if event.subject == subject]


def _check_drain(client, dense, tell):
    """Checks that an answer goes on while its dense worker drains, and that the worker ends after it.
    ``tell``: makes the worker drain."""
    with Reading(client, begun(client, "One")) as reading:
        tell()
        until(lambda: "draining" in _kinds(client, dense.worker_id), "it does not drain")
        # It ends when this answer does.
        reading.cancel()
    until(lambda: _kinds(client, dense.worker_id)[-1:] == ["retired"], "not retired")
    assert "lost" not in _kinds(client, dense.worker_id)
    # Not the drained one, which takes requests until it is told.
    until(lambda: dense.worker_id not in workers_of(client, "dense"), "not replaced")
    until(lambda: answer(client) == ANSWER, "no engine answers")


@pytest.mark.heavy
def test_workers_are_drained_and_replaced_and_requests_go_on(marked, serve):
    server, address = serve("--kv-memory", "192MiB", "--attention-workers", "1")
    with Client(address, resume_s=0) as client:
        # An operator drains the attention worker, by its slot: nothing reads from it.
        (first,) = workers_of(client, "attention").values()
        done = marked.run("drain", "attention-0", "--server", address)
        assert (done.returncode, done.stdout) == (0, f"{first.worker_id} has ended\n"), done.stderr
        until(
            lambda: _kinds(client, first.worker_id)[-3:] == ["draining", "drained", "retired"],
            "not retired",
        )
        (second,) = until(lambda: workers_of(client, "attention"), "no replacement").values()
        assert second.worker_id.startswith("attention-1-")
        refused = marked.run("drain", "attention-0", "--server", address)
        assert refused.returncode == 1 and second.worker_id in refused.stderr

        # A signal does the same.
        os.kill(second.process_id, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{second.process_id}").exists(), "SIGTERM ended nothing")
        until(lambda: _kinds(client, second.worker_id)[-1:] == ["retired"], "not retired")
        assert "lost" not in _kinds(client, second.worker_id)
        assert until(lambda: answer(client), "no answer") == ANSWER

        # A dense worker's request may end, whether an operator or a signal drains it.
        (dense,) = workers_of(client, "dense").values()
        _check_drain(client, dense, lambda: client.drain(dense.worker_id))
        (dense,) = workers_of(client, "dense").values()
        _check_drain(client, dense, lambda: os.kill(dense.process_id, signal.SIGTERM))

        # One that takes too long fails, and says what to do.
        (dense,) = workers_of(client, "dense").values()
        stream = begun(client, "One")
        client.drain(dense.worker_id, timeout_s=0)
        with pytest.raises(TransportError, match=f"{dense.worker_id} was drained: send the request again"):
            list(stream)
        until(lambda: answer(client) == ANSWER, "no engine answers")
        server.err.await_match(f"{dense.worker_id} drained")


@pytest.mark.heavy
def test_a_controller_that_is_told_to_end_comes_back_and_starts_nothing(serve):
    server, address = serve("--kv-memory", "64MiB", "--attention-workers", "1")
    with Client(address) as client:
        before = {worker.worker_id for worker in client.status().workers}
        workers = {worker.process_id for worker in client.status().workers}
        (controller,) = set(processes(server, "^ray::ControllerActor")) - workers
        os.kill(controller, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{controller}").exists(), "SIGTERM ended nothing")
        assert answer(client) == ANSWER
        until(lambda: {worker.worker_id for worker in client.status().workers} == before, "not the same")
