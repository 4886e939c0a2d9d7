"""A cluster over two Ray nodes: workers use their own nodes' addresses, and outlive the loss of a node."""

import urllib.request

import pytest

from farshore.client.sdk import Client

from ..conftest import kill_all
from ..running import ANSWER, Reading, answer, begun, until


def _fetched(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            return page.read()
    except OSError:
        return b""


def _attention(client):
    return {w.worker_id: w.address for w in client.status().workers if w.kind == "attention"}


@pytest.mark.heavy
def test_workers_spread_over_nodes_and_a_lost_node_is_replaced(two_nodes, marked, serve):
    address, second, metrics_port = two_nodes
    _, gateway = serve("--ray-address", address, "--kv-memory", "256MiB", "--attention-workers", "2")
    with Client(gateway) as client:
        assert answer(client) == ANSWER
        client.scale(attention=6)
        until(lambda: len(_attention(client)) == 6, "not all workers joined")
        hosts = {each.partition(":")[0] for each in _attention(client).values()}
        assert hosts == {"127.0.0.2", "127.0.0.3"}
        until(
            lambda: b"ray_farshore_kv_budget_bytes" in _fetched(metrics_port), "no gauges on the second node"
        )
        before = _attention(client)
        on_second = {worker for worker, each in before.items() if each.startswith("127.0.0.3:")}
        kill_all(second.process.pid)
        until(
            lambda: len(_attention(client)) == 6 and not on_second & _attention(client).keys(),
            "the lost node's workers were not replaced",
        )
        assert {each.partition(":")[0] for each in _attention(client).values()} == {"127.0.0.2"}
        assert before.keys() - on_second <= _attention(client).keys()
        until(lambda: answer(client) == ANSWER, "no answer after the loss of a node")


@pytest.mark.heavy
def test_a_node_that_leaves_fails_no_request(two_nodes, marked, serve):
    """As a pod's preStop does: its workers drain, and others start on the nodes that stay."""
    address, _, _ = two_nodes
    _, gateway = serve("--ray-address", address, "--kv-memory", "192MiB", "--attention-workers", "4")
    with Client(gateway) as client:
        # Both nodes hold parts of it.
        stream = begun(client, "word " * 1000)
        hosts = {worker.address.partition(":")[0] for worker in client.status().workers}
        assert hosts == {"127.0.0.2", "127.0.0.3"}
        dense = next(worker for worker in client.status().workers if worker.kind == "dense")
        leaving = "127.0.0.2" if dense.address.startswith("127.0.0.3") else "127.0.0.3"
        with Reading(client, stream) as reading:
            done = marked.run("leave", "--ray-address", address, "--host", leaving, "--timeout", "250")
            assert done.returncode == 0, done.stderr
            assert "draining farshore-default/attention-" in done.stderr, done.stderr
            reading.cancel()
        until(lambda: len(_attention(client)) == 4, "the workers were not replaced")
        hosts = {worker.address.partition(":")[0] for worker in client.status().workers}
        assert hosts == {"127.0.0.2", "127.0.0.3"} - {leaving}
        assert answer(client) == ANSWER
    missing = marked.run("leave", "--ray-address", address, "--host", "127.0.0.9")
    assert missing.returncode == 1 and "has no node 127.0.0.9" in missing.stderr
