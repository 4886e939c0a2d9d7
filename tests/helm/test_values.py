"""The chart's values mean to the program and to Ray what they say."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from farshore.client.cli.main import parser
from farshore.client.cli.options.cluster import cluster_config
from farshore.controller.launch.ray_settings import ENVIRONMENT, MARK, OBJECT_STORE_BYTES, QUICK_VERDICT
from farshore.controller.launch.resources import CUDA_PROCESS_BYTES
from farshore.gateway import __main__ as gateway_main
from farshore.kvstore.directory.redis.address import RedisAddress
from farshore.model_spec import ModelSpec
from farshore.workers.whereabouts import NODE, ZONE

CHART = Path(__file__).parents[2] / "helm" / "farshore"

OF_A_PROCESS = {
    "host",
    "port",
    "http-port",
    "ray-address",
    "token-file",
    "dashboard",
    "config",
    "help",
    "json",
}
"""Options of `serve` that are of a process, not of a cluster."""

BY_THE_CHART = {"name", "dense-workers", "attention-workers", "no-gateway", "controller-port"} | {
    *("device", "attention-device", "state-dir"),
}


def kebab(name):
    return re.sub(r"(?=[A-Z])", "-", name).lower()


@pytest.fixture(scope="session")
def serve_options():
    """The names of the options of `farshore serve`."""
    (commands,) = (action for action in parser()._actions if isinstance(action.choices, dict))
    actions = commands.choices["serve"]._actions
    return {name[2:] for action in actions for name in action.option_strings if name.startswith("--")}


@pytest.fixture
def read(tmp_path):
    """read(objects, or options) -> the ClusterConfig that `serve` makes of the ConfigMap, or of options."""

    def config(given):
        file = tmp_path / "cluster.yaml"
        if isinstance(given, dict):
            maps = [each for (kind, _), each in given.items() if kind == "ConfigMap"]
            file.write_text(maps[0]["data"]["cluster.yaml"])
            given = ["--config", str(file)]
        args = parser().parse_args(["serve", *given])
        args.layers.complete(args, file=args.config, environment={})
        names = ("name", "dense_workers", "redis_url", "redis_password_file", "redis_ca_file")
        return cluster_config(args, names, model=args.model)

    return config


def test_spec_has_every_option_of_a_cluster_with_its_default(defaults, serve_options, render, read):
    redis = {name for name in serve_options if name.startswith("redis-")}
    expected = serve_options - OF_A_PROCESS - BY_THE_CHART - redis
    assert {kebab(key) for key in defaults["spec"]} == expected
    assert read(render()) == read(["--name", "demo-farshore"])


def test_every_value_of_spec_reaches_the_program(render, read):
    spec = {
        "model": "org/name",
        "servedModelName": ["one", "two"],
        "dtype": "float32",
        "maxModelLen": "32K",
        "ropeScaling": {"rope_type": "yarn", "factor": 4.0},
        "revision": "1234567",
        "tokenizer": "org/other",
        "chatTemplate": "/models/chat.jinja",
        "generationConfig": "none",
        "specialTokensInChat": "parse",
        "toolCallParser": "hermes",
        "reasoningParser": "think",
        "kvFormat": "int8",
        "kvMemory": "1.5GiB",
        "denseKvMemory": "1.25GiB",
        "placement": "local",
        "shardBy": "both",
        "maxDecodeStallMs": 150.5,
        "shardGrace": 20,
        "drainTimeout": 30,
        "speculate": 4,
    }
    config = read(render({"spec": spec, "attention": {"replicas": 3, "workersPerPod": 1}}))
    default = read(render())
    memory = ("kv_memory_bytes", "dense_kv_memory_bytes")
    for field in (*memory, "dtype", "kv_format", "placement", "shard_by", "attention_workers"):
        assert getattr(config, field) != getattr(default, field), field
    for field in ("max_decode_stall_ms", "shard_grace_s", "drain_timeout_s", "speculate"):
        assert getattr(config, field) != getattr(default, field), field
    for field in fields(ModelSpec):
        assert getattr(config.spec, field.name) != getattr(default.spec, field.name), field.name


def test_numbers_of_workers_are_pods_times_workers(render, read):
    limits = {"resources": {"limits": {"cpu": "8", "memory": "20Gi"}}}
    groups = {
        "dense": {"replicas": 2, "workersPerPod": 1, **limits},
        "attention": {"replicas": 3, "workersPerPod": 4, **limits},
    }
    objects = render(groups)
    config = read(objects)
    assert (config.dense_workers, config.attention_workers) == (2, 12)
    cluster = objects[("RayCluster", "demo-farshore")]["spec"]
    declared = {g["groupName"]: g["rayStartParams"]["resources"] for g in cluster["workerGroupSpecs"]}
    # Through KubeRay's shell.
    for name, takes in (("dense", {"dense": 1}), ("attention", {"attention": 4})):
        (word,) = shlex.split(declared[name])
        assert json.loads(word) == {"farshore": 1, **takes}
    assert json.loads(*shlex.split(cluster["headGroupSpec"]["rayStartParams"]["resources"])) == {MARK: 1}


GPU = {
    "enabled": True,
    "resource": "nvidia.com/gpu.shared",
    "runtimeClassName": "nvidia",
    "image": "registry.example.com/farshore:1-cuda",
}
LIMITS = {"limits": {"cpu": "8", "memory": "20Gi"}}
SSD = {"key": "disk", "operator": "Exists"}


def test_workers_on_gpus_get_nodes_images_and_options_for_them(render, read):
    group = {"workersPerPod": 4, "resources": LIMITS, "gpu": GPU, "tolerations": [SSD]}
    objects = render({"dense": group, "attention": {"replicas": 1}})
    config = read(objects)
    assert (config.device, config.attention_device, config.dense_workers) == ("cuda", "cpu", 4)
    cluster = objects[("RayCluster", "demo-farshore")]["spec"]
    head, dense, attention = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    pod = dense["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == GPU["image"] and pod["runtimeClassName"] == "nvidia"
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "20Gi", "nvidia.com/gpu.shared": 4}
    assert dense["rayStartParams"]["num-gpus"] == "4"
    assert pod["tolerations"] == [
        SSD,
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    ]
    for other in (head, attention):
        assert "num-gpus" not in other["rayStartParams"]
        spec = other["template"]["spec"]
        assert "runtimeClassName" not in spec and "tolerations" not in spec
        assert not [name for c in spec["containers"] for name in c["resources"]["limits"] if "/" in name]


def test_attention_workers_on_gpus_and_what_is_left_at_its_default(render, read):
    objects = render({"attention": {"gpu": {"enabled": True}, "resources": LIMITS}})
    config = read(objects)
    assert (config.device, config.attention_device) == ("auto", "cuda")
    group = objects[("RayCluster", "demo-farshore")]["spec"]["workerGroupSpecs"][1]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and "runtimeClassName" not in pod
    assert container["image"] == "registry.example.com/farshore:0.1.0"


def test_the_chart_asks_for_as_much_memory_as_the_program(render, helm_failed):
    """On a GPU the host holds neither weights nor KV."""

    def group(memory_bytes):
        limits = {"limits": {"cpu": "2", "memory": f"{memory_bytes >> 20}Mi"}}
        return {"gpu": {"enabled": True}, "resources": limits}

    for name in ("dense", "attention"):
        assert render({name: group(CUDA_PROCESS_BYTES)})
        with pytest.raises(helm_failed, match=f"{name}.resources.limits.memory.*are on the GPU"):
            render({name: group(CUDA_PROCESS_BYTES - (1 << 20))})
    with pytest.raises(helm_failed, match=r"dense\.resources\.limits\.memory.*spec\.denseKvMemory 96GiB"):
        render({"spec": {"denseKvMemory": "96GiB"}})
    assert render({"spec": {"denseKvMemory": "96GiB"}, "dense": group(CUDA_PROCESS_BYTES)})


def test_only_what_needs_new_pods_changes_their_template(render, examples, merged):
    """KubeRay replaces all pods whose template changes, and numbers of workers must not do that."""
    base = examples["two-dense-eight-memory"]

    def templates(**groups):
        cluster = render(merged(base, groups))[("RayCluster", "demo-farshore")]["spec"]
        return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]

    assert templates() == templates(attention={"replicas": 9}, dense={"replicas": 1})
    assert all(a != b for a, b in zip(templates(), templates(spec={"kvFormat": "int4"}), strict=True))


@pytest.mark.parametrize(
    "redis",
    [
        {"mode": "bundled"},
        {"mode": "external", "external": {"url": "redis://redis.example.com"}},
        {
            "mode": "external",
            "external": {"url": "rediss://ops@r.example.com:6380/2", "passwordSecret": "p", "caSecret": "c"},
        },
    ],
)
def test_gateways_workers_and_ray_use_one_redis(render, read, redis):
    objects = render({"redis": redis, "networkPolicy": {"redisServers": []}})
    config = read(objects)
    (gateway,) = objects[("Deployment", "demo-farshore-gateway")]["spec"]["template"]["spec"]["containers"]
    (url,) = (each.partition("=")[2] for each in gateway["command"] if each.startswith("--directory="))
    assert RedisAddress.parse(url) == config.redis
    ray = objects[("RayCluster", "demo-farshore")]["spec"]["gcsFaultToleranceOptions"]
    expected = f"{config.redis.host}:{config.redis.port}"
    assert ray["redisAddress"] == ("rediss://" if config.redis.tls else "") + expected
    assert ray.get("redisUsername", {}).get("value", "") == config.redis.username
    assert ("redisPassword" in ray) == bool(config.redis.password_file)


def test_a_directory_in_the_controller_is_where_its_service_leads(render):
    objects = render()
    (gateway,) = objects[("Deployment", "demo-farshore-gateway")]["spec"]["template"]["spec"]["containers"]
    assert "--directory=grpc://demo-farshore-controller:50052" in gateway["command"]
    head = objects[("RayCluster", "demo-farshore")]["spec"]["headGroupSpec"]["template"]
    launcher = head["spec"]["containers"][1]
    assert "--controller-port=50052" in launcher["command"]
    # The controller runs in the head's own container.
    (kept,) = (each.partition("=")[2] for each in launcher["command"] if each.startswith("--state-dir="))
    for container in head["spec"]["containers"]:
        assert kept in [mount["mountPath"] for mount in container["volumeMounts"]]
    service = objects[("Service", "demo-farshore-controller")]["spec"]
    assert service["ports"][0]["port"] == service["ports"][0]["targetPort"] == 50052
    assert service["selector"].items() <= (head["metadata"]["labels"] | {"ray.io/node-type": "head"}).items()


def test_the_program_takes_the_commands_that_pods_run(render):
    objects = render({"redis": {"mode": "bundled"}})
    cluster = objects[("RayCluster", "demo-farshore")]["spec"]
    head, dense, _ = (g["template"]["spec"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    commands = [
        head["containers"][1]["command"],
        dense["containers"][0]["lifecycle"]["preStop"]["exec"]["command"],
    ]
    commands.append(objects[("Pod", "demo-farshore-test")]["spec"]["containers"][0]["command"])
    for program, *arguments in commands:
        assert program == "farshore"
        parser().parse_args(arguments)
    gateway = objects[("Deployment", "demo-farshore-gateway")]["spec"]["template"]["spec"]["containers"][0]
    program, command, *arguments = gateway["command"]
    assert (program, command) == ("farshore", "gateway")
    gateway_main._parser().parse_args(arguments)


def test_ray_is_set_up_as_farshore_sets_it_up(render, defaults):
    cluster = render()[("RayCluster", "demo-farshore")]["spec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    for group, expected in zip(groups, (ENVIRONMENT | QUICK_VERDICT, ENVIRONMENT, ENVIRONMENT), strict=True):
        container = group["template"]["spec"]["containers"][0]
        set_here = {each["name"]: each.get("value") for each in container["env"]}
        of_ray = {name: value for name, value in set_here.items() if name.startswith("RAY_")}
        assert {name: value for name, value in of_ray.items() if not name.startswith("RAY_AUTH")} == expected
        assert group["rayStartParams"]["object-store-memory"] == str(OBJECT_STORE_BYTES)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    ports = [port for port in defaults["ray"]["ports"].values() if isinstance(port, int)]
    ranges = [
        range(r["low"], r["high"] + 1)
        for r in (defaults["ray"]["ports"][k] for k in ("rayWorkers", "workers"))
    ]
    ports.append(defaults["launcher"]["controllerPort"])
    assert len(set(ports)) == len(ports)
    assert not any(port in ports_of for port in ports for ports_of in ranges)
    assert not set(ranges[0]) & set(ranges[1])


def test_workers_are_told_where_they_run(render):
    """By the downward API: the names of their machine and zone, which need no right to read nodes."""
    cluster = render()[("RayCluster", "demo-farshore")]["spec"]
    for group in cluster["workerGroupSpecs"]:
        env = {
            each["name"]: each.get("valueFrom") for each in group["template"]["spec"]["containers"][0]["env"]
        }
        assert env[NODE] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        assert env[ZONE] == {"fieldRef": {"fieldPath": "metadata.labels['topology.kubernetes.io/zone']"}}


def test_ray_knows_every_option_that_kuberay_gives_it(render):
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--help"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    known = set(re.findall(r"^ +--([a-z-]+) ", usage, re.MULTILINE))
    cluster = render()[("RayCluster", "demo-farshore")]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["rayStartParams"].keys() <= known


GROUPS = ["head", "dense", "attention"]
NAMED = {
    # A template's name for a part of the values: the parts.
    "Values": [""],
    "values": [""],
    "model": ["model"],
    "scale": ["gateway.autoscaling"],
    "group": GROUPS,
    "gpu": ["dense.gpu", "attention.gpu"],
    "gateway": ["gateway"],
    "redis": ["redis.bundled"],
    "pod": [*GROUPS, "gateway", "redis.bundled"],
    "ports": ["ray.ports"],
    "ingress": ["ingress.grpc", "ingress.http"],
}


def test_no_value_is_dead(defaults):
    """A template reads every value by its path; an object that is written out whole counts as one value."""
    templates = "".join(file.read_text() for file in (CHART / "templates").rglob("*.*"))
    read = set()
    for name, keys in re.findall(r"\b(\w+)\.((?:[a-z]\w*\.)*[a-z]\w*)", templates):
        read |= {f"{part}.{keys}".removeprefix(".") for part in NAMED.get(name, ())}
    whole = ("spec", "resources", "initResources", "annotations")

    def leaves(values, path=()):
        for key, value in values.items():
            if isinstance(value, dict) and value and key not in whole:
                yield from leaves(value, (*path, key))
            else:
                yield ".".join((*path, key))

    assert set(leaves(defaults)) - read == set()


def test_notes_say_what_matters(notes):
    said = notes({})
    assert "KubeRay operator" in said and "If the head's pod is lost" in said
    assert "farshore generate --server" in said and "port-forward svc/demo-farshore-dashboard" in said
    said = notes({"redis": {"mode": "bundled"}, "networkPolicy": {"enabled": False}})
    assert "If the head's pod is lost" not in said and "network policies are off" in said


def leaves_of(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield value
    for each in parts:
        yield from leaves_of(each)


def test_names_that_yaml_reads_as_numbers_stay_text(render):
    """Kubernetes refuses a number where it wants a text."""
    name = "31415"
    scheduled = {"priorityClassName": name, "nodeSelector": {"disk": name}}
    values = {
        "image": {"pullSecrets": [name], "tag": name},
        "model": {"source": "pvc", "pvc": {"claimName": name}},
        "token": {"existingSecret": name},
        "redis": {
            "mode": "bundled",
            "passwordKey": name,
            "bundled": {"existingSecret": name, "storageClass": name, "image": name, "size": name}
            | scheduled,
        },
        "serviceAccount": {"name": name},
        "ingress": {"className": name, "http": {"enabled": True, "host": name, "tlsSecret": name}},
        "gateway": scheduled,
        "head": scheduled | {"shmSize": name},
        "dense": scheduled | {"gpu": {"enabled": True, "runtimeClassName": name}},
        "nameOverride": name,
        "fullnameOverride": "true",
    }
    objects = render(values, name="1e5")
    found = [leaf for each in objects.values() for leaf in leaves_of(each)]
    assert found.count(name) > 50 and int(name) not in found and float("1e5") not in found
    assert ("RayCluster", "true") in objects


def test_a_fraction_of_a_core_is_text(render):
    """KubeRay's CRD knows whole numbers and texts."""
    half = {"requests": {"cpu": 0.5}}
    groups = ("head", "launcher", "dense", "attention", "gateway")
    objects = render({name: {"resources": half} for name in groups} | {"initResources": half})
    parts = [leaf for each in objects.values() for leaf in leaves_of(each) if isinstance(leaf, dict)]
    asked = [part["requests"]["cpu"] for part in parts if "requests" in part]
    assert set(asked) == {"0.5"} and len(asked) == 10
