"""Helm refuses wrong values before it makes anything, and names the key."""

import json
import re
from pathlib import Path

import pytest

from farshore.controller.config import check_name

CHART = Path(__file__).parents[2] / "helm" / "farshore"

SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
FROM = {"fieldRef": {"fieldPath": "metadata.name"}}
INIT = {"image": "busybox", "command": ["cp", "a", "/models"]}


def amounts(name, request, limit):
    return {"requests": {name: request}, "limits": {name: limit}}


REFUSED = [
    ({"image": {"repository": ""}}, "/image/repository"),
    ({"imag": {}}, "imag"),
    ({"spec": {"kvMemory": "1Gi"}}, "/spec/kvMemory"),
    ({"spec": {"kvMemory": 1073741824}}, "/spec/kvMemory"),
    ({"spec": {"kv-memory": "1GiB"}}, "kv-memory"),
    ({"spec": {"dtype": "float16"}}, "/spec/dtype"),
    ({"spec": {"maxDecodeStallMs": "200ms"}}, "/spec/maxDecodeStallMs"),
    ({"attention": {"replicas": "2"}}, "/attention/replicas"),
    ({"attention": {"replicas": 0}}, "/attention/replicas"),
    ({"attention": {"shmSize": "1GiB"}}, "/attention/shmSize"),
    ({"attention": {"resources": {"limits": {"cpu": "2", "memory": "3GiB"}}}}, "limits/memory"),
    ({"dense": {"resources": {"limits": {"memory": "3Gi", "cpu": None}}}}, "cpu"),
    ({"dense": {"tolerations": [{"effect": "NoScheduling"}]}}, "/dense/tolerations/0/effect"),
    ({"dense": {"extraEnv": [{"value": "x"}]}}, "name"),
    ({"dense": {"gpu": {"enabled": "yes"}}}, "/dense/gpu/enabled"),
    ({"dense": {"gpu": {"resource": "gpu"}}}, "/dense/gpu/resource"),
    ({"attention": {"gpu": {"image": "farshore"}}}, "/attention/gpu/image"),
    ({"attention": {"gpu": {"count": 2}}}, "count"),
    ({"spec": {"denseKvMemory": "1Gi"}}, "/spec/denseKvMemory"),
    ({"spec": {"device": "cuda"}}, "device"),
    ({"gateway": {"service": {"type": "Public"}}}, "/gateway/service/type"),
    ({"gateway": {"terminationGracePeriod": 5}}, "terminationGracePeriod"),
    ({"model": {"source": "pvc"}}, "/model/pvc/claimName"),
    ({"model": {"source": "init", "init": {"image": "x"}}}, "/model/init/command"),
    ({"model": {"source": "s3"}}, "/model/source"),
    ({"redis": {"mode": "external"}}, "/redis/external/url"),
    ({"redis": {"mode": "external", "external": {"url": "redis://u:secret@h"}}}, "/redis/external/url"),
    ({"redis": {"external": {"url": "redis://h"}}}, "/redis/external/url"),
    # KubeRay gives the user to Ray as it is here, and unquoted.
    ({"redis": {"mode": "external", "external": {"url": "redis://a b@h"}}}, "/redis/external/url"),
    ({"redis": {"mode": "external", "external": {"url": "redis://a%40b@h"}}}, "/redis/external/url"),
    ({"redis": {"mode": "bundled", "bundled": {"size": "8GB"}}}, "/redis/bundled/size"),
    ({"ingress": {"grpc": {"enabled": True}}}, "/ingress/grpc/host"),
    ({"ray": {"ports": {"gcs": 70000}}}, "/ray/ports/gcs"),
    ({"ray": {"upgradeStrategy": "Rolling"}}, "/ray/upgradeStrategy"),
    ({"security": {"runAsUser": 0}}, "/security/runAsUser"),
    ({"networkPolicy": {"clients": []}}, "/networkPolicy/clients"),
    # A schema can't compare two values: a template does.
    ({"spec": {"kvMemory": "3GiB"}}, "attention.resources.limits.memory"),
    ({"dense": {"workersPerPod": 4}}, "dense.resources.limits.memory"),
    ({"attention": {"gpu": {"enabled": True}}}, "attention.resources.limits.memory"),
    ({"spec": {"drainTimeout": 101}}, "dense.terminationGracePeriodSeconds"),
    ({"spec": {"drainTimeout": 100}, "attention": {"terminationGracePeriodSeconds": 119}}, "attention.term"),
    ({"gateway": {"drainTimeout": 85}}, "gateway.terminationGracePeriodSeconds"),
    ({"gateway": {"autoscaling": {"enabled": True, "minReplicas": 7}}}, "gateway.autoscaling.minReplicas"),
    # Kubernetes, or KubeRay, would refuse these only when pods are made.
    ({"attention": {"resources": {"limits": {"memory": "2Gi"}}}}, "attention.resources.requests.memory"),
    ({"head": {"resources": {"limits": {"cpu": "400m"}}}}, "head.resources.requests.cpu: 500m"),
    ({"dense": {"resources": {"limits": {"cpu": 1}}}}, "dense.resources.requests.cpu: 2"),
    ({"gateway": {"resources": {"requests": {"memory": "1025Mi"}}}}, "gateway.resources.requests.memory"),
    ({"launcher": {"resources": {"requests": {"memory": "2Gi"}}}}, "launcher.resources.requests.memory"),
    ({"initResources": {"requests": {"memory": "2Gi"}}}, "initResources.requests.memory"),
    (
        {"redis": {"bundled": {"resources": {"requests": {"memory": "2Gi"}}}}},
        "redis.bundled.resources.requests",
    ),
    ({"ray": {"ports": {"metrics": 6379}}}, "6379 is already ray.ports.gcs"),
    ({"ray": {"ports": {"dashboard": 50052}}}, "50052 is already launcher.controllerPort"),
    ({"ray": {"ports": {"client": 10998}}}, "ray.ports.client: 10998 is one of ray.ports.rayWorkers"),
    ({"ray": {"ports": {"workers": {"low": 30000}}}}, "ray.ports.workers: low, 30000, is more than high"),
    (
        {"ray": {"ports": {"workers": {"low": 10999}}}},
        "ray.ports.workers: it has ports of ray.ports.rayWorkers",
    ),
    ({"commonLabels": {"team": "a b"}}, "/commonLabels/team"),
    # KubeRay's Service of the head selects by its own.
    ({"commonLabels": {"app.kubernetes.io/created-by": "us"}}, "app.kubernetes.io/created-by"),
    ({"dense": {"gpu": None}}, "gpu"),
    ({"commonLabels": {"a b": "c"}}, "a b"),
    ({"nameOverride": "a_", "fullnameOverride": "x"}, "/nameOverride"),
    ({"token": {"existingSecret": "A_b"}}, "/token/existingSecret"),
    ({"image": {"pullSecrets": ["a", "a"]}}, "/image/pullSecrets"),
    ({"image": {"pullSecrets": [""]}}, "/image/pullSecrets/0"),
    ({"redis": {"passwordKey": "a b"}}, "/redis/passwordKey"),
    ({"redis": {"passwordKey": ".."}}, "/redis/passwordKey"),
    ({"redis": {"bundled": {"storageClass": "A_b"}}}, "/redis/bundled/storageClass"),
    ({"serviceAccount": {"name": "A_b"}}, "/serviceAccount/name"),
    ({"ingress": {"className": "A b"}}, "/ingress/className"),
    ({"ingress": {"http": {"enabled": True, "host": "a_b.c"}}}, "/ingress/http/host"),
    ({"ingress": {"http": {"enabled": True, "host": "10.0.0.1"}}}, "/ingress/http/host"),
    ({"networkPolicy": {"clients": [{}]}}, "/networkPolicy/clients/0"),
    (
        {"networkPolicy": {"clients": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]}},
        "/networkPolicy/clients/0",
    ),
    ({"model": {"mountPath": "/a:b"}}, "/model/mountPath"),
    ({"model": {"hostPath": {"path": "/a/../b"}}}, "/model/hostPath/path"),
    # Of a RayCluster, Kubernetes refuses these only when KubeRay makes the pods.
    ({"dense": {"priorityClassName": "A b"}}, "/dense/priorityClassName"),
    ({"dense": {"gpu": {"runtimeClassName": "A b"}}}, "/dense/gpu/runtimeClassName"),
    ({"dense": {"podAnnotations": {"a b": "c"}}}, "'a b'"),
    ({"dense": {"nodeSelector": {"a": "b c"}}}, "/dense/nodeSelector/a"),
    ({"dense": {"nodeSelector": {"a b": "c"}}}, "'a b'"),
    ({"dense": {"tolerations": [{}]}}, "/dense/tolerations/0"),
    ({"dense": {"tolerations": [{"operator": "Equal", "value": "x"}]}}, "/dense/tolerations/0"),
    ({"dense": {"tolerations": [{"key": "", "value": "x"}]}}, "/dense/tolerations/0/key"),
    ({"dense": {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}}, "tolerations/0/value"),
    ({"dense": {"tolerations": [{"key": "a", "tolerationSeconds": 3}]}}, "/dense/tolerations/0"),
    ({"dense": {"topologySpreadConstraints": [SPREAD | {"topologyKey": ""}]}}, "0/topologyKey"),
    ({"dense": {"topologySpreadConstraints": [SPREAD | {"minDomains": 2}]}}, "0/whenUnsatisfiable"),
    (
        {"dense": {"topologySpreadConstraints": [SPREAD | {"matchLabelKeys": ["app.kubernetes.io/name"]}]}},
        "0/matchLabelKeys/0",
    ),
    ({"dense": {"extraEnv": [{"name": "A=B"}]}}, "/dense/extraEnv/0/name"),
    ({"dense": {"extraEnv": [{"name": "A", "valueFrom": {}}]}}, "/dense/extraEnv/0/valueFrom"),
    ({"dense": {"extraEnv": [{"name": "A", "value": "b", "valueFrom": FROM}]}}, "/dense/extraEnv/0"),
    ({"dense": {"extraVolumes": [{"name": "Aa", "emptyDir": {}}]}}, "/dense/extraVolumes/0/name"),
    ({"dense": {"extraVolumeMounts": [{"name": "a", "mountPath": "/x:y"}]}}, "0/mountPath"),
    ({"dense": {"extraVolumeMounts": [{"name": "a", "mountPath": "/x", "subPath": "/a"}]}}, "0/subPath"),
    ({"dense": {"extraVolumeMounts": [{"name": "a", "mountPath": "/x", "subPath": "a/.."}]}}, "0/subPath"),
    ({"dense": {"extraVolumeMounts": [{"name": "a", "mountPath": "/x"}]}}, "the pod has no volume a"),
    ({"dense": {"resources": {"requests": {"cpu": -1}}}}, "/dense/resources/requests/cpu"),
    ({"dense": {"resources": {"limits": {"nvidia.com/gpu": -1}}}}, "limits/nvidia.com~1gpu"),
    ({"dense": {"resources": {"limits": {"nvidia.com/gpu": "500m"}}}}, "limits/nvidia.com~1gpu"),
    ({"dense": {"resources": {"limits": {"a..b/x": 1}}}}, "a..b/x"),
    (
        {"dense": {"resources": {"requests": {"nvidia.com/gpu": 1}}}},
        "the limit, which is missing",
    ),
    ({"dense": {"resources": amounts("nvidia.com/gpu", 1, 2)}}, "1 must be the limit, which is 2"),
    ({"dense": {"resources": amounts("hugepages-2Mi", "2Mi", "4Mi")}}, "2Mi must be the limit, which is 4Mi"),
    ({"dense": {"resources": amounts("ephemeral-storage", "2Gi", "1Gi")}}, "more than the limit, 1Gi"),
    (
        {"dense": {"resources": {"limits": {"hugepages-2Mi": "3Mi"}}}},
        "3Mi is no multiple of a page",
    ),
    # Server-side apply takes no two entries of one key, and a release would end half made.
    (
        {"dense": {"extraEnv": [{"name": "HOME", "value": "/"}]}},
        "dense.extraEnv: the container has",
    ),
    ({"gateway": {"extraEnv": [{"name": "HOME", "value": "/"}]}}, "gateway.extraEnv"),
    ({"launcher": {"extraEnv": [{"name": "POD_IP", "value": "x"}]}}, "launcher.extraEnv"),
    ({"model": {"source": "init", "init": INIT | {"env": [{"name": "A"}, {"name": "A"}]}}}, "model.init.env"),
    (
        {"head": {"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}},
        "head.extraVolumes: the pod has",
    ),
    (
        {"gateway": {"extraVolumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}},
        "a mount at /tmp already",
    ),
    ({"model": {"source": "init", "init": INIT, "mountPath": "/tmp"}}, "model.mountPath: the container"),
    ({"dense": {"topologySpreadConstraints": [SPREAD, SPREAD]}}, "dense.topologySpreadConstraints: two have"),
]


@pytest.mark.parametrize(("values", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_wrong_values_are_refused_by_name(render, helm_failed, values, key):
    with pytest.raises(helm_failed, match=re.escape(key)):
        render(values)


def test_a_grace_of_a_drain_and_twenty_seconds_is_enough(render):
    cluster = render({"spec": {"drainTimeout": 100}})[("RayCluster", "demo-farshore")]["spec"]
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        *_, leave_s = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert 100 < int(leave_s) < pod["terminationGracePeriodSeconds"] == 120


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("demo", "demo-farshore"),
        ("farshore", "farshore"),
        ("my.farshore", "my-farshore"),
        ("a" * 53, "a" * 31 + "-d63ef51d"),
    ],
)
def test_names_fit_everything_that_takes_them(render, release, expected):
    names = {name for _, name in render(name=release)}
    assert expected in names and max(map(len, names)) <= 63
    check_name(expected)


def test_a_release_whose_name_no_service_can_have_is_refused(render, helm_failed):
    with pytest.raises(helm_failed, match="set fullnameOverride"):
        render(name="1st")
    assert ("RayCluster", "first") in render({"fullnameOverride": "first"}, name="1st")


def test_the_image_must_be_named(call_helm, helm_failed):
    with pytest.raises(helm_failed, match="/image/repository"):
        call_helm("render", values={}, name="demo", namespace="llm")


def test_the_schema_has_every_value_and_no_other(defaults):
    schema = json.loads((CHART / "values.schema.json").read_text())

    def resolved(part):
        while "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        return part

    def check(values, part, path):
        part = resolved(part)
        if "properties" in part:
            assert part.get("additionalProperties") is False, path
            for key, value in values.items():
                assert key in part["properties"], f"{path}.{key}"
                if isinstance(value, dict):
                    check(value, part["properties"][key], f"{path}.{key}")
            missing = part["properties"].keys() - values.keys() - {"global"}
            if not path.endswith(("limits", "requests", "affinity")):
                assert not missing, f"{path}: {missing}"

    check(defaults, schema, "")
