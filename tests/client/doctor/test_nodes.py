"""Which nodes may take a pod, and how many of them one holds."""

import pytest

from farshore.client.doctor.nodes import _room, _tolerates
from farshore.client.doctor.workloads import Template

TAINT = {"key": "k", "value": "v", "effect": "NoSchedule"}


def node(*, taints=(), **allocatable):
    status = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": allocatable}
    return {"metadata": {"name": "n"}, "spec": {"taints": list(taints)}, "status": status}


def problem(pod, *nodes, replicas=1):
    found = list(_room(Template("dense", replicas, pod), list(nodes)))
    assert len(found) <= 1
    return found[0].problem if found else None


@pytest.mark.parametrize(
    ("toleration", "tolerates"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "k", "operator": "Exists"}, True),
        ({"key": "k", "value": "v"}, True),
        ({"key": "k", "operator": "Equal", "value": "v", "effect": "NoSchedule"}, True),
        ({"key": "k", "value": "w"}, False),
        ({"key": "l", "operator": "Exists"}, False),
        ({"key": "k", "operator": "Exists", "effect": "NoExecute"}, False),
        ({}, False),
    ],
)
def test_tolerations(toleration, tolerates):
    assert _tolerates(toleration, TAINT) is tolerates
    pod = {"containers": [{}], "tolerations": [toleration]}
    assert (problem(pod, node(taints=[TAINT], pods="1")) is None) is tolerates


def test_a_taint_that_only_prefers_keeps_nothing_away():
    assert (
        problem({"containers": [{}]}, node(taints=[TAINT | {"effect": "PreferNoSchedule"}], pods="1")) is None
    )


def test_containers_count_together_and_init_containers_alone():
    """2 + 1 GiB, and 4 GiB before: a node of 8 GiB holds two. A limit without a request is one."""
    pod = {
        "containers": [
            {"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "3Gi"}}},
            {"resources": {"limits": {"memory": "1Gi"}}},
        ],
        "initContainers": [{"resources": {"requests": {"memory": "4Gi"}}}],
    }
    assert problem(pod, node(memory="8Gi"), replicas=2) is None
    assert "room for 2" in problem(pod, node(memory="8Gi"), replicas=3)
    assert problem(pod, node(memory="8Gi"), node(memory="4Gi"), replicas=3) is None


def test_a_resource_that_no_node_has():
    pod = {"containers": [{"resources": {"limits": {"hugepages-2Mi": "4Mi", "cpu": "500m"}}}]}
    assert "hugepages-2Mi 4Mi, cpu 0.5" in problem(pod, node(cpu="8"))


def test_pods_that_are_not_wanted_need_no_room():
    assert problem({"containers": [{}]}, replicas=0) is None
