"""A pod that runs: with namespaces of its own for network, processes, name and mounts.

A container gets what its object says: init containers first, environment, volumes with Kubernetes' modes,
user, read-only root, no rights, limit of memory, and processes of its own, unless the pod shares them.
Nothing enforces seccomp and limits of cpu. Made by ``kubelet``.
"""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from farshore.benchmarks.cluster.hosts import child_of

from . import policies, volumes

ENTER = Path(__file__).with_name("enter.py").read_text()
CGROUPS = Path("/sys/fs/cgroup/memory")
CONNECT_S = 15
"""For a connection from a pod, which starts a shell first. One that a policy forbids takes so long."""

NODE = "node-1"
NODE_LABELS = {"topology.kubernetes.io/zone": "zone-1"}
"""Labels that Kubernetes 1.35 copies from a node to its pods."""


class ContainerFailed(Exception):
    pass


class Pod:
    def __init__(self, kubelet, pod, host):
        self.kubelet = kubelet
        self.object = pod
        self.name = pod["metadata"]["name"]
        self.host = host
        self.alive = True
        """Whether it belongs to its Services. A pod that ends does not."""
        self.is_gone = False
        self.folder = kubelet.folder / f"{self.name}-{host.name}"
        self._processes = {}
        self._restarts = {}
        self._cgroups = []

    def prepare(self):
        """Makes the volumes."""
        spec = self.object["spec"]
        for name in ("roots", "volumes", "logs"):
            (self.folder / name).mkdir(parents=True)
        self._root(["hostname", self.name])
        for setting in spec["securityContext"].get("sysctls", ()):
            path = f"/proc/sys/{setting['name'].replace('.', '/')}"
            self._root(["sh", "-c", 'echo "$1" > "$2"', "sh", setting["value"], path])
        group = spec["securityContext"]["fsGroup"]
        for volume in spec.get("volumes", ()):
            path = self.folder / "volumes" / volume["name"]
            if "persistentVolumeClaim" in volume:
                kept = self.kubelet.folder / f"claim-{volume['persistentVolumeClaim']['claimName']}"
                kept.mkdir(exist_ok=True)
                volumes.give(kept, group)
                path.symlink_to(kept)
                continue
            path.mkdir()
            if "emptyDir" in volume:
                if volume["emptyDir"].get("medium") == "Memory":
                    size = _bytes(volume["emptyDir"]["sizeLimit"])
                    self._root(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)])
                self._root(["chown", f"0:{group}", str(path)])
                self._root(["chmod", "2777", str(path)])
            else:
                volumes.write(path, *volumes.content(volume, self.kubelet.objects), group=group)

    def update(self, names):
        """Replaces the files of the ConfigMaps with these names."""
        group = self.object["spec"]["securityContext"]["fsGroup"]
        for volume in self.object["spec"].get("volumes", ()):
            if volume.get("configMap", {}).get("name") in names:
                path = self.folder / "volumes" / volume["name"]
                volumes.write(path, *volumes.content(volume, self.kubelet.objects), group=group)

    def _root(self, command):
        process = self.host.popen(*command, env={}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = process.communicate(timeout=60)
        if process.returncode:
            raise ContainerFailed(f"{self.name}: {command}: {said}")

    def run(self):
        """The init containers one after another, then starts the containers."""
        for container in self.object["spec"].get("initContainers", ()):
            self.run_to_end(container)
        for container in self.object["spec"]["containers"]:
            self._processes[container["name"]] = self._start(container)

    def run_to_end(self, container, timeout_s=300):
        """What the container writes. Raises ContainerFailed."""
        code = self._start(container).wait(timeout_s)
        said = self.log(container["name"])
        if code:
            raise ContainerFailed(f"{self.name}: {container['name']} ended with {code}: {said[-3000:]}")
        return said

    def container(self, name):
        (found,) = (each for each in self.object["spec"]["containers"] if each["name"] == name)
        return found

    def log(self, name):
        return (self.folder / "logs" / name).read_text()

    def environment(self, container):
        given = self.kubelet.image(container).env | {
            "HOSTNAME": self.name,
            "KUBERNETES_SERVICE_HOST": "10.96.0.1",
            "KUBERNETES_SERVICE_PORT": "443",
        }
        for each in container.get("env", ()):
            value = each["value"] if "value" in each else self._value(each["valueFrom"])
            given[each["name"]] = _expand(value, given)
        return given

    def _value(self, source):
        if "secretKeyRef" in source:
            secret = self.kubelet.objects["Secret", source["secretKeyRef"]["name"]]
            return base64.b64decode(secret["data"][source["secretKeyRef"]["key"]]).decode()
        path = source["fieldRef"]["fieldPath"]
        if label := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
            return (NODE_LABELS | self.object["metadata"]["labels"]).get(label[1], "")
        meta = self.object["metadata"]
        return {
            "status.podIP": self.host.address,
            "metadata.name": meta["name"],
            "metadata.namespace": meta["namespace"],
            "spec.nodeName": NODE,
        }[path]

    def _start(self, container):
        apart = () if self._shares_processes else ("--pid", "--fork", "--kill-child")
        log = (self.folder / "logs" / container["name"]).open("a")
        cgroup = self._cgroup(container)
        # The process joins itself: a fork of this one, in which gRPC has threads, would not be safe.
        joining = [os.open(cgroup / "cgroup.procs", os.O_WRONLY)] if cgroup else []
        try:
            with log:
                spec = json.dumps(self._spec(container) | {"cgroups": joining})
                return self.host.popen(
                    # As text: a host need not see the folder of this file.
                    *("unshare", "--mount", *apart, sys.executable, "-S", "-P", "-c", ENTER, spec),
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=joining,
                )
        finally:
            for descriptor in joining:
                os.close(descriptor)

    def _cgroup(self, container):
        """A group with the container's memory limit; None where this machine lets us make none."""
        folder = CGROUPS / f"farshore-{self.host.name}-{container['name']}"
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        if limit is None:
            return None
        try:
            folder.mkdir(exist_ok=True)
            (folder / "memory.limit_in_bytes").write_text(str(_bytes(limit)))
        except OSError:
            return None
        if folder not in self._cgroups:
            self._cgroups.append(folder)
        return folder

    def memory(self):
        """Container -> (the most bytes that it had, its limit). Empty where this machine knows neither."""
        files = ("memory.max_usage_in_bytes", "memory.limit_in_bytes")
        return {
            group.name.split("-", 2)[2]: tuple(int((group / file).read_text()) for file in files)
            for group in self._cgroups
        }

    def _spec(self, container):
        image, spec = self.kubelet.image(container), self.object["spec"]
        security = spec["securityContext"] | container["securityContext"]
        assert security["readOnlyRootFilesystem"] and security["capabilities"] == {"drop": ["ALL"]}
        root = self.folder / "roots" / container["name"]
        root.mkdir(exist_ok=True)
        mounts = sorted(container.get("volumeMounts", ()), key=lambda each: each["mountPath"])
        mounted = [
            [str(self.folder / "volumes" / each["name"]), each["mountPath"], each.get("readOnly", False)]
            for each in mounts
        ]
        env = self.environment(container)
        command = [_expand(text, env) for text in (*container["command"], *container.get("args", ()))]
        files = image.files | {"/etc/hostname": f"{self.name}\n"}
        names = [str(self.kubelet.names), "/etc/hosts", False]
        late = [bind for bind in image.binds if bind[1].startswith("/tmp/")]
        early = [bind for bind in image.binds if bind not in late]
        return {
            "root": str(root),
            "binds": [*early, names, *mounted, *late],
            "links": image.links,
            "etc": image.etc,
            "files": files,
            "env": env,
            "command": command,
            "cwd": container.get("workingDir", "/tmp"),
            "user": security["runAsUser"],
            "group": security["runAsGroup"],
        }

    def execute(self, container, command, timeout_s):
        """Runs a command in a running container, as an exec probe or a preStop hook. (exit code, output)"""
        pid = self._pid(container["name"])
        security = self.object["spec"]["securityContext"]
        user = [f"--setuid={security['runAsUser']}", f"--setgid={security['runAsGroup']}"]
        spaces = ["--mount", "--net", "--pid", "--uts", "--ipc", "--root", "--wd"]
        done = subprocess.run(
            ["nsenter", f"--target={pid}", *spaces, *user, *command],
            env=self.environment(container),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    @property
    def _shares_processes(self):
        """Whether the pod's containers have one namespace of processes; else a container's first is 1."""
        return self.object["spec"].get("shareProcessNamespace", False)

    def _pid(self, name):
        """This machine's id of a container's first process."""
        pid = self.host.pid(self._processes[name])
        if not self._shares_processes:
            # `unshare` forks a process that is the first of the container's own.
            pid = child_of(pid)
        return pid

    def status(self, name):
        """What /proc tells of a container's first process."""
        text = Path(f"/proc/{self._pid(name)}/status").read_text()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}

    def open_files(self, name):
        """(limit now, the most that it may be raised to) of a container's first process."""
        text = Path(f"/proc/{self._pid(name)}/limits").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("Max open files"))
        return tuple(int(word) for word in line.split() if word.isdigit())

    def ended(self):
        """Container -> exit code, of those that ended."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def restart_ended(self):
        """Starts containers that ended again: at once, then after 10 s, 20 s and so on."""
        for name in self.ended():
            count, not_before_s = self._restarts.get(name, (0, 0.0))
            if time.monotonic() >= not_before_s:
                self._restarts[name] = count + 1, time.monotonic() + (10 << count)
                self._end_rest(name)
                self._processes[name] = self._start(self.container(name))

    def crash(self, name):
        """Kills a container's first process, as for want of memory. The pod stays."""
        os.kill(self._pid(name), signal.SIGKILL)
        self._processes[name].wait(60)

    def _end_rest(self, name):
        """Kills what a container's first process left, which a container runtime ends with it, also where
        the pod's containers share their processes."""
        for group in self._cgroups:
            if group.name.endswith(f"-{name}"):
                for pid in (group / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)

    def end(self):
        """As when a pod is deleted: it leaves the Services, preStop hooks run, SIGTERM, and SIGKILL when the
        grace is over. {container: (exit code of preStop, its output, own exit code; None: killed)}."""
        self.alive = False
        self.kubelet.write_names()
        over_s = time.monotonic() + self.object["spec"].get("terminationGracePeriodSeconds", 30)
        said = {}
        for name in self._processes:
            container = self.container(name)
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            left_s = over_s - time.monotonic()
            said[name] = self.execute(container, hook, left_s) if hook else (0, "")
            os.kill(self._pid(name), signal.SIGTERM)
        for name, process in self._processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(over_s - time.monotonic(), 0))
            said[name] = (*said[name], process.poll())
        self.kill()
        return said

    def refused(self):
        """{(protocol, source, destination, port)} of what the network policies kept from or off this pod."""
        return policies.refused(self.host.name)

    def connects(self, other, port):
        """Whether a connection to another pod comes about."""
        call = f"</dev/tcp/{other.host.address}/{port}"
        command = ["timeout", str(CONNECT_S), "bash", "-c", call]
        return self.host.popen(*command, env={}, stderr=subprocess.DEVNULL).wait(60) == 0

    def listens(self, port):
        """Whether its node reaches this port."""
        with contextlib.suppress(OSError), socket.create_connection((self.host.address, port), 60):
            return True
        return False

    def kill(self):
        """Ends all processes at once, as when its node is lost."""
        with self.kubelet.lock:
            self.alive, self.is_gone = False, True
        self.host.kill()
        for process in self._processes.values():
            process.wait(60)
        for folder in self._cgroups:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.kubelet.write_names()


def _expand(text, env):
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: env.get(found[1], found[0]), text)


def _bytes(quantity):
    return int(quantity[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[quantity[-2:]]
