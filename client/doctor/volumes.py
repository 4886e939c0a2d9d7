"""PersistentVolumeClaims of the release: that they exist and are bound.

Used by ``examine``. Must not know pods that run.
"""

from collections.abc import Iterator

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi, namespaced
from farshore.client.doctor.workloads import objects, templates
from farshore.errors import NotFound

NAME = "volumes"


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """Claims that are missing or not bound."""
    for name, made_by_kubernetes in sorted(_claims(api, release).items()):
        subject = f"persistentvolumeclaim {name}"
        try:
            claim = api.get(namespaced("v1", release.namespace, "persistentvolumeclaims", name))
        except NotFound:
            # A StatefulSet makes its claims with its pods; what keeps it from that is another check's.
            if not made_by_kubernetes:
                problem = f"it is missing in the namespace {release.namespace}: pods that need it don't start"
                yield Finding(NAME, subject, problem, "make it, or name another one by model.pvc.claimName")
            continue
        phase = (claim.get("status") or {}).get("phase") or "Pending"
        if phase != "Bound":
            words = api.warning(release.namespace, "PersistentVolumeClaim", name)
            storage = claim["spec"].get("storageClassName") or "the cluster's default"
            way = ", or make a volume that fits"
            if made_by_kubernetes:
                way = " (redis.bundled.storageClass and size; first delete the StatefulSet and this claim)"
            yield Finding(
                NAME,
                subject,
                f"it is {phase}, not Bound (storage class: {storage})" + (f": {words}" if words else ""),
                "use a storage class that `kubectl get storageclass` shows, for this size and access mode"
                + way,
            )


def _claims(api: KubeApi, release: Release) -> dict[str, bool]:
    """Name -> whether a StatefulSet makes it."""
    found = {}
    for template in templates(api, release):
        for volume in template.spec.get("volumes") or ():
            if claim := volume.get("persistentVolumeClaim"):
                found[claim["claimName"]] = False
    for kind, each in objects(api, release):
        if kind == "StatefulSet":
            for claim in each["spec"].get("volumeClaimTemplates") or ():
                for number in range(each["spec"].get("replicas", 1)):
                    found[f"{claim['metadata']['name']}-{each['metadata']['name']}-{number}"] = True
    return found
