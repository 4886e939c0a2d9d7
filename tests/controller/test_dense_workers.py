"""Several dense workers: they start together, share the attention workers, and are scaled."""

import threading
import time

import pytest

from farshore.client.events import Token
from farshore.client.sdk import Client

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
DEADLINE_S = 90.0

pytestmark = pytest.mark.heavy


def await_dense(client, count):
    """Waits until the status shows exactly ``count`` dense workers, all ready. Returns them."""
    end_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < end_s:
        dense = [worker for worker in client.status().workers if worker.kind == "dense"]
        if len(dense) == count and all(worker.state == "ready" for worker in dense):
            return dense
        threading.Event().wait(0.2)
    pytest.fail(f"not {count} dense workers within {DEADLINE_S:g} s")


def answer(client):
    messages = [{"role": "user", "content": QUESTION}]
    stream = client.generate(messages=messages, temperature=0, max_tokens=20)
    return "".join(event.text for event in stream if isinstance(event, Token))


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
