"""What KubeRay, Kubernetes' controllers and an Ingress controller make of well-formed objects."""

import json
import re

import pytest
import yaml

GROUPS = ("head", "dense", "attention")


def ray_pods(objects):
    """Component -> pod template of the RayCluster."""
    cluster = objects[("RayCluster", "demo-farshore")]["spec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return dict(zip(GROUPS, (group["template"]["spec"] for group in groups), strict=True))


@pytest.mark.parametrize(
    "model",
    [
        {"source": "pvc", "pvc": {"claimName": "models"}},
        {"source": "hostPath", "hostPath": {"path": "/data"}},
        {"source": "init", "init": {"image": "busybox", "command": ["cp", "a", "/models"]}},
    ],
    ids=lambda model: model["source"],
)
def test_pods_that_read_the_model_have_it_and_those_that_hold_kv_do_not(render, model):
    """A memory node may be in a zone that a claim can't reach, and has no room for copies of a model."""
    objects = render({"model": model})
    pods = ray_pods(objects)
    pods["gateway"] = objects[("Deployment", "demo-farshore-gateway")]["spec"]["template"]["spec"]
    having = {name for name, pod in pods.items() if "model" in [volume["name"] for volume in pod["volumes"]]}
    assert having == {"head", "dense", "gateway"}
    for name, pod in pods.items():
        made = [container["name"] for container in pod["initContainers"]]
        assert made == ["token", "model"] if name in having and model["source"] == "init" else ["token"]
        for container in pod["containers"]:
            assert ("model" in [mount["name"] for mount in container["volumeMounts"]]) == (name in having)


def test_kuberay_can_read_what_nodes_declare(render):
    """It takes quotes off and reads JSON before it adds the GPUs and TPUs of limits."""
    cluster = render()[("RayCluster", "demo-farshore")]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert json.loads(group["rayStartParams"]["resources"].strip("'\"` "))["farshore"] == 1


def test_ray_asks_for_the_token_whatever_the_operator_does(render):
    """An operator that is older than its CRDs ignores authOptions."""
    objects = render()
    wanted = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/farshore/token"}
    for pod in ray_pods(objects).values():
        for container in pod["containers"]:
            env = {each["name"]: each.get("value") for each in container["env"]}
            assert wanted.items() <= env.items()
            (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == "/run/farshore"]
            assert mount["name"] == "token"


def test_the_port_that_prometheus_finds_by_name_is_the_one_of_the_metrics(render):
    """KubeRay adds a port "metrics" where there is none, always 8080."""
    for pod in ray_pods(render({"ray": {"ports": {"metrics": 9100}}})).values():
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports["metrics"] == 9100


def test_kuberay_does_not_wait_for_a_redis_that_helm_has_removed(render):
    def annotations(redis):
        return render({"redis": redis})[("RayCluster", "demo-farshore")]["metadata"].get("annotations", {})

    assert annotations({"mode": "bundled"}) == {"ray.io/gcs-ft-deletion-timeout": "60"}
    assert not annotations({"mode": "external", "external": {"url": "redis://redis.example.com"}})
    assert not annotations({"mode": "embedded"})


def test_pods_that_never_get_ready_do_not_keep_a_node_from_being_drained(render):
    objects = render({"dense": {"replicas": 2}})
    budgets = {name: each["spec"] for (kind, name), each in objects.items() if kind == "PodDisruptionBudget"}
    always = {
        name.removeprefix("demo-farshore-")
        for name, spec in budgets.items()
        if spec.get("unhealthyPodEvictionPolicy") == "AlwaysAllow"
    }
    # Without Redis an evicted head is a lost cluster, ready or not.
    assert always == {"dense", "attention", "gateway"}
    assert budgets["demo-farshore-head"]["minAvailable"] == 1


@pytest.mark.parametrize("wait_s", [30, 1800, 86400])
def test_a_rollout_of_gateways_has_not_failed_while_they_may_wait_for_a_model(render, wait_s):
    deployment = render({"gateway": {"waitSeconds": wait_s}})[("Deployment", "demo-farshore-gateway")]["spec"]
    probe = deployment["template"]["spec"]["containers"][0]["startupProbe"]
    most_s = probe["failureThreshold"] * probe["periodSeconds"]
    assert wait_s < most_s <= deployment["progressDeadlineSeconds"]


def test_redis_is_not_restarted_while_it_reads_its_volume(render):
    """It listens meanwhile, and answers a ping with an error: only the startup probe is patient."""
    redis = render({"redis": {"mode": "bundled"}})[("StatefulSet", "demo-farshore-redis")]["spec"]
    (container,) = redis["template"]["spec"]["containers"]
    assert container["startupProbe"]["exec"] == container["livenessProbe"]["exec"]
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 300


def test_the_ingresses_annotations_are_those_that_ingress_nginx_knows(render):
    """It ignores others without a word. gRPC's timeouts are those of the proxy there."""
    enabled = {kind: {"enabled": True, "host": f"{kind}.example.com"} for kind in ("grpc", "http")}
    objects = render({"ingress": enabled})
    prefix = "nginx.ingress.kubernetes.io/"
    grpc, http = (
        objects[("Ingress", f"demo-farshore-{kind}")]["metadata"]["annotations"] for kind in enabled
    )
    assert grpc == {
        f"{prefix}backend-protocol": "GRPC",
        f"{prefix}proxy-read-timeout": "3600",
        f"{prefix}proxy-send-timeout": "3600",
    }
    assert http == {f"{prefix}proxy-buffering": "off", f"{prefix}proxy-read-timeout": "3600"}


def test_more_egress_is_for_every_pod_that_calls_something(render):
    """Also for the one of `helm test`, which asks DNS for the gateways: DNS may listen on another port."""
    rule = {"ports": [{"port": 5353, "protocol": "UDP"}]}
    objects = render({"redis": {"mode": "bundled"}, "networkPolicy": {"extraEgress": [rule]}})
    having = {
        name.removeprefix("demo-farshore-")
        for (kind, name), each in objects.items()
        if kind == "NetworkPolicy" and rule in each["spec"].get("egress", ())
    }
    assert having == {*GROUPS, "gateway", "test"}


def test_large_ids_are_whole_numbers(render):
    """Those of OpenShift's namespaces are above 10^9, which Helm's templates write as 1e+09 by default."""
    objects = render({"security": {"runAsUser": 1000660000, "runAsGroup": 1000670000}})
    for pod in ray_pods(objects).values():
        ids = [pod["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")]
        assert ids == [1000660000, 1000670000, 1000670000]
        assert all(isinstance(each, int) for each in ids)


@pytest.mark.parametrize("tag", ["1.2.3", "_1", "v1-", "a" * 62 + "._" + "b" * 60, "1.0_"])
def test_the_label_of_the_version_is_one_whatever_the_tag_is(render, tag):
    labels = render({"image": {"tag": tag}})[("ConfigMap", "demo-farshore")]["metadata"]["labels"]
    version = labels["app.kubernetes.io/version"]
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", version) and version in tag


def test_no_line_ends_with_a_space(call_helm, examples):
    for values in examples.values():
        for text in call_helm("render", values=values, name="demo", namespace="llm").values():
            assert [line for line in text.splitlines() if line != line.rstrip()] == []
            yaml.safe_load_all(text)
