"""Dense workers: several start together, share the attention workers and are scaled; one that can't go on is
replaced."""

import os
import shutil
import signal

import pytest

from farshore.client.sdk import Client

from ..running import ANSWER, answer, until, workers_of

pytestmark = pytest.mark.heavy


def await_dense(client, count, *, but=()):
    """Waits until the status shows exactly ``count`` dense workers, all ready. Returns them. ``but``: ids of
    workers that have ended, which are listed while their leases hold."""

    def ready():
        dense = workers_of(client, "dense")
        well = len(dense) == count and all(worker.state == "ready" for worker in dense.values())
        return well and dense.keys().isdisjoint(but) and list(dense.values())

    return until(ready, f"not {count} dense workers")


FAULT = """
import os, sys, threading, time

def await_fault():
    while True:
        try:
            if open(os.environ["FARSHORE_TEST_FAULT"]).read() == str(os.getpid()):
                break
        except OSError:
            pass
        time.sleep(0.05)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    engine = sys.modules["farshore.workers.engine.engine"]
    engine.probe = engine.Scheduler.round = broken

if "FARSHORE_TEST_FAULT" in os.environ:
    threading.Thread(target=await_fault, daemon=True).start()
"""
"""Run at the start of each process of a cluster: breaks the engine of the process that a file names."""


def test_two_dense_workers_start_serve_and_are_scaled(serve):
    server, address = serve("--dense-workers", "2", "--attention-workers", "1", "--kv-memory", "64MiB")
    listed = {server.out.await_match(rf"  (dense-{index}-\w+) +(\S+:\d+)").groups() for index in (0, 1)}
    with Client(address) as client:
        dense = await_dense(client, 2)
        assert {(worker.worker_id, worker.address) for worker in dense} == listed
        assert answer(client) == ANSWER
        assert client.scale(dense=3) == {"dense": 3, "attention": 1}
        await_dense(client, 3)
        assert client.scale(dense=1)["dense"] == 1
        (left,) = await_dense(client, 1)
        assert left.worker_id.startswith("dense-0-")
        assert answer(client) == ANSWER


def test_a_dense_worker_that_cannot_go_on_is_replaced(marked, serve, demo_source, tmp_path):
    """First its engine fails for good, then the new worker's model can't be loaded for a while."""
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    fault, model = tmp_path / "fault", tmp_path / "model.gguf"
    shutil.copy(demo_source.path, model)
    marked.set_environment(PYTHONPATH=str(tmp_path), FARSHORE_TEST_FAULT=str(fault))
    options = ("--model", str(model), "--attention-workers", "1", "--kv-memory", "64MiB")
    server, address = serve(*options)
    with Client(address) as client:
        (first,) = await_dense(client, 1)
        fault.write_text(str(first.process_id))
        lost = rf"{first.worker_id} lost: the engine failed with RuntimeError: CUDA error: .*"
        # The engine notices in its next round.
        until(lambda: answer(client) and server.err.find(lost), "no failure is told")
        server.err.await_match(r"dense-0-\w+ replaced")
        (second,) = await_dense(client, 1, but=[first.worker_id])
        assert answer(client) == ANSWER

        model.rename(tmp_path / "away.gguf")
        os.kill(second.process_id, signal.SIGKILL)
        lost = server.err.await_match(rf"(dense-0-\w+) lost: .*{model}.*")
        assert lost[1] != second.worker_id
        (tmp_path / "away.gguf").rename(model)
        await_dense(client, 1, but=[first.worker_id, second.worker_id, lost[1]])
        assert answer(client) == ANSWER
