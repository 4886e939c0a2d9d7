"""Runs pods on this machine as a kubelet does.

Names of Services stand in a hosts file that all pods see, with the addresses of their pods: no DNS, no
kube-proxy. ``policies`` enforces the network policies. Used by ``conftest``.
"""

import threading

from . import policies
from .pod import Pod

DOMAIN = "svc.cluster.local"


class Kubelet:
    """``images``: repository -> Image. ``objects``: those that the pods name. ``folder``: outside of /tmp,
    which the hosts have for themselves."""

    def __init__(self, hosts, images, objects, folder):
        self.hosts = hosts
        self.images = images
        self.objects = objects
        self.folder = folder
        self.pods = {}
        self.names = folder / "hosts"
        self.names.touch()
        self.lock = threading.Lock()

    def image(self, container):
        repository, _, _ = container["image"].rpartition(":")
        return self.images[repository]

    def start(self, pod):
        """A Pod whose containers are to be run. The old pod of this name is gone."""
        with self.lock:
            made = Pod(self, pod, self.hosts.add())
            self.pods[made.name] = made
            self._write_names()
            self._write_rules()
        made.prepare()
        return made

    def forget(self, pod):
        """Removes a pod that has ended."""
        with self.lock:
            del self.pods[pod.name]

    def update(self, objects):
        """Takes changed objects. The files of pods that mount a changed ConfigMap change."""
        changed = {key for key, each in objects.items() if each != self.objects.get(key)}
        self.objects |= objects
        for pod in tuple(self.pods.values()):
            if pod.alive:
                pod.update({name for kind, name in changed if kind == "ConfigMap"})

    def _write_rules(self):
        """A new pod is a new peer for all others."""
        written = [each for (kind, _), each in self.objects.items() if kind == "NetworkPolicy"]
        pods = [pod for pod in self.pods.values() if not pod.is_gone]
        peers = [(pod.object["metadata"]["labels"], pod.host.address) for pod in pods]
        for pod in pods:
            labels = pod.object["metadata"]["labels"]
            policies.apply(pod.host.name, policies.ruleset(labels, written, peers, node=self.hosts.address))

    def write_names(self):
        """In place, since pods have the file mounted."""
        with self.lock:
            self._write_names()

    def _write_names(self):
        lines = ["127.0.0.1 localhost"]
        lines += [f"{pod.host.address} {pod.name}" for pod in self.pods.values() if pod.alive]
        for (kind, name), each in self.objects.items():
            if kind != "Service":
                continue
            wanted = each["spec"]["selector"].items()
            space = each["metadata"]["namespace"]
            for pod in self.pods.values():
                if pod.alive and wanted <= pod.object["metadata"]["labels"].items():
                    lines.append(f"{pod.host.address} {name}.{space}.{DOMAIN} {name}.{space} {name}")
        self.names.write_text("\n".join(lines) + "\n")
