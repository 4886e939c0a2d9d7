"""Nodes: those that the release's pods run on, and whether the cluster has room for each group's pods.

Used by ``examine``. Must not know other tenants: it compares with all that a node can give, so that what it
finds is wrong for certain; the scheduler's own words on pods that wait are in the check of pods.
"""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi, namespaced
from farshore.client.doctor.workloads import Template, templates

NAME = "nodes"
_PRESSURES = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable")


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """Nodes with pods of the release that are not ready or short of something; groups without room."""
    nodes = list(api.items("/api/v1/nodes"))
    path = namespaced("v1", release.namespace, "pods")
    used = {
        pod["spec"].get("nodeName") for pod in api.items(path, labelSelector=release.selector) if pod["spec"]
    }
    for node in nodes:
        if node["metadata"]["name"] in used:
            yield from _state(node)
    for template in templates(api, release):
        yield from _room(template, nodes)


def _conditions(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["type"]: each for each in (node.get("status") or {}).get("conditions") or ()}


def _is_ready(node: dict[str, Any]) -> bool:
    return _conditions(node).get("Ready", {}).get("status") == "True"


def _state(node: dict[str, Any]) -> Iterator[Finding]:
    name, conditions = node["metadata"]["name"], _conditions(node)
    fix = f"kubectl describe node {name}; repair it, or drain it: its workers move to other nodes"
    if not _is_ready(node):
        words = conditions.get("Ready", {}).get("message") or "kubelet does not answer"
        problem = f"pods of the release run on it, and it is not ready: {words}"
        yield Finding(NAME, f"node {name}", problem, fix)
    for pressure in _PRESSURES:
        if conditions.get(pressure, {}).get("status") == "True":
            words = conditions[pressure].get("message") or "no reason is given"
            yield Finding(NAME, f"node {name}", f"it has {pressure}: {words}", fix)


def _room(template: Template, nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    if template.replicas == 0:
        return
    subject = f"pods of {template.component}"
    usable = [node for node in nodes if _may_take(node, template.spec)]
    if not usable:
        selector = template.spec.get("nodeSelector") or {}
        labels = ", ".join(f"{key}={value}" for key, value in selector.items())
        yield Finding(
            NAME,
            subject,
            f"no ready node of {len(nodes)} takes them: one must have "
            + (f"the labels {labels} and " if labels else "")
            + "no taint that they don't tolerate",
            f"label nodes, or change {template.component}.nodeSelector and tolerations",
        )
        return
    asked = _requests(template.spec)
    room = sum(_fits(node, asked) for node in usable)
    if room < template.replicas:
        wanted = ", ".join(f"{name} {_shown(name, amount)}" for name, amount in asked.items())
        largest = ", ".join(
            f"{name} {_shown(name, max(_allocatable(node, name) for node in usable))}" for name in asked
        )
        devices = [name for name in asked if "/" in name and not any(_allocatable(n, name) for n in usable)]
        fix = f"add nodes, or lower {template.component}.resources or the number of replicas"
        if devices:
            fix = (
                f"no node shows {devices[0]}: install the driver and the device plugin there (NVIDIA's GPU "
                f"operator brings both), or set {template.component}.gpu.enabled to false"
            )
        yield Finding(
            NAME,
            subject,
            f"{template.replicas} are wanted, each with {wanted}, and {len(usable)} nodes that take them "
            f"have room for {room} even if nothing else runs there; the most that one has: {largest}",
            fix,
        )


def _may_take(node: dict[str, Any], pod: dict[str, Any]) -> bool:
    """By readiness, labels and taints; affinities are left to the scheduler."""
    if not _is_ready(node) or node["spec"].get("unschedulable"):
        return False
    labels = node["metadata"].get("labels") or {}
    if not (pod.get("nodeSelector") or {}).items() <= labels.items():
        return False
    taints = [each for each in node["spec"].get("taints") or () if each["effect"] != "PreferNoSchedule"]
    return all(any(_tolerates(each, taint) for each in pod.get("tolerations") or ()) for taint in taints)


def _tolerates(toleration: dict[str, Any], taint: dict[str, Any]) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("operator") == "Exists":
        return True
    return bool(toleration.get("key")) and (toleration.get("value") or "") == (taint.get("value") or "")


def _requests(pod: dict[str, Any]) -> dict[str, Decimal]:
    """All containers together, or one init container where that asks for more."""
    total: dict[str, Decimal] = {}
    for container in pod["containers"]:
        for name, amount in _asked(container).items():
            total[name] = total.get(name, Decimal(0)) + amount
    for container in pod.get("initContainers") or ():
        for name, amount in _asked(container).items():
            total[name] = max(total.get(name, Decimal(0)), amount)
    return total


def _asked(container: dict[str, Any]) -> dict[str, Decimal]:
    """A limit without a request is one."""
    resources = container.get("resources") or {}
    both = (resources.get("limits") or {}) | (resources.get("requests") or {})
    return {name: parse_quantity(amount) for name, amount in both.items()}


def _allocatable(node: dict[str, Any], name: str) -> Decimal:
    return parse_quantity(((node.get("status") or {}).get("allocatable") or {}).get(name, 0))


def _fits(node: dict[str, Any], asked: dict[str, Decimal]) -> int:
    """How many such pods an empty node holds."""
    counts = [int(_allocatable(node, name) // amount) for name, amount in asked.items() if amount]
    return min(counts, default=int(_allocatable(node, "pods")))


def _shown(name: str, amount: Decimal) -> str:
    is_size = name in ("memory", "ephemeral-storage") or name.startswith("hugepages-")
    return f"{int(amount / 2**20)}Mi" if is_size else f"{float(amount):g}"
