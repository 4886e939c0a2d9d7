"""A stand-in for Kubernetes' API server, for tests of the chart's life cycle. It is none.

It stores what Helm sends, refuses changes of the fields that Kubernetes lets nothing change and lists with
two entries of one key, and answers what Helm asks in between: discovery, Helm's own Secrets in protobuf,
server-side apply, watches in which nothing happens. It runs nothing and says at once that all of it is ready,
merges nothing and admits everything else. Used by ``test_life_cycle`` and ``test_doctor_rights``.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

KINDS = {
    "v1": {"ConfigMap": "configmaps", "Pod": "pods", "Secret": "secrets", "Service": "services"}
    | {"ServiceAccount": "serviceaccounts"},
    "apps/v1": {"Deployment": "deployments", "ReplicaSet": "replicasets", "StatefulSet": "statefulsets"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "networking.k8s.io/v1": {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "ray.io/v1": {"RayCluster": "rayclusters"},
}
CHANGEABLE = {
    "StatefulSet": {"replicas", "template", "updateStrategy", "minReadySeconds", "ordinals"}
    | {"revisionHistoryLimit", "persistentVolumeClaimRetentionPolicy"},
}
"""Kind -> the only fields of its spec that may change."""
UNCHANGEABLE = {
    "Deployment": [("spec", "selector")],
    "Secret": [("type",)],
    "Service": [("spec", "clusterIP")],
}
UNCHANGEABLE["RayCluster"] = [("spec", "gcsFaultToleranceOptions", "backend"), ("spec", "managedBy")]
ENTRY_KEYS = {
    "containers": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
"""List of a pod -> the fields by which server-side apply tells its entries apart."""
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def at(value, path):
    for key in path:
        value = (value or {}).get(key)
    return value


def forbidden(old, new):
    """The path of a field that differs and may not, or None."""
    kind = new["kind"]
    if kind in CHANGEABLE:
        keys = (old["spec"].keys() | new["spec"].keys()) - CHANGEABLE[kind]
        return next(
            (f"spec.{key}" for key in sorted(keys) if old["spec"].get(key) != new["spec"].get(key)), None
        )
    # KubeRay's rules compare only where there is a value already.
    only_set = kind == "RayCluster"
    for path in UNCHANGEABLE.get(kind, ()):
        before, after = at(old, path), at(new, path)
        if before != after and not (only_set and before is None):
            return ".".join(path)
    return None


def duplicates(value, path=""):
    """The paths of a pod's lists that have two entries of one key: Kubernetes and KubeRay's CRD refuse it."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        below = f"{path}[{key}]" if isinstance(value, list) else f"{path}.{key}"
        if key in ENTRY_KEYS and isinstance(each, list):
            keys = [tuple(entry.get(name) for name in ENTRY_KEYS[key]) for entry in each]
            if len(keys) > len(set(keys)):
                yield below
        if isinstance(each, dict | list):
            yield from duplicates(each, below)


def status(kind, spec):
    """What Kubernetes says of an object whose pods are all there, and Helm waits for; else None."""
    if kind == "Pod":
        return {"phase": "Succeeded"}
    number = spec.get("replicas", 1)
    counts = {f"{each}eplicas": number for each in ("r", "readyR", "updatedR", "availableR", "currentR")}
    if kind == "Deployment":
        reasons = {"Available": "MinimumReplicasAvailable", "Progressing": "NewReplicaSetAvailable"}
        conditions = [{"type": type, "status": "True", "reason": why} for type, why in reasons.items()]
        return counts | {"conditions": conditions}
    if kind == "StatefulSet":
        return counts | {"currentRevision": "1", "updateRevision": "1"}
    return None


def fields(message):
    """(number, value) of each field of a protobuf message."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        if tag & 7 == 2:
            size = varint()
            yield tag >> 3, message[position : position + size]
            position += size
        else:
            assert tag & 7 == 0, "Helm sends no other wire types"
            yield tag >> 3, varint()


def secret(body):
    """The object in a protobuf Secret: the envelope's second field."""
    raw = dict(fields(body.removeprefix(b"k8s\0")))[2]
    pairs = [(number, value) for number, value in fields(raw)]
    meta = list(fields(dict(pairs)[1]))
    entries = lambda values, number: (dict(fields(value)) for key, value in values if key == number)  # noqa: E731
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": dict(meta)[1].decode(),
            "labels": {each[1].decode(): each.get(2, b"").decode() for each in entries(meta, 11)},
        },
        "data": {each[1].decode(): base64.b64encode(each[2]).decode() for each in entries(pairs, 2)},
        "type": dict(pairs)[3].decode(),
    }


def openapi(name):
    """The description of a group, such as apis/apps/v1: that it checks fields itself when it patches."""
    group = name.removeprefix("apis/").removeprefix("api/")
    paths = {}
    for kind, plural in KINDS[group].items():
        shown = {"group": group.rpartition("/")[0], "version": group.rpartition("/")[2], "kind": kind}
        patch = {"x-kubernetes-group-version-kind": shown, "responses": {}}
        patch["parameters"] = [{"name": "fieldValidation", "in": "query"}]
        paths[f"/{name}/namespaces/{{namespace}}/{plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths}


class ApiServer(ThreadingHTTPServer):
    """``objects``: (plural, name) -> object, of its one namespace. ``writes``: (verb, plural, name).
    ``used``: (verb of RBAC, API group, plural) of each request about objects."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.writes, self.used = {}, [], set()
        self.lock, self.ended = threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shutdown(self):
        self.ended.set()
        super().shutdown()

    @property
    def kubeconfig(self):
        cluster = {"server": f"http://127.0.0.1:{self.server_address[1]}"}
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "stand-in", "cluster": cluster}],
                "users": [{"name": "tests", "user": {}}],
                "contexts": [{"name": "it", "context": {"cluster": "stand-in", "user": "tests"}}],
                "current-context": "it",
            }
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code, reason, message):
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
        self._send(status | {"reason": reason, "message": message}, code)

    def _discovery(self, path):
        group = path.removeprefix("/api/").removeprefix("/apis/")
        if path == "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        if path == "/openapi/v3":
            names = [f"apis/{each}" if "/" in each else "api/v1" for each in KINDS]
            return {"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in names}}
        if path.startswith("/openapi/v3/"):
            return openapi(path.removeprefix("/openapi/v3/"))
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            names = [each.split("/") for each in KINDS if "/" in each]
            version = lambda name, v: {"groupVersion": f"{name}/{v}", "version": v}  # noqa: E731
            groups = [
                {"name": n, "versions": [version(n, v)], "preferredVersion": version(n, v)} for n, v in names
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if group in KINDS:
            resources = [
                {
                    "name": plural,
                    "kind": kind,
                    "namespaced": True,
                    "singularName": kind.lower(),
                    "verbs": ["get"],
                }
                for kind, plural in KINDS[group].items()
            ]
            return {"kind": "APIResourceList", "groupVersion": group, "resources": resources}
        return None

    def _handle(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (found := self._discovery(url.path)) is not None:
            return self._send(found)
        root, _, rest = url.path.partition("/namespaces/llm/")
        plural, _, name = rest.partition("/")
        query = parse_qs(url.query)
        if not plural:
            return self._refuse(404, "NotFound", f"nothing at {url.path}")
        read = "watch" if "watch" in query else "get" if name else "list"
        group = root.split("/")[2] if root.startswith("/apis/") else ""
        self.server.used.add((VERBS.get(self.command, read), group, plural))
        if "watch" in query:
            return self._watch(query)
        with self.server.lock:
            getattr(self, f"_{self.command.lower()}")(plural, name, body, query)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _watch(self, query):
        """Nothing happens until the end. Clients that want the list by a watch are to ask for it."""
        if "sendInitialEvents" in query:
            return self._refuse(422, "Invalid", "sendInitialEvents is forbidden for watch")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.flush()
        self.server.ended.wait(60)
        self.close_connection = True

    def _get(self, plural, name, body, query):
        objects = self.server.objects
        if name:
            found = objects.get((plural, name))
            return (
                self._send(found) if found else self._refuse(404, "NotFound", f'{plural} "{name}" not found')
            )
        wanted = dict(each.split("=") for each in query.get("labelSelector", [""])[0].split(",") if each)
        items = [each for (kind, _), each in sorted(objects.items()) if kind == plural]
        items = [each for each in items if wanted.items() <= each["metadata"].get("labels", {}).items()]
        metadata = {"resourceVersion": "1"}
        self._send({"kind": "SecretList", "apiVersion": "v1", "metadata": metadata, "items": items})

    def _post(self, plural, name, body, query):
        self._store(plural, secret(body) if body.startswith(b"k8s\0") else json.loads(body))

    def _put(self, plural, name, body, query):
        self._post(plural, name, body, query)

    def _patch(self, plural, name, body, query):
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        assert query["fieldValidation"] == ["Strict"]
        new = json.loads(body)
        if twice := list(duplicates(new)):
            message = f"failed to create typed patch object: {', '.join(twice)}: duplicate entries for key"
            return self._refuse(500, "InternalError", message)
        self._store(plural, new)

    def _store(self, plural, new):
        key = plural, new["metadata"]["name"]
        old = self.server.objects.get(key)
        if old and (path := forbidden(old, new)):
            return self._refuse(
                422, "Invalid", f'{new["kind"]} "{key[1]}" is invalid: {path}: field is immutable'
            )
        if shown := status(new["kind"], new.get("spec", {})):
            new["status"] = shown
        self.server.objects[key] = new
        self.server.writes.append((self.command, *key))
        self._send(new)

    def _delete(self, plural, name, body, query):
        if self.server.objects.pop((plural, name), None) is None:
            return self._refuse(404, "NotFound", f'{plural} "{name}" not found')
        self.server.writes.append((self.command, plural, name))
        self._send({"kind": "Status", "apiVersion": "v1", "status": "Success"})
