"""An installation of the chart: its pods, and what KubeRay and Kubernetes' controllers do with them.

Made by ``conftest``. Must not know how pods run.
"""

import concurrent.futures
import copy
import secrets

from . import kuberay, probes

READY_S = 500.0


class Cluster:
    """An installation of the chart. ``pods``: name -> Pod."""

    def __init__(self, kubelet):
        self.kubelet = kubelet
        self.objects = kubelet.objects
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
        self.await_ready(made)

    def await_ready(self, pod):
        """Until the pod's containers are ready. They start again if they end."""
        probes.await_ready(pod, deadline_s=READY_S)

    def replace(self, pod):
        """What KubeRay or the Deployment makes in the place of a pod that is gone."""
        again = copy.deepcopy(pod.object)
        again["metadata"]["name"] += "-again"
        self.kubelet.forget(pod)
        self.start([again])

    def upgrade(self, objects):
        """As `helm upgrade`, where it changes numbers of pods alone: KubeRay makes pods and ends others, and
        later kubelet writes the ConfigMap anew. {pod that ended: what :meth:`Pod.end` says}."""
        new, ending = [], []
        for component in ("dense", "attention"):
            asked = [pod for pod in pods_of(objects) if _component(pod) == component]
            living = self.of(component)
            assert all(_template(pod.object) == _template(asked[0]) for pod in living), "pods are replaced"
            # KubeRay may choose any. These hold the most.
            ending += living[: max(0, len(living) - len(asked))]
            new += asked[len(living) :]
        for pod in new:
            pod["metadata"]["name"] += f"-{secrets.token_hex(3)}"
        if new:
            self.start(new)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ended = dict(zip(ending, pool.map(lambda pod: pod.end(), ending), strict=True))
        for pod in ended:
            self.kubelet.forget(pod)
        # The chart finds the token that it has made. Without an API server it makes another one.
        self.kubelet.update({key: each for key, each in objects.items() if key[0] != "Secret"})
        return ended

    def of(self, component):
        return [pod for pod in self.pods.values() if pod.alive and _component(pod.object) == component]

    def probes(self):
        """{(pod, container, kind of probe): (whether it passes, what it says)}."""
        return {
            (pod.name, container["name"], kind): probes.ask_again(pod, container, container[kind])
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
            self.kubelet.forget(made)


def _component(pod):
    return pod["metadata"]["labels"]["app.kubernetes.io/component"]


def _template(pod):
    """What a change of replaces the pod."""
    return {**pod["metadata"], "name": None}, pod["spec"]


def pods_of(objects):
    """What KubeRay and Kubernetes make of the objects; adds KubeRay's Service to them."""
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
