"""The rights of the user that runs the doctor, by Kubernetes' own review of each verb.

Used by ``examine``. No pod of the chart calls Kubernetes' API, and none gets a token for it: the verbs here
are those that Helm needs to keep the chart's objects and to wait for them, and those that the doctor, its
advice and NOTES.txt need.
"""

from collections.abc import Iterator, Mapping, Sequence

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi
from farshore.client.doctor.workloads import objects
from farshore.errors import Internal

NAME = "access"
# `helm install --wait` lists and watches whatever it has made.
_KEEP = ("get", "list", "watch", "create", "patch", "delete")
VERBS = {
    ("", "configmaps"): _KEEP,
    # Helm keeps its releases in Secrets, and replaces them whole.
    ("", "secrets"): (*_KEEP, "update"),
    ("", "serviceaccounts"): _KEEP,
    ("", "services"): _KEEP,
    ("apps", "deployments"): _KEEP,
    # Helm looks there for a Deployment's newest pods.
    ("apps", "replicasets"): ("list",),
    ("apps", "statefulsets"): _KEEP,
    ("networking.k8s.io", "networkpolicies"): _KEEP,
    ("policy", "poddisruptionbudgets"): _KEEP,
    ("ray.io", "rayclusters"): _KEEP,
    # `helm test` makes a pod, waits for it and replaces it.
    ("", "pods"): _KEEP,
    ("", "pods/log"): ("get",),
    ("", "pods/portforward"): ("create",),
    ("", "persistentvolumeclaims"): ("get",),
    ("", "events"): ("list",),
}
"""(API group, resource) -> the verbs, in the release's namespace."""
OPTIONAL = {
    ("autoscaling", "horizontalpodautoscalers"): _KEEP,
    ("networking.k8s.io", "ingresses"): _KEEP,
}
"""As VERBS, of what the chart makes only where the values enable it."""
OPTIONAL_KINDS = "farshore/optional-kinds"
"""The annotation of the gateways' Deployment with the resources of OPTIONAL that the values enable. Helm
can't make these for a user who lacks the verbs, so that a look at what exists would not tell."""


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """The verbs that the user lacks, a finding for each resource."""
    yield from _review(api, release, VERBS)
    enabled = _optional_kinds(api, release)
    yield from _review(api, release, {key: verbs for key, verbs in OPTIONAL.items() if key[1] in enabled})


def _optional_kinds(api: KubeApi, release: Release) -> set[str]:
    return {
        resource
        for _, each in objects(api, release)
        for resource in (each["metadata"].get("annotations") or {}).get(OPTIONAL_KINDS, "").split()
    }


def _review(
    api: KubeApi, release: Release, needed: Mapping[tuple[str, str], Sequence[str]]
) -> Iterator[Finding]:
    for (group, resource), verbs in needed.items():
        missing = [verb for verb in verbs if not _allowed(api, release.namespace, group, resource, verb)]
        if missing:
            full = f"{resource}.{group}" if group else resource
            yield Finding(
                NAME,
                full,
                f"you may not {', '.join(missing)} {full} in the namespace {release.namespace}",
                f"ask for a Role with them: kubectl -n {release.namespace} create role farshore-"
                f"{resource.replace('/', '-')} --verb={','.join(missing)} --resource={full}, and a "
                "RoleBinding of it to you",
            )


def _allowed(api: KubeApi, namespace: str, group: str, resource: str, verb: str) -> bool:
    kind, _, part = resource.partition("/")
    attributes = {"namespace": namespace, "group": group, "resource": kind, "verb": verb}
    if part:
        attributes["subresource"] = part
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = api.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    status = answer.get("status") or {}
    if "allowed" not in status:
        raise Internal(f"Kubernetes' review of {verb} {resource} has no answer: {status}")
    return bool(status["allowed"])
