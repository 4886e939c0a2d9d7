"""The objects that make pods: what the release consists of, and what keeps them from making pods.

Used by ``examine``; the checks of nodes, Secrets and volumes read the pods' templates here. Must not know
pods that run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi, namespaced

NAME = "workloads"
KINDS = (
    ("ray.io/v1", "RayCluster", "rayclusters"),
    ("apps/v1", "Deployment", "deployments"),
    ("apps/v1", "StatefulSet", "statefulsets"),
)


@dataclass(frozen=True, slots=True)
class Template:
    """Pods that an object makes. ``component``: head, dense, attention, gateway or redis, the section of
    values.yaml. ``spec``: of a pod."""

    component: str
    replicas: int
    spec: dict[str, Any]


def objects(api: KubeApi, release: Release) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, object) of the release's objects that make pods."""
    for group, kind, plural in KINDS:
        path = namespaced(group, release.namespace, plural)
        for each in api.items(path, labelSelector=release.selector):
            yield kind, each


def templates(api: KubeApi, release: Release) -> Iterator[Template]:
    for kind, each in objects(api, release):
        spec = each["spec"]
        if kind == "RayCluster":
            yield Template("head", 1, spec["headGroupSpec"]["template"]["spec"])
            for group in spec.get("workerGroupSpecs") or ():
                yield Template(group["groupName"], group.get("replicas", 1), group["template"]["spec"])
        else:
            component = each["metadata"]["labels"]["app.kubernetes.io/component"]
            yield Template(component, spec.get("replicas", 1), spec["template"]["spec"])


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """No object of the release, and what the others say of pods that they can't make."""
    found = list(objects(api, release))
    if not any(kind == "Deployment" for kind, _ in found):
        yield Finding(
            NAME,
            f"release {release.name}",
            f"the namespace {release.namespace} has no gateway of this release",
            f"install it (helm install {release.name} helm/farshore -n {release.namespace} -f VALUES), or "
            "name another one by --release and --namespace: `helm list -A` shows them",
        )
    for kind, each in found:
        subject = f"{kind} {each['metadata']['name']}"
        status = each.get("status") or {}
        if kind == "RayCluster" and not status:
            yield Finding(
                NAME,
                subject,
                "the KubeRay operator has not looked at it: it makes no pods",
                "see what the check `operator` found; an operator that runs must watch the namespace "
                f"{release.namespace}",
            )
        if kind == "RayCluster" and each["spec"].get("suspend"):
            yield Finding(NAME, subject, "it is suspended: it has no pods", "set spec.suspend to false")
        if words := _refused(api, release, kind, each):
            yield Finding(
                NAME,
                subject,
                f"its pods can't be made: {words}",
                "change what refuses them (a quota, a policy of admission), or resources and security in "
                "the values, then helm upgrade",
            )


def _refused(api: KubeApi, release: Release, kind: str, each: dict[str, Any]) -> str:
    """Why a quota or an admission rule refuses the object's pods; empty where none does."""
    status = each.get("status") or {}
    for condition in status.get("conditions") or ():
        failed = condition["type"] in ("ReplicaFailure", "RayClusterReplicaFailure")
        if failed and condition["status"] == "True":
            return condition.get("message") or condition.get("reason") or "no reason is given"
    # A StatefulSet has no such condition, only events.
    if kind == "StatefulSet" and status.get("replicas", 0) < each["spec"].get("replicas", 1):
        return api.warning(release.namespace, kind, each["metadata"]["name"])
    return ""
