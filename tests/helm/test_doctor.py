"""``farshore doctor --kube`` on a stand-in for Kubernetes' API server: see ``doctor_server``."""

import base64
import json
from pathlib import Path

import pytest
import yaml

from farshore.client.cli.main import main
from farshore.client.doctor import kuberay

BESIDE = [folder / "shared" / "kuberay" / "ray.io_rayclusters.yaml" for folder in Path(__file__).parents[3:]]
POD = "demo-farshore-dense-worker-x"
PULL_MESSAGE = 'Back-off pulling image "registry.example.com/farshore:0.1.0"'
UNSCHEDULABLE = "0/3 nodes are available: 3 Insufficient memory."


def container(server, **state):
    """The status of the dense pod's container, changed."""
    (status,) = server.objects["pods", POD]["status"]["containerStatuses"]
    status |= state


def no_crd(server):
    server.ray_versions = []


def old_crd(server):
    del server.ray_spec["properties"]["authOptions"]


def alpha_crd(server):
    server.ray_versions = ["v1alpha1"]


def crash_loop(server):
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
    not_ready(server)
    container(server, state=waiting, lastState=ended, restartCount=7)
    server.log = "starting\nfarshore: error: model x: not found\n\n"


def out_of_memory(server):
    container(server, restartCount=1, lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}})


def image_pull(server):
    container(server, state={"waiting": {"reason": "ImagePullBackOff", "message": PULL_MESSAGE}})
    server.warn("Pod", POD, "Failed to pull image: unauthorized")


def unschedulable(server):
    status = server.objects["pods", POD]["status"]
    refused = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNSCHEDULABLE}
    status |= {"phase": "Pending", "conditions": [refused], "containerStatuses": []}


def no_redis_secret(server):
    del server.objects["secrets", "demo-farshore-redis"]


def other_key(server):
    server.objects["secrets", "demo-farshore-token"]["data"] = {"token": "eA=="}


def password_with_a_space(server):
    secret = server.objects["secrets", "demo-farshore-redis"]
    secret["data"]["redis-password"] = base64.b64encode(b"a b\n").decode()


def no_pull_secret(server):
    del server.objects["secrets", "registry"]


def not_ready(server):
    unready = {"type": "Ready", "status": "False", "message": "containers with unready status: [ray]"}
    server.objects["pods", POD]["status"]["conditions"] = [unready | {"lastTransitionTime": "noon"}]


def not_mounted(server):
    container(server, state={"waiting": {"reason": "ContainerCreating"}})
    not_ready(server)
    server.warn("Pod", POD, "MountVolume.SetUp failed: timed out")


def not_made(server):
    refused = {"reason": "CreateContainerConfigError", "message": "container has runAsNonRoot"}
    container(server, state={"waiting": refused})


def no_verb(server):
    server.denied = {("patch", "rayclusters")}


def unbound(server):
    claim = server.objects["persistentvolumeclaims", "data-demo-farshore-redis-0"]
    claim["spec"]["storageClassName"], claim["status"] = "fast", {"phase": "Pending"}
    server.warn("PersistentVolumeClaim", claim["metadata"]["name"], 'storageclass "fast" not found')


def no_operator(server):
    del server.objects["pods", "kuberay-1"]


def old_operator(server):
    (its,) = server.objects["pods", "kuberay-1"]["spec"]["containers"]
    its["image"] = "quay.io/kuberay/operator:v1.4.2"


def operator_elsewhere(server):
    (its,) = server.objects["pods", "kuberay-1"]["spec"]["containers"]
    its["args"] = ["--watch-namespace", "a,b"]


def sick_node(server):
    ready = server.objects["nodes", "node-0"]["status"]["conditions"][0]
    ready |= {"status": "Unknown", "message": "Kubelet stopped posting node status."}


def small_nodes(server):
    for number in range(3):
        server.objects["nodes", f"node-{number}"]["status"]["allocatable"]["memory"] = "3500Mi"


def quota(server):
    condition = {"type": "RayClusterReplicaFailure", "status": "True", "message": "exceeded quota: team"}
    server.objects["rayclusters", "demo-farshore"]["status"]["conditions"] = [condition]


def quota_of_redis(server):
    """A StatefulSet says nothing of it in its status."""
    server.objects["statefulsets", "demo-farshore-redis"]["status"] = {"replicas": 0}
    server.warn("StatefulSet", "demo-farshore-redis", "create Pod x failed: exceeded quota: team")


def evicted(server):
    failed = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    server.objects["pods", POD]["status"] = failed


def not_installed(server):
    server.objects = {key: each for key, each in server.objects.items() if key[0] in ("pods", "nodes")}
    for name in [name for plural, name in server.objects if plural == "pods" and name != "kuberay-1"]:
        del server.objects["pods", name]


BROKEN = {
    # Each: what breaks, the check that must find it, its subject, words of the problem, words of the fix.
    no_crd: ("operator", "CRD rayclusters.ray.io", "does not know the kind", "helm install kuberay-operator"),
    old_crd: (
        "operator",
        "CRD rayclusters.ray.io",
        "too old: a RayCluster's spec lacks authOptions",
        "apply",
    ),
    alpha_crd: ("operator", "CRD rayclusters.ray.io", "too old: it serves v1alpha1", "--server-side"),
    no_operator: ("operator", "KubeRay operator", "no pod of it runs", "helm install kuberay-operator"),
    old_operator: ("operator", "pod kuberay-1 of the namespace kuberay", "is 1.4, and", "1.7 or later"),
    operator_elsewhere: ("operator", "KubeRay operator", "not watch the namespace llm", "watchNamespace"),
    crash_loop: (
        "pods",
        f"pod {POD}, container ray",
        "(7 restarts); last it ended with exit code 1, Error: farshore: error: model x: not found",
        f"kubectl -n llm logs {POD} -c ray --previous",
    ),
    out_of_memory: ("pods", f"pod {POD}, container ray", "code 137, OOMKilled", "dense.resources.limits.mem"),
    image_pull: ("pods", f"pod {POD}, container ray", "unauthorized", "image.pullSecrets"),
    unschedulable: ("pods", f"pod {POD}", UNSCHEDULABLE, "dense.resources"),
    evicted: ("pods", f"pod {POD}", "Evicted: The node was low on resource", f"delete pod {POD}"),
    no_redis_secret: (
        "secrets",
        "secret demo-farshore-redis",
        "Redis's password",
        "from-file=redis-password",
    ),
    other_key: ("secrets", "secret demo-farshore-token", "it lacks auth_token", "edit secret"),
    password_with_a_space: (
        "secrets",
        "secret demo-farshore-redis",
        "redis-password has a space or a quote in it",
        "openssl rand",
    ),
    no_pull_secret: ("secrets", "secret registry", "image.pullSecrets names it", ".dockerconfigjson=FILE"),
    not_mounted: ("pods", f"pod {POD}", "unready status: [ray] (MountVolume.SetUp failed", "describe pod"),
    not_ready: ("pods", f"pod {POD}", "not ready since noon: containers with unready status", "logs"),
    not_made: ("pods", f"pod {POD}, container ray", "container has runAsNonRoot", "describe pod"),
    no_verb: ("access", "rayclusters.ray.io", "you may not patch rayclusters.ray.io", "--verb=patch"),
    unbound: (
        "volumes",
        "persistentvolumeclaim data-demo-farshore-redis-0",
        '"fast" not found',
        "redis.bundled",
    ),
    sick_node: ("nodes", "node node-0", "not ready: Kubelet stopped posting", "kubectl describe node node-0"),
    quota: ("workloads", "RayCluster demo-farshore", "exceeded quota: team", "helm upgrade"),
    quota_of_redis: ("workloads", "StatefulSet demo-farshore-redis", "exceeded quota: team", "helm upgrade"),
    not_installed: ("workloads", "release demo", "no gateway of this release", "helm install demo"),
}


def test_a_healthy_release_has_no_finding(doctor):
    code, shown, err = doctor("--json")
    checks = ["operator", "workloads", "nodes", "pods", "secrets", "volumes", "access"]
    assert shown == {"release": "demo", "namespace": "llm", "checks": checks, "findings": []}
    assert (code, err) == (0, "")
    assert doctor()[1] == f"nothing is wrong; checked: {', '.join(checks)}\n"


@pytest.mark.parametrize(
    "values",
    [
        *("default", "laptop", "one-dense-two-memory", "two-dense-eight-memory"),
        *("one-gpu-two-memory", "eight-gpu-sixteen-memory"),
    ],
)
def test_each_example_needs_what_it_names_and_no_more(
    doctor_server, render, examples, values, tmp_path, capsys
):
    """A cluster of three nodes without labels, volumes and credentials of its own."""
    server = doctor_server.DoctorServer(render(examples.get(values, {})))
    (tmp_path / "file").write_text(server.kubeconfig)
    main(["doctor", "--kube", "--release=demo", "-n=llm", f"--kubeconfig={tmp_path / 'file'}", "--json"])
    found = {(each["check"], each["subject"]) for each in json.loads(capsys.readouterr().out)["findings"]}
    server.shutdown()
    server.server_close()
    named = {("nodes", f"pods of {group}") for group in ("dense", "attention")}
    named.add(("volumes", "persistentvolumeclaim models"))
    wanted = {
        "one-dense-two-memory": named,
        "one-gpu-two-memory": named,
        "eight-gpu-sixteen-memory": named | {("secrets", "secret registry")},
        "two-dense-eight-memory": named | {("secrets", "secret registry")},
    }
    assert found == wanted.get(values, set())


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_what_is_broken_is_found_alone(doctor, server, broken):
    broken(server)
    code, shown, err = doctor("--json")
    assert (code, err) == (1, "")
    check, subject, problem, fix = BROKEN[broken]
    (found,) = shown["findings"]
    assert (found["check"], found["subject"]) == (check, subject)
    assert problem in found["problem"] and fix in found["fix"]


def test_groups_that_no_node_has_room_for(doctor, server):
    """A dense pod asks for 4Gi, one of the attention group for 3Gi, of which each node holds one."""
    small_nodes(server)
    found = {each["subject"]: each for each in doctor("--json")[1]["findings"]}
    assert "pods of attention" not in found
    assert "memory 4096Mi" in found["pods of dense"]["problem"]
    assert "room for 0" in found["pods of dense"]["problem"] and "3500Mi" in found["pods of dense"]["problem"]
    for number in range(3):
        taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
        server.objects["nodes", f"node-{number}"]["spec"]["taints"] = [taint]
    found = {each["subject"]: each for each in doctor("--json")[1]["findings"]}
    assert "no ready node of 3" in found["pods of attention"]["problem"]


def test_nodes_that_show_no_gpu(doctor_server, render, tmp_path, capsys):
    """Where one shows too few, the device plugin is there."""
    values = {"dense": {"gpu": {"enabled": True}, "resources": {"limits": {"cpu": "2", "memory": "4Gi"}}}}
    server = doctor_server.DoctorServer(render(values))
    (tmp_path / "file").write_text(server.kubeconfig)
    command = ["doctor", "--kube", "--release=demo", "-n=llm", f"--kubeconfig={tmp_path / 'file'}", "--json"]

    def found():
        main(command)
        return [(each["problem"], each["fix"]) for each in json.loads(capsys.readouterr().out)["findings"]]

    ((problem, fix),) = found()
    assert "nvidia.com/gpu 1" in problem and "the most that one has" in problem
    assert "no node shows nvidia.com/gpu" in fix and "device plugin" in fix and "driver" in fix
    server.objects["nodes", "node-1"]["status"]["allocatable"]["nvidia.com/gpu"] = "1"
    assert found() == []
    server.shutdown()
    server.server_close()


def test_checks_that_fail_hide_no_others(doctor, server):
    """Nodes may not be read, Secrets are never answered, a pod has no shape; the claim is still found."""
    server.denied = {("list", "nodes")}
    server.silent = {"demo-farshore-redis"}
    server.objects["pods", POD]["status"]["containerStatuses"] = [{}]
    unbound(server)
    code, shown, _ = doctor("--json", "--timeout=5")
    found = {each["check"]: each for each in shown["findings"]}
    assert code == 1 and set(found) == {"nodes", "secrets", "pods", "volumes"}
    assert "nodes is forbidden" in found["nodes"]["problem"]
    assert "no answer within 5 s" in found["secrets"]["problem"] and "--timeout" in found["secrets"]["fix"]
    assert "not as expected" in found["pods"]["problem"]
    assert "is Pending, not Bound" in found["volumes"]["problem"]


def test_a_server_that_does_not_listen(doctor, server):
    server.shutdown()
    server.server_close()
    code, out, err = doctor("--json")
    assert (code, out) == (3, "")
    assert "/version: no connection" in err and "refused" in err and err.count("\n") == 1


def test_a_kubeconfig_that_is_none(tmp_path, capsys):
    code = main(["doctor", "--kube", "--release=demo", f"--kubeconfig={tmp_path / 'none'}"])
    assert code == 1 and "give --kubeconfig FILE" in capsys.readouterr().err


def test_findings_as_text(doctor, server):
    no_verb(server)
    code, out, _ = doctor()
    assert code == 1 and out.startswith("access: rayclusters.ray.io\n  you may not patch")
    assert "\n  fix: ask for a Role" in out and "1 finding; checked: operator" in out


def test_every_field_of_the_raycluster_is_checked(bundled):
    spec = bundled["RayCluster", "demo-farshore"]["spec"]
    nested = ("authOptions", "upgradeStrategy", "gcsFaultToleranceOptions")
    paths = {f"{key}.{inner}" for key in nested for inner in spec[key]} | (set(spec) - set(nested))
    assert paths | {"gcsFaultToleranceOptions.redisUsername"} == set(kuberay.FIELDS)


def test_kuberays_own_definition_is_new_enough(doctor, server):
    crd = next((path for path in BESIDE if path.is_file()), None)
    if crd is None:
        pytest.skip("KubeRay's CRD is not part of the repository")
    versions = yaml.load(crd.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schemas = {each["name"]: each["schema"]["openAPIV3Schema"]["properties"]["spec"] for each in versions}
    server.ray_spec = schemas["v1"]
    assert doctor("--json")[0] == 0
    server.ray_spec = schemas["v1alpha1"]
    (found,) = doctor("--json")[1]["findings"]
    assert "authOptions.mode, authOptions.secretName, upgradeStrategy.type" in found["problem"]
