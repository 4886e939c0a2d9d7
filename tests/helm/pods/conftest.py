"""Fixtures that run what the chart renders, on hosts of their own."""

import concurrent.futures
import copy
import importlib.util
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import farshore
from farshore.benchmarks.cluster.hosts import hosts, why_not

READY_S = 150.0
SCRIPT = "#!{python}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n"


def _load(name):
    full = f"farshore_tests_helm_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


def _this_installation():
    """An Image of this Python with what is installed in it, instead of the Dockerfile's."""
    folders = {Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_path("purelib"))}
    folders |= {Path(path) for path in sys.path if path.endswith("site-packages")}
    # An editable installation's root.
    folders.add(Path(farshore.__file__).parents[1])
    folders = sorted(each for each in folders if each.is_dir() and not each.is_relative_to("/usr/lib"))
    tops = [each for each in folders if not any(each.is_relative_to(o) for o in folders if o != each)]
    scripts = {
        "/opt/farshore/bin/farshore": ("farshore.client.cli.main", "main"),
        "/opt/farshore/bin/ray": ("ray.scripts.scripts", "main"),
    }
    files = {
        path: SCRIPT.format(python=sys.executable, module=module, name=name)
        for path, (module, name) in scripts.items()
    }
    env = {
        "PATH": "/opt/farshore/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return _load("kubelet").Image(
        "/", extra=[top for top in tops if top != Path("/usr")], files=files, env=env
    )


class Cluster:
    """An installation of the chart. ``pods``: name -> Pod."""

    def __init__(self, kubelet, objects):
        self.kubelet = kubelet
        self.objects = objects
        self.pods = kubelet.pods

    def start(self, pods):
        """Starts pods beside one another, and returns when all are ready."""
        with concurrent.futures.ThreadPoolExecutor(len(pods)) as pool:
            starting = [pool.submit(self._start, pod) for pod in pods]
            try:
                for each in concurrent.futures.as_completed(starting):
                    each.result()
            except BaseException:
                # Others wait for the one that failed.
                for pod in tuple(self.pods.values()):
                    pod.kill()
                raise

    def _start(self, pod):
        made = self.kubelet.start(pod)
        made.run()
        _load("probes").await_ready(made, deadline_s=READY_S)

    def replace(self, pod):
        """What KubeRay or the Deployment makes in the place of a pod that is gone."""
        again = copy.deepcopy(pod.object)
        again["metadata"]["name"] += "-again"
        del self.pods[pod.name]
        self.start([again])

    def of(self, component):
        wanted = ("app.kubernetes.io/component", component)
        living = (pod for pod in self.pods.values() if pod.alive)
        return [pod for pod in living if wanted in pod.object["metadata"]["labels"].items()]

    def probes(self):
        """{(pod, container, kind of probe): (whether it passes, what it says)}."""
        probes = _load("probes")
        return {
            (pod.name, container["name"], kind): probes.ask(pod, container, container[kind])
            for pod in self.pods.values()
            if pod.alive
            for container in pod.object["spec"]["containers"]
            for kind in probes.KINDS
            if kind in container
        }

    def helm_test(self):
        """What the pod of `helm test` writes."""
        (pod,) = (each for (kind, _), each in self.objects.items() if kind == "Pod")
        made = self.kubelet.start(pod)
        try:
            (container,) = pod["spec"]["containers"]
            return made.run_to_end(container, pod["spec"]["activeDeadlineSeconds"])
        finally:
            made.kill()
            del self.pods[made.name]


def _pods(objects):
    """What KubeRay and Kubernetes make of the objects; adds KubeRay's Service to them."""
    kuberay = _load("kuberay")
    (cluster,) = (each for (kind, _), each in objects.items() if kind == "RayCluster")
    service = kuberay.head_service(cluster)
    objects["Service", service["metadata"]["name"]] = service
    made = kuberay.pods(cluster)
    for (kind, name), each in objects.items():
        if kind in ("Deployment", "StatefulSet"):
            for number in range(each["spec"]["replicas"]):
                pod = copy.deepcopy(each["spec"]["template"]) | {"kind": "Pod"}
                pod["metadata"] |= {"name": f"{name}-{number}", "namespace": each["metadata"]["namespace"]}
                for claim in each["spec"].get("volumeClaimTemplates", ()):
                    volume = claim["metadata"]["name"]
                    source = {"claimName": f"{volume}-{name}-{number}"}
                    pod["spec"]["volumes"].append({"name": volume, "persistentVolumeClaim": source})
                made.append(pod)
    return made


@pytest.fixture(scope="module")
def install(render):
    """install(values=None, *, image=None) -> a Cluster whose pods are ready. It ends with the module."""
    if reason := why_not():
        pytest.skip(reason)
    # Not in /tmp, which hosts do not share.
    with tempfile.TemporaryDirectory(prefix="farshore-", dir="/var/tmp") as folder, hosts() as made:
        Path(folder).chmod(0o755)

        kubelets = []

        def installed(values=None, *, image=None):
            objects = render(values)
            pods = _pods(objects)
            kubelet = _load("kubelet").Kubelet(made, image or _this_installation(), objects, Path(folder))
            kubelets.append(kubelet)
            cluster = Cluster(kubelet, objects)
            cluster.start(pods)
            return cluster

        try:
            yield installed
        finally:
            pods = [pod for kubelet in kubelets for pod in kubelet.pods.values()]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(lambda pod: pod.kill(), pods))
