"""The prerequisite: the kind RayCluster with the fields that the chart sets, and an operator that watches.

Used by ``examine``. Must not know the release's objects. Asks the API server's own description, which every
user may read, for the kind: reading CustomResourceDefinitions needs rights for the whole cluster.
"""

import re
from collections.abc import Iterator
from typing import Any

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi
from farshore.errors import NotFound

NAME = "operator"
LEAST_VERSION = (1, 7)
SUBJECT = "CRD rayclusters.ray.io"
FIELDS = (
    "rayVersion",
    "authOptions.mode",
    "authOptions.secretName",
    "upgradeStrategy.type",
    "gcsFaultToleranceOptions.redisAddress",
    "gcsFaultToleranceOptions.redisUsername",
    "gcsFaultToleranceOptions.redisPassword",
    "headGroupSpec",
    "workerGroupSpecs",
)
"""Of a RayCluster's spec: those that the chart sets. The API server drops fields that an older CRD lacks, and
a cluster without authOptions asks its clients for no token."""
INSTALL = (
    "helm repo add kuberay https://ray-project.github.io/kuberay-helm && helm install kuberay-operator "
    "kuberay/kuberay-operator --version 1.7.0 -n kuberay --create-namespace"
)
UPGRADE_CRD = (
    "helm upgrades no CRDs: kubectl apply --server-side --force-conflicts -k "
    "'github.com/ray-project/kuberay/ray-operator/config/crd?ref=v1.7.0'"
)


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """A missing or old CRD; an operator that is missing, old, not ready, or watches other namespaces."""
    yield from _definition(api)
    yield from _operator(api, release)


def _definition(api: KubeApi) -> Iterator[Finding]:
    try:
        group = api.get("/apis/ray.io")
    except NotFound:
        problem = "Kubernetes does not know the kind RayCluster"
        yield Finding(NAME, SUBJECT, problem, f"install the KubeRay operator, which brings it: {INSTALL}")
        return
    versions = [each["version"] for each in group["versions"]]
    if "v1" not in versions:
        problem = f"it is too old: it serves {', '.join(versions)}, and the chart needs ray.io/v1"
        yield Finding(NAME, SUBJECT, problem, UPGRADE_CRD)
        return
    described = api.get("/openapi/v3/apis/ray.io/v1")
    spec = _spec(described)
    missing = [path for path in FIELDS if not _has(spec, path)]
    if missing:
        problem = (
            f"it is too old: a RayCluster's spec lacks {', '.join(missing)}; Kubernetes drops these "
            "fields of the chart's RayCluster without a word"
        )
        yield Finding(NAME, SUBJECT, problem, UPGRADE_CRD)


def _spec(described: dict[str, Any]) -> dict[str, Any]:
    """The schema of a RayCluster's spec, in an OpenAPI description."""
    for schema in described["components"]["schemas"].values():
        kinds = [each["kind"] for each in schema.get("x-kubernetes-group-version-kind") or ()]
        if "RayCluster" in kinds:
            return schema["properties"]["spec"]
    return {}


def _has(schema: dict[str, Any], path: str) -> bool:
    for key in path.split("."):
        if key not in (schema.get("properties") or {}):
            return False
        schema = schema["properties"][key]
    return True


def _operator(api: KubeApi, release: Release) -> Iterator[Finding]:
    # Both of KubeRay's installations, Helm and kustomize, give its pods this label.
    pods = list(api.items("/api/v1/pods", labelSelector="app.kubernetes.io/component=kuberay-operator"))
    if not pods:
        problem = "no pod of it runs: nothing makes the pods of a RayCluster"
        yield Finding(NAME, "KubeRay operator", problem, f"install it: {INSTALL}")
        return
    if not any(_watches(pod, release.namespace) for pod in pods):
        problem = f"it does not watch the namespace {release.namespace}"
        fix = f"add {release.namespace} to watchNamespace in the values of its chart"
        yield Finding(NAME, "KubeRay operator", problem, fix)
        return
    for pod in pods:
        if not _watches(pod, release.namespace):
            continue
        subject = f"pod {pod['metadata']['name']} of the namespace {pod['metadata']['namespace']}"
        version = _version(pod)
        if version and version < LEAST_VERSION:
            problem = f"the KubeRay operator is {version[0]}.{version[1]}, and the chart needs 1.7 or later"
            yield Finding(NAME, subject, problem, f"upgrade it to 1.7 or later, and its CRDs: {UPGRADE_CRD}")
        conditions = {each["type"]: each for each in (pod.get("status") or {}).get("conditions") or ()}
        if conditions.get("Ready", {}).get("status") != "True":
            fix = f"kubectl -n {pod['metadata']['namespace']} describe pod {pod['metadata']['name']}"
            yield Finding(NAME, subject, "the KubeRay operator is not ready", fix)


def _watches(pod: dict[str, Any], namespace: str) -> bool:
    """By the arguments of its command; an operator with none of these watches every namespace."""
    for container in pod["spec"]["containers"]:
        words = " ".join([*(container.get("command") or ()), *(container.get("args") or ())])
        if match := re.search(r"--?watch-namespace[= ](\S+)", words):
            return namespace in match[1].split(",")
    return True


def _version(pod: dict[str, Any]) -> tuple[int, int] | None:
    """By the image's tag; None where it tells none."""
    for container in pod["spec"]["containers"]:
        if match := re.search(r":v?(\d+)\.(\d+)", container["image"]):
            return int(match[1]), int(match[2])
    return None
