"""Helm installs, upgrades, rolls back and removes the chart, on a stand-in for Kubernetes' API server."""

import base64
import importlib.util
import json
from http.client import HTTPConnection
from pathlib import Path

import pytest


@pytest.fixture
def server():
    """An ApiServer: see its module, which says what it is not."""
    spec = importlib.util.spec_from_file_location("api_server", Path(__file__).with_name("api_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    running = module.ApiServer()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def helm(call_helm, server):
    """helm("install", values=…), of the release demo in the namespace llm of the server."""
    return lambda action, **arguments: call_helm(action, kubeconfig=server.kubeconfig, **arguments)


def ours(server):
    """The chart's objects, without Helm's own Secrets."""
    return {key: each for key, each in server.objects.items() if not key[1].startswith("sh.helm.release")}


def cluster(server):
    return server.objects[("rayclusters", "demo-farshore")]["spec"]


def token(server):
    return base64.b64decode(server.objects[("secrets", "demo-farshore-token")]["data"]["auth_token"])


def test_install_upgrade_rollback_uninstall(helm, server, examples):
    laptop = examples["laptop"]
    helm("install", values=laptop)
    installed = ours(server)
    assert {plural for plural, _ in installed} >= {"rayclusters", "deployments", "configmaps", "secrets"}
    assert [group["replicas"] for group in cluster(server)["workerGroupSpecs"]] == [1, 2]
    first = token(server)
    assert len(bytes.fromhex(first.decode())) == 32

    helm("upgrade", values=laptop | {"attention": laptop["attention"] | {"replicas": 4}})
    assert [group["replicas"] for group in cluster(server)["workerGroupSpecs"]] == [1, 4]
    config = server.objects[("configmaps", "demo-farshore")]["data"]["cluster.yaml"]
    assert "attention-workers: 4" in config
    assert token(server) == first

    helm("rollback", version=1)
    assert ours(server) == installed
    assert [each["revision"] for each in helm("history")] == [1, 2, 3]

    helm("uninstall")
    assert server.objects == {}


def test_upgrades_between_the_examples_change_no_immutable_field(helm, server, examples):
    # The first one and the last one have no Redis.
    names = sorted(examples, key=lambda name: name != "laptop")
    first, *others = (examples[name] for name in [*names, *reversed(names)])
    helm("install", values=first)
    kept = token(server)
    for values in others:
        helm("upgrade", values=values)
        assert token(server) == kept
    # Objects that an example does not have are gone again.
    assert not any("redis" in name for _, name in ours(server))


def test_a_made_password_is_kept_and_a_given_secret_is_not_touched(helm, server):
    image = {"image": {"repository": "x"}}
    helm("install", values=image | {"redis": {"mode": "bundled"}})
    made = server.objects[("secrets", "demo-farshore-redis")]
    helm("upgrade", values=image | {"redis": {"mode": "bundled"}})
    assert server.objects[("secrets", "demo-farshore-redis")] == made
    helm("upgrade", values=image | {"token": {"existingSecret": "mine"}})
    assert not any(plural == "secrets" for plural, _ in ours(server))


def test_a_cluster_in_redis_is_not_left_with_a_finalizer_that_nothing_removes(helm, server, helm_failed):
    """KubeRay removes its finalizer only of a RayCluster that has gcsFaultToleranceOptions."""
    image = {"image": {"repository": "x"}}
    bundled = image | {"redis": {"mode": "bundled"}}
    helm("install", values=bundled)
    running = server.objects[("rayclusters", "demo-farshore")]
    running["metadata"]["finalizers"] = ["ray.io/gcs-ft-redis-cleanup-finalizer"]
    before = ours(server)
    with pytest.raises(helm_failed, match="kubectl -n llm delete raycluster demo-farshore"):
        helm("upgrade", values=image)
    assert ours(server) == before
    helm("upgrade", values=bundled)
    # As that command does.
    del server.objects[("rayclusters", "demo-farshore")]
    helm("upgrade", values=image)
    assert "gcsFaultToleranceOptions" not in cluster(server)


def test_helm_removes_the_cluster_after_what_its_last_job_would_need(helm, server):
    """Why docs/kubernetes.md has the RayCluster deleted first: KubeRay's Job, which cleans Redis, has the
    head's ServiceAccount, Secrets and volumes."""
    helm("install", values={"image": {"repository": "x"}, "redis": {"mode": "bundled"}})
    server.writes.clear()
    helm("uninstall")
    removed = [plural for verb, plural, name in server.writes if verb == "DELETE" and "helm" not in name]
    assert removed[-1] == "rayclusters"
    assert {"serviceaccounts", "secrets", "configmaps"} <= set(removed)


def test_the_stand_in_refuses_a_changed_selector(helm, server, helm_failed):
    image = {"image": {"repository": "x"}}
    helm("install", values=image)
    with pytest.raises(helm_failed, match=r"spec\.selector: field is immutable"):
        helm("upgrade", values=image | {"nameOverride": "other", "fullnameOverride": "demo-farshore"})
    helm("uninstall")
    bundled = {"redis": {"mode": "bundled"}}
    helm("install", values=image | bundled)
    with pytest.raises(helm_failed, match=r"spec\.volumeClaimTemplates: field is immutable"):
        helm("upgrade", values=image | {"redis": {"mode": "bundled", "bundled": {"size": "9Gi"}}})


def test_the_stand_in_refuses_two_entries_of_one_key(server):
    """As server-side apply does; the chart refuses such values before Helm sends anything."""
    pod = {"containers": [{"name": "a", "env": [{"name": "HOME", "value": "/"}] * 2}]}
    body = {"kind": "Deployment", "metadata": {"name": "x"}, "spec": {"template": {"spec": pod}}}
    connection = HTTPConnection(*server.server_address)
    path = "/apis/apps/v1/namespaces/llm/deployments/x?fieldValidation=Strict"
    connection.request(
        "PATCH", path, json.dumps(body), headers={"Content-Type": "application/apply-patch+yaml"}
    )
    answer = connection.getresponse()
    said = json.loads(answer.read())["message"]
    connection.close()
    assert answer.status == 500 and server.objects == {}
    assert ".spec.template.spec.containers[0].env: duplicate entries" in said


def test_a_wrong_value_is_refused_before_anything_is_made(helm, server, helm_failed):
    with pytest.raises(helm_failed, match="/spec/kvMemory"):
        helm("install", values={"image": {"repository": "x"}, "spec": {"kvMemory": "1Gi"}})
    assert server.objects == {} and server.writes == []
