"""Workers that say that they can't go on: the loop tells why, and starts them again."""

import pytest

from farshore.controller.loop.loop import ROUND_S
from farshore.controller.reconcile import HEALTHY_S, Slot

from .test_loop import Cluster

DENSE = Slot("dense", 0)


@pytest.fixture
def cluster():
    made = Cluster()
    made.run(2)
    return made


def test_a_worker_that_failed_is_told_with_its_reason_and_started_again(cluster):
    cluster.ray.failing[DENSE] = "the model can't be loaded"
    cluster.run(ROUND_S)
    worker = cluster.worker(DENSE)
    cluster.ray.die(DENSE)
    cluster.run()
    lost = [event for event in cluster.events.since(0) if event.kind == "lost"]
    assert [(event.subject, event.detail) for event in lost] == [(worker, "the model can't be loaded")]
    assert cluster.ray.starts[DENSE] == 2


def test_a_load_that_always_fails_is_tried_less_and_less_often(cluster):
    """However long a load takes: a worker that never served was never healthy."""
    cluster.ray.die(DENSE)
    cluster.ray.failing[DENSE] = "the model can't be loaded"
    pauses_s = []
    for _ in range(4):
        cluster.run(HEALTHY_S + ROUND_S)
        before = cluster.ray.starts[DENSE]
        cluster.ray.die(DENSE)
        died_s = cluster.clock.now_s
        while cluster.ray.starts[DENSE] == before:
            cluster.run()
        pauses_s.append(cluster.clock.now_s - died_s)
    assert [pause_s // 1 for pause_s in pauses_s] == [1, 2, 4, 8]
