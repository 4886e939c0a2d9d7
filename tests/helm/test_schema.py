"""Helm refuses wrong values before it makes anything, and names the key."""

import json
import re
from pathlib import Path

import pytest

from farshore.controller.config import check_name

CHART = Path(__file__).parents[2] / "helm" / "farshore"

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
