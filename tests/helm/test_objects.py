"""Every object that the chart renders is what Kubernetes and KubeRay accept."""

import functools
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.37"
BESIDE = [folder / "shared" / "kuberay" / "ray.io_rayclusters.yaml" for folder in Path(__file__).parents[3:]]
"""Where KubeRay's definition of a RayCluster may be: beside the repository."""

BUNDLED = {"redis": {"mode": "bundled"}}
EXTERNAL = {
    "redis": {
        "mode": "external",
        "external": {"url": "rediss://ops@redis.example.com:6380/2", "passwordSecret": "r", "caSecret": "ca"},
    },
    "networkPolicy": {"redisServers": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
}
SCHEDULED = {
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "podAnnotations": {"note": "yes"},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
    ],
}
EXTRAS = {
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
}
MATRIX = {
    "defaults": {},
    "bundled": BUNDLED,
    "external": EXTERNAL,
    "scheduled": {name: SCHEDULED | EXTRAS for name in ("head", "dense", "attention", "gateway")}
    | {
        "redis": {"mode": "bundled", "bundled": SCHEDULED | {"storageClass": "fast"}},
        "launcher": {"extraEnv": EXTRAS["extraEnv"]},
    },
    "pvc": {"model": {"source": "pvc", "pvc": {"claimName": "models"}}},
    "hostPath": {"model": {"source": "hostPath", "hostPath": {"path": "/data"}}},
    "init": {
        "model": {
            "source": "init",
            "init": {
                "image": "busybox",
                "command": ["cp", "a", "/models"],
                "env": [{"name": "A", "value": "b"}],
            },
        }
    },
    "secrets": {"token": {"existingSecret": "mine"}, "image": {"pullSecrets": ["pull"], "tag": "1.2.3"}},
    "off": {
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False},
        "head": {"dashboard": False, "podDisruptionBudget": False},
        "gateway": {"podDisruptionBudget": False},
    },
    "names": {
        "fullnameOverride": "else",
        "commonLabels": {"team": "x"},
        "serviceAccount": {"name": "sa", "annotations": {"a": "b"}},
    },
    "huge pages": {
        "attention": {"resources": {"limits": {"cpu": 4, "memory": "8Gi", "hugepages-2Mi": "4Gi"}}}
    },
    "gpus": {
        "spec": {"denseKvMemory": "2GiB"},
        "dense": {"gpu": {"enabled": True, "runtimeClassName": "nvidia", "image": "r/farshore:1-cuda"}},
        "attention": {
            "gpu": {"enabled": True, "resource": "nvidia.com/mig-1g.10gb", "tolerations": []},
            "resources": {"limits": {"cpu": 4, "memory": "8Gi"}},
        },
    },
    "scaled": {
        "gateway": {"autoscaling": {"enabled": True}, "maxLiveRequests": 1000000},
        "dense": {"replicas": 3, "workersPerPod": 2},
        "ray": {"objectStoreBytes": 1 << 40},
    },
    "ingress": {
        "ingress": {
            "className": "nginx",
            **{
                kind: {"enabled": True, "host": f"{kind}.example.com", "tlsSecret": "tls"}
                for kind in ("grpc", "http")
            },
        }
    },
    "metrics": {
        "networkPolicy": {
            "metricsClients": [{"namespaceSelector": {}}],
            "extraEgress": [{"ports": [{"port": 443}]}],
        }
    },
}


@pytest.fixture(scope="session")
def all_rendered(render, examples):
    """Name -> objects, of the matrix and of the examples."""
    return {name: render(values) for name, values in (MATRIX | examples).items()}


def closed(schema):
    """The CRD's schema without room for unknown fields, which an API server would drop silently."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        result["additionalProperties"] = False
    return result


def distinct(all_rendered, *, ray):
    """The different objects among all that were rendered."""
    found = [each for objects in all_rendered.values() for each in objects.values()]
    return list(
        {
            json.dumps(each, sort_keys=True): each for each in found if (each["kind"] == "RayCluster") == ray
        }.values()
    )


def test_helm_finds_nothing_wrong(call_helm, examples):
    for values in ({"image": {"repository": "x"}}, *examples.values()):
        found = call_helm("lint", values=values)
        assert found["total_charts_linted"] == 1 and not found["errors"]
        assert [each for each in found["messages"] if each["error"] != "icon is recommended"] == []


def test_kubernetes_accepts_every_object(all_rendered, monkeypatch):
    # It reads the definitions, a megabyte, for each object.
    utils = kubernetes_validate.utils
    monkeypatch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
    objects = distinct(all_rendered, ray=False)
    for each in objects:
        # Raises also for a kind without a schema.
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    assert {each["kind"] for each in objects} >= {
        "Deployment",
        "StatefulSet",
        "Ingress",
        "NetworkPolicy",
        "Pod",
    }


def test_kubernetes_would_refuse_a_wrong_field(render):
    wrong = render()[("Deployment", "demo-farshore-gateway")]
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_kuberay_accepts_every_cluster(all_rendered):
    crd = next((path for path in BESIDE if path.is_file()), None)
    if crd is None:
        pytest.skip(f"KubeRay's CRD is not at {BESIDE[0]}")
    version = yaml.load(crd.read_text(), yaml.CSafeLoader)["spec"]["versions"][0]
    assert version["name"] == "v1" and version["storage"]
    validator = jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))
    clusters = distinct(all_rendered, ray=True)
    assert len(clusters) > len(MATRIX) / 2
    for each in clusters:
        validator.validate(each)
    wrong = clusters[0] | {"spec": clusters[0]["spec"] | {"rayVersio": "2"}}
    with pytest.raises(jsonschema.ValidationError, match="rayVersio"):
        validator.validate(wrong)
    pod = yaml.safe_load(yaml.safe_dump(clusters[0]))
    pod["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imag"):
        validator.validate(pod)


def pod_specs(objects):
    """(name, pod template's metadata, pod's spec) of everything that runs."""
    for (kind, name), each in objects.items():
        if kind == "RayCluster":
            groups = [each["spec"]["headGroupSpec"], *each["spec"]["workerGroupSpecs"]]
            for template in (group["template"] for group in groups):
                yield name, template["metadata"], template["spec"]
        elif kind in ("Deployment", "StatefulSet"):
            yield name, each["spec"]["template"]["metadata"], each["spec"]["template"]["spec"]
        elif kind == "Pod":
            yield name, each["metadata"], each["spec"]


def test_pods_have_no_more_rights_than_they_need(all_rendered):
    for objects in all_rendered.values():
        for name, _, spec in pod_specs(objects):
            assert not spec["automountServiceAccountToken"] and not spec["enableServiceLinks"], name
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in [*spec.get("initContainers", ()), *spec["containers"]]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"] and container["resources"]["requests"]


def test_every_mount_has_its_volume_and_every_volume_a_mount(all_rendered):
    for objects in all_rendered.values():
        for (_, name), each in objects.items():
            claims = {c["metadata"]["name"] for c in each.get("spec", {}).get("volumeClaimTemplates", ())}
            for _, _, spec in pod_specs({(each["kind"], name): each}):
                volumes = [volume["name"] for volume in spec["volumes"]] + sorted(claims)
                containers = [*spec.get("initContainers", ()), *spec["containers"]]
                mounts = [mount for container in containers for mount in container["volumeMounts"]]
                assert len(volumes) == len(set(volumes))
                assert {mount["name"] for mount in mounts} == set(volumes), name
                for container in containers:
                    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
                    assert len(paths) == len(set(paths)), name
