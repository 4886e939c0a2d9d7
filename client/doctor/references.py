"""Secrets that the pods' templates name: that they exist, with the keys that are asked for.

Used by ``examine``. Reads the names of keys, and the characters of Redis's password; values are dropped at
once and are in no finding.
"""

import base64
from collections.abc import Iterator
from typing import Any

from farshore.client.doctor.finding import Finding, Release
from farshore.client.doctor.kube_api import KubeApi, namespaced
from farshore.client.doctor.workloads import objects, templates
from farshore.errors import NotFound

NAME = "secrets"
PULL = ".dockerconfigjson"
_HINTS = {
    "redis": "It holds Redis's password: name an existing one by redis.bundled.existingSecret or "
    "redis.external.passwordSecret (its key: redis.passwordKey)",
    "redis-ca": "It holds the certificate that signs Redis's: redis.external.caSecret names it",
    "token-secret": "It holds the cluster's token: name an existing one by token.existingSecret",
}
_PULL_HINT = "It holds the registry's credentials: image.pullSecrets names it"


def check(api: KubeApi, release: Release) -> Iterator[Finding]:
    """Missing Secrets and missing keys, each once."""
    asked: dict[str, set[str]] = {}
    hints: dict[str, str] = {}
    passwords: set[tuple[str, str]] = set()
    bundled = any(kind == "StatefulSet" for kind, _ in objects(api, release))
    for name, keys, hint in _named(api, release):
        if hint == _HINTS["redis"]:
            passwords |= {(name, key) for key in keys}
        asked.setdefault(name, set()).update(keys)
        hints.setdefault(name, hint)
    for name, keys in sorted(asked.items()):
        hint = hints[name]
        try:
            secret = api.get(namespaced("v1", release.namespace, "secrets", name))
        except NotFound:
            made = " --type=kubernetes.io/dockerconfigjson" if PULL in keys else ""
            literals = "".join(f" --from-file={key}=FILE" for key in sorted(keys))
            yield Finding(
                NAME,
                f"secret {name}",
                f"it is missing in the namespace {release.namespace}: pods that need it don't start. {hint}",
                f"make it (kubectl -n {release.namespace} create secret generic {name}{made}{literals}), or "
                "helm upgrade, where the chart makes it",
            )
            continue
        data = secret.get("data") or {}
        missing = keys - set(data)
        if missing:
            yield Finding(
                NAME,
                f"secret {name}",
                f"it lacks {', '.join(sorted(missing))}: pods that need it don't start. {hint}",
                f"add what is missing: kubectl -n {release.namespace} edit secret {name}",
            )
        for key in sorted(keys - missing):
            if (name, key) in passwords and not is_usable(base64.b64decode(data[key]), bundled=bundled):
                yield Finding(
                    NAME,
                    f"secret {name}",
                    f"{key} has a space{' or a quote' if bundled else ''} in it: it does not reach Ray or "
                    "Redis whole, and the head does not start",
                    "choose another password (openssl rand -hex 32), in Redis, too: kubectl -n "
                    f"{release.namespace} edit secret {name}; then delete the pods",
                )


def is_usable(password: bytes, *, bundled: bool) -> bool:
    """Whether a password of Redis reaches Ray whole: KubeRay writes ``--redis-password=$REDIS_PASSWORD``
    without quotes, and a shell splits that at spaces. ``bundled``: and whether it reaches the chart's Redis,
    whose redis.conf has it without quotes, too. Newlines at the end are dropped everywhere."""
    refused = b" \t\n'\"" if bundled else b" \t\n"
    return not set(password.rstrip(b"\n")) & set(refused)


def _named(api: KubeApi, release: Release) -> Iterator[tuple[str, set[str], str]]:
    """(Secret, keys, hint) of each place that names one."""
    for template in templates(api, release):
        for volume in template.spec.get("volumes") or ():
            secret = volume.get("secret")
            if secret and not secret.get("optional"):
                keys = {item["key"] for item in secret.get("items") or ()}
                yield secret["secretName"], keys, _HINTS.get(volume["name"], f"volume {volume['name']}")
        for pull in template.spec.get("imagePullSecrets") or ():
            yield pull["name"], {PULL}, _PULL_HINT
        for container in _containers(template.spec):
            for variable in container.get("env") or ():
                source = (variable.get("valueFrom") or {}).get("secretKeyRef")
                if source and not source.get("optional"):
                    yield source["name"], {source["key"]}, f"{variable['name']} comes from it"
    for kind, each in objects(api, release):
        if kind == "RayCluster":
            password = (each["spec"].get("gcsFaultToleranceOptions") or {}).get("redisPassword") or {}
            source = (password.get("valueFrom") or {}).get("secretKeyRef")
            if source:
                yield source["name"], {source["key"]}, _HINTS["redis"]


def _containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(spec.get("initContainers") or ()), *spec["containers"]]
