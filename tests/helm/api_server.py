"""A stand-in for Kubernetes' API server, for tests of the chart's life cycle. It is none.

It stores what Helm sends, refuses changes of the fields that Kubernetes lets nothing change, and answers what
Helm asks in between: discovery, Helm's own Secrets in protobuf, server-side apply. It runs nothing, merges
nothing and admits everything. Used by ``test_life_cycle``.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

KINDS = {
    "v1": {"ConfigMap": "configmaps", "Pod": "pods", "Secret": "secrets", "Service": "services"}
    | {"ServiceAccount": "serviceaccounts"},
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "networking.k8s.io/v1": {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "ray.io/v1": {"RayCluster": "rayclusters"},
}
CHANGEABLE = {"StatefulSet": {"replicas", "template", "updateStrategy", "minReadySeconds", "ordinals"}}
"""Kind -> the only fields of its spec that may change."""
UNCHANGEABLE = {
    "Deployment": [("spec", "selector")],
    "Secret": [("type",)],
    "Service": [("spec", "clusterIP")],
}
UNCHANGEABLE["RayCluster"] = [("spec", "gcsFaultToleranceOptions", "backend"), ("spec", "managedBy")]


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
    """``objects``: (plural, name) -> object, of its one namespace. ``writes``: (verb, plural, name)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.writes = {}, []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

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
        _, _, rest = url.path.partition("/namespaces/llm/")
        plural, _, name = rest.partition("/")
        with self.server.lock:
            if not plural:
                return self._refuse(404, "NotFound", f"nothing at {url.path}")
            getattr(self, f"_{self.command.lower()}")(plural, name, body, parse_qs(url.query))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

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
        self._send({"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": items})

    def _post(self, plural, name, body, query):
        self._store(plural, secret(body) if body.startswith(b"k8s\0") else json.loads(body))

    def _put(self, plural, name, body, query):
        self._post(plural, name, body, query)

    def _patch(self, plural, name, body, query):
        assert self.headers["Content-Type"] == "application/apply-patch+yaml"
        assert query["fieldValidation"] == ["Strict"]
        self._store(plural, json.loads(body))

    def _store(self, plural, new):
        key = plural, new["metadata"]["name"]
        old = self.server.objects.get(key)
        if old and (path := forbidden(old, new)):
            return self._refuse(
                422, "Invalid", f'{new["kind"]} "{key[1]}" is invalid: {path}: field is immutable'
            )
        self.server.objects[key] = new
        self.server.writes.append((self.command, *key))
        self._send(new)

    def _delete(self, plural, name, body, query):
        if self.server.objects.pop((plural, name), None) is None:
            return self._refuse(404, "NotFound", f'{plural} "{name}" not found')
        self.server.writes.append((self.command, plural, name))
        self._send({"kind": "Status", "apiVersion": "v1", "status": "Success"})
