"""The release's pods and their last states: why they don't run, in Kubernetes' words.

Used by ``examine``. Must not know the objects that made them.
"""

from collections.abc import Iterator
from typing import Any

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi, namespaced

NAME = "pods"
MANY_RESTARTS = 3
_LOG_LINES = 20
_PULL = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
}
_NOT_MADE = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """Pods that no node takes, that failed, or whose containers can't be pulled, made or kept running. The
    pod of ``helm test`` is none of them."""
    path = namespaced("v1", release.namespace, "pods")
    for pod in api.items(path, labelSelector=release.selector):
        component = pod["metadata"]["labels"].get("app.kubernetes.io/component", "")
        if component == "test" or pod["metadata"].get("deletionTimestamp"):
            continue
        yield from _findings(api, release, pod, component)


def _findings(api: KubeApi, release: Release, pod: dict[str, Any], component: str) -> Iterator[Finding]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    subject = f"pod {name}"
    if status.get("phase") == "Failed":
        words = ": ".join(each for each in (status.get("reason"), status.get("message")) if each)
        fix = f"remove the cause, then kubectl -n {release.namespace} delete pod {name}"
        if status.get("reason") == "SysctlForbidden":
            fix = "let kubelets of these nodes set net.ipv4.ip_local_port_range (--allowed-unsafe-sysctls)"
        yield Finding(NAME, subject, f"it failed: {words or 'no reason is given'}", fix)
        return
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            words = condition.get("message") or condition.get("reason") or "the scheduler gives no reason"
            yield Finding(
                NAME,
                subject,
                f"no node takes it: {words}",
                f"add nodes that fit, or change {component}.resources, nodeSelector, tolerations or affinity",
            )
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    explained = [
        found for container in containers for found in _container(api, release, name, component, container)
    ]
    yield from explained
    if containers and not explained:
        yield from _not_ready(api, release, pod)


def _not_ready(api: KubeApi, release: Release, pod: dict[str, Any]) -> Iterator[Finding]:
    """A pod whose containers tell nothing: it starts, is kept from starting, or fails its probes."""
    name, status = pod["metadata"]["name"], pod["status"]
    ready = next((each for each in status.get("conditions") or () if each["type"] == "Ready"), {})
    if ready.get("status") != "False":
        return
    problem = f"it is not ready since {ready.get('lastTransitionTime')}: {ready.get('message')}"
    if words := api.warning(release.namespace, "Pod", name):
        problem += f" ({words})"
    fix = (
        "give it the minutes that loading the model takes, then read its events and logs: "
        f"kubectl -n {release.namespace} describe pod {name}, and logs {name} --all-containers"
    )
    yield Finding(NAME, f"pod {name}", problem, fix)


def _container(
    api: KubeApi, release: Release, pod: str, component: str, container: dict[str, Any]
) -> Iterator[Finding]:
    subject = f"pod {pod}, container {container['name']}"
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason") or "", waiting.get("message") or ""
    last = _last_end(container)
    if reason in _PULL:
        # The message of a back-off may not say why the pull before it failed; the event does.
        words = api.warning(release.namespace, "Pod", pod) if reason == "ImagePullBackOff" else ""
        problem = f"the image {container['image']} can't be pulled: {reason}: {message or words}"
        if words and words not in problem:
            problem += f" ({words})"
        value = "redis.bundled.image" if component == "redis" else "image.repository and image.tag"
        fix = f"push the image, or correct {value}; a private registry needs image.pullSecrets"
        yield Finding(NAME, subject, problem, fix)
    elif reason in _NOT_MADE:
        fix = f"see its events: kubectl -n {release.namespace} describe pod {pod}"
        yield Finding(NAME, subject, f"it can't be made: {reason}: {message}", fix)
    elif reason == "CrashLoopBackOff":
        problem = f"it crashes again and again ({container['restartCount']} restarts)"
        yield _ended(api, release, pod, component, container, problem)
    elif last and last.get("reason") == "OOMKilled":
        yield _ended(api, release, pod, component, container, "it was ended for its memory and runs again")
    elif last and last.get("exitCode") and container.get("restartCount", 0) >= MANY_RESTARTS:
        problem = f"it runs again after {container['restartCount']} restarts"
        yield _ended(api, release, pod, component, container, problem)


def _last_end(container: dict[str, Any]) -> dict[str, Any] | None:
    """How the container ended last; None where it never did."""
    return (container.get("lastState") or {}).get("terminated")


def _ended(
    api: KubeApi, release: Release, pod: str, component: str, container: dict[str, Any], problem: str
) -> Finding:
    name, last = container["name"], _last_end(container) or {}
    if last:
        problem += f"; last it ended with exit code {last.get('exitCode')}, {last.get('reason')}"
    if words := (last.get("message") or "").strip() or _last_line(api, release, pod, name):
        problem += f": {words}"
    fix = f"read its log: kubectl -n {release.namespace} logs {pod} -c {name} --previous"
    if last.get("reason") == "OOMKilled":
        section = {"launcher": "launcher", "redis": "redis.bundled"}.get(name, component)
        fix = f"raise {section}.resources.limits.memory"
        if name == "ray":
            fix += ", or lower spec.kvMemory or workersPerPod"
    return Finding(NAME, f"pod {pod}, container {name}", problem, fix)


def _last_line(api: KubeApi, release: Release, pod: str, container: str) -> str:
    """The last line that the ended container wrote, where it can be read."""
    path = namespaced("v1", release.namespace, "pods", f"{pod}/log")
    query = {"container": container, "previous": "true", "tailLines": str(_LOG_LINES)}
    lines = api.explanation(lambda: api.text(path, query)).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
