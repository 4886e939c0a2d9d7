"""Asks containers as a kubelet's probes do. Used by ``conftest``."""

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore.errors import StartupError

KINDS = ("startupProbe", "readinessProbe", "livenessProbe")


class NeverReady(Exception):
    pass


def ask(pod, container, probe):
    """(whether the container passes, what it said)."""
    timeout_s = probe.get("timeoutSeconds", 1)
    host = pod.host.address
    if "exec" in probe:
        try:
            code, said = pod.execute(container, probe["exec"]["command"], timeout_s)
        except (subprocess.TimeoutExpired, StartupError) as error:
            return False, str(error)
        return code == 0, said
    if "grpc" in probe:
        return _grpc(f"{host}:{_port(container, probe['grpc'])}", probe["grpc"].get("service", ""), timeout_s)
    with contextlib.suppress(OSError):
        if "tcpSocket" in probe:
            socket.create_connection((host, _port(container, probe["tcpSocket"])), timeout_s).close()
            return True, "connected"
        url = f"http://{host}:{_port(container, probe['httpGet'])}{probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                return answer.status < 400, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return False, f"{error.code} {error.read().decode()}"
    return False, "no connection"


def ask_again(pod, container, probe):
    """As :func:`ask`, until it passes or the container counts as failed."""
    for left in reversed(range(probe.get("failureThreshold", 3))):
        passed, said = ask(pod, container, probe)
        if passed or not left:
            return passed, said
        _pause(probe)
    raise AssertionError("a probe without a try")


def await_ready(pod, *, deadline_s):
    """Until each container runs and has passed its startup and then its readiness probe; those that ended
    start again. Raises NeverReady."""
    over_s = time.monotonic() + deadline_s
    for container in pod.object["spec"]["containers"]:
        for kind in KINDS[:2]:
            probe = container.get(kind)
            while probe:
                pod.restart_ended()
                passed, said = ask(pod, container, probe)
                # What another container or a child keeps open answers for one that ended.
                if passed and container["name"] not in pod.ended():
                    break
                name = f"{pod.name}: {container['name']}"
                if not pod.alive or time.monotonic() > over_s:
                    raise NeverReady(f"{name}: {kind} says {said!r}; {pod.ended()}: {_logs(pod)}")
                _pause(probe)


def _pause(probe):
    time.sleep(min(probe.get("periodSeconds", 10), 0.5))


def _logs(pod):
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in (pod.folder / "logs").iterdir())


def _port(container, target):
    port = target["port"]
    if isinstance(port, int):
        return port
    (number,) = (each["containerPort"] for each in container["ports"] if each["name"] == port)
    return number


def _grpc(address, service, timeout_s):
    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return False, f"{error.code()}: {error.details()}"
    said = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return said == "SERVING", said
