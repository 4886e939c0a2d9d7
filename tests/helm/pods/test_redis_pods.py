"""With Redis, a lost head is no lost cluster: its pod comes back to the same nodes and workers."""

import time

import pytest

from farshore.client.sdk import Client
from farshore.errors import TransportError

pytestmark = pytest.mark.soak

DEADLINE_S = 90.0
WORKERS = 3


@pytest.fixture(scope="module")
def cluster(install, server_binary):
    server_binary("redis")
    return install({"redis": {"mode": "bundled"}})


def workers(cluster):
    """The ids of all workers, once the controller knows them and a gateway has found it: it looks a name up
    again only so often, and the hosts file has a new address for a new head; a Service would keep its own."""
    end_s = time.monotonic() + DEADLINE_S
    with Client(f"{cluster.of('gateway')[0].host.address}:50051") as client:
        while True:
            for pod in cluster.pods.values():
                pod.restart_ended()
            try:
                found = {worker.worker_id for worker in client.status().workers}
            except TransportError as error:
                found = {str(error)}
            if len(found) == WORKERS:
                return found
            assert time.monotonic() < end_s, found
            time.sleep(1)


def test_answers_go_on_while_the_head_is_gone_and_after_it_is_back(cluster):
    assert "Paris" in cluster.helm_test()
    nodes = [pod for name in ("dense", "attention") for pod in cluster.of(name)]
    processes = {pod.name: pod.status("ray")["Pid"] for pod in nodes}
    before = workers(cluster)
    (head,) = cluster.of("head")
    head.kill()
    assert "Paris" in cluster.helm_test()
    cluster.replace(head)
    assert workers(cluster) == before
    assert {pod.name: pod.status("ray")["Pid"] for pod in nodes} == processes
    assert all(passed for passed, _ in cluster.probes().values()), cluster.probes()
    assert "Paris" in cluster.helm_test()


def test_redis_keeps_what_it_knows_when_its_pod_is_lost(cluster):
    before = workers(cluster)
    (redis,) = cluster.of("redis")
    redis.kill()
    assert "Paris" in cluster.helm_test()
    cluster.replace(redis)
    assert workers(cluster) == before
    assert "Paris" in cluster.helm_test()
