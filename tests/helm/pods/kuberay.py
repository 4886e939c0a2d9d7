"""The pods that KubeRay makes of a RayCluster: its `ray start`, its variables and its init container.

Written after what `ray-operator/controllers/ray/common` of KubeRay v1.7.0 does: in pod.go BuildPod,
DefaultHeadPodTemplate, DefaultWorkerPodTemplate, generateRayStartCommand, convertParamMap,
setContainerEnvVars, SetContainerTokenAuthEnvVars and configureRedisFT, in service.go BuildServiceForHeadPod;
with the operator's default feature gates and variables. Left out: the autoscaler, TLS, GPUs, and probes, of
which the chart brings its own. Used by ``conftest``.
"""

import copy

DOMAIN = "cluster.local"
SWITCHES = ("true", "false")
WITH_A_VALUE = ("log-color", "include-dashboard", "include-log-monitor")
"""Options of `ray start` to which KubeRay passes "true" and "false"."""

BASH = ["/bin/bash", "-c", "--"]

WAIT = """
SECONDS=0
while true; do
    if (( SECONDS <= 120 )); then
        if ray health-check --address {address} > /dev/null 2>&1; then
            echo "GCS is ready."
            break
        fi
        echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
    else
        if ray health-check --address {address}; then
            break
        fi
    fi
    sleep 5
done
"""


def head_service(cluster):
    """The Service that KubeRay makes for the head."""
    name = cluster["metadata"]["name"]
    given = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    labels = _labels(name, "head")
    labels.pop("ray.io/is-ray-node")
    labels = {key: given.get(key, value) for key, value in labels.items()}
    return {
        "kind": "Service",
        "metadata": {"name": f"{name}-head-svc", "namespace": cluster["metadata"]["namespace"]},
        "spec": {"selector": labels},
    }


def pods(cluster):
    """The head's pod, then those of the groups."""
    spec = cluster["spec"]
    head = _pod(cluster, spec["headGroupSpec"], "headgroup", f"{cluster['metadata']['name']}-head")
    groups = [
        _pod(cluster, group, name, f"{cluster['metadata']['name']}-{name}-worker-{number}")
        for group in spec["workerGroupSpecs"]
        for name in [group["groupName"]]
        for number in range(group["replicas"])
    ]
    return [head, *groups]


def _pod(cluster, group, group_name, pod_name):
    node_type = "head" if group_name == "headgroup" else "worker"
    meta = cluster["metadata"]
    service = head_service(cluster)["metadata"]["name"]
    host = f"{service}.{meta['namespace']}.svc.{DOMAIN}"
    port = cluster["spec"]["headGroupSpec"]["rayStartParams"].get("port", "6379")
    template = copy.deepcopy(group["template"])
    pod = {"kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
    pod["metadata"] |= {"name": pod_name, "namespace": meta["namespace"]}
    # Some of KubeRay's labels give way to the template's, others do not.
    pod["metadata"]["labels"] = {
        **_labels(meta["name"], node_type),
        **template["metadata"]["labels"],
        "ray.io/cluster": meta["name"],
        "ray.io/node-type": node_type,
        "ray.io/group": group_name,
    }
    ray = pod["spec"]["containers"][0]
    inits = pod["spec"].setdefault("initContainers", [])
    params = dict(group["rayStartParams"])
    address = f"{host}:{port}"
    if node_type == "worker":
        waiting = copy.deepcopy(
            {key: ray[key] for key in ("image", "env", "volumeMounts", "securityContext")}
        )
        waiting |= {"name": "wait-gcs-ready", "command": BASH, "args": [WAIT.format(address=address)]}
        inits.append(waiting | {"resources": {"limits": {"cpu": "200m", "memory": "256Mi"}}})
        params.setdefault("address", address)
    else:
        params.setdefault("dashboard-host", "0.0.0.0")
    params.setdefault("metrics-export-port", "8080")
    params.setdefault("dashboard-agent-listen-port", "52365")
    params["block"] = "true"
    _survive_the_head(cluster, ray, params, node_type)
    _prove_the_token(cluster, [ray, *(each for each in inits if each["name"] == "wait-gcs-ready")])
    limits = ray["resources"]["limits"]
    params.setdefault("num-cpus", limits["cpu"])
    params.setdefault("memory", str(_bytes(limits["memory"])))
    command = f"ray start {'--head ' if node_type == 'head' else ''}{_options(params)}"
    ray["command"] = BASH
    ray["args"] = ["ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; " + command]
    for container in inits:
        name = host if node_type == "worker" else ""
        container.setdefault("env", []).extend(
            [{"name": "FQ_RAY_IP", "value": name}, {"name": "RAY_IP", "value": name.split(".")[0]}]
        )
    _describe(ray, host if node_type == "worker" else "127.0.0.1", port, command, node_type)
    return pod


def _labels(cluster_name, node_type):
    return {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster_name,
        "ray.io/node-type": node_type,
        "ray.io/identifier": f"{cluster_name}-{node_type}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }


def _options(params):
    flags = []
    for name, value in sorted(params.items()):
        if value.lower() in SWITCHES and name not in WITH_A_VALUE:
            flags += [f" --{name} "] if value.lower() == "true" else []
        else:
            flags.append(f" --{name}={value} ")
    return "".join(flags)


def _bytes(quantity):
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


def _add(container, name, value):
    """Adds a variable, unless the chart has it."""
    given = container.setdefault("env", [])
    if not any(each["name"] == name for each in given):
        given.append({"name": name, **({"value": value} if isinstance(value, str) else {"valueFrom": value})})


def _survive_the_head(cluster, ray, params, node_type):
    options = cluster["spec"].get("gcsFaultToleranceOptions")
    if options is None:
        return
    if node_type == "worker":
        _add(ray, "RAY_gcs_rpc_server_reconnect_timeout_s", "600")
        return
    # KubeRay takes the object's UID.
    _add(ray, "RAY_external_storage_namespace", "6c0ad1c9-4a6b-4c5e-8a86-0e8cc3b0f7b1")
    _add(ray, "RAY_REDIS_ADDRESS", options["redisAddress"])
    for key, name in (("redisUsername", "REDIS_USERNAME"), ("redisPassword", "REDIS_PASSWORD")):
        if key in options:
            params[name.lower().replace("_", "-")] = f"${name}"
            ray["env"].append({"name": name, **options[key]})


def _prove_the_token(cluster, containers):
    options = cluster["spec"]["authOptions"]
    secret = {"secretKeyRef": {"name": options["secretName"], "key": "auth_token"}}
    for container in containers:
        _add(container, "RAY_AUTH_MODE", options["mode"])
        _add(container, "RAY_AUTH_TOKEN", secret)


def _describe(ray, host, port, command, node_type):
    if node_type == "worker":
        ray["env"] += [{"name": "FQ_RAY_IP", "value": host}, {"name": "RAY_IP", "value": host.split(".")[0]}]
    fields = {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_CLOUD_INSTANCE_ID": "metadata.name",
        "RAY_NODE_TYPE_NAME": "metadata.labels['ray.io/group']",
    }
    ray["env"] += [{"name": n, "valueFrom": {"fieldRef": {"fieldPath": p}}} for n, p in fields.items()]
    ray["env"].append({"name": "KUBERAY_GEN_RAY_START_CMD", "value": command})
    _add(ray, "RAY_PORT", port)
    _add(ray, "RAY_ADDRESS", f"{host}:{port}")
    _add(ray, "RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    if node_type == "head":
        tags = "kuberay_version=v1.7.0;kuberay_crd=RayCluster"
        ray["env"].append({"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": tags})
    _add(ray, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1")
