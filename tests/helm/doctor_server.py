"""The stand-in of ``api_server`` with what ``farshore doctor --kube`` reads besides. It is no API server.

It answers from ``objects`` what a healthy cluster would show after the chart's installation: nodes, pods as
KubeRay and the controllers make them from the rendered objects, the operator's pod, a bound claim. Tests
change ``objects``, ``denied`` and the other attributes. Used by ``test_doctor``.
"""

import json
import threading
from urllib.parse import parse_qs, urlsplit

import api_server

RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
READY = [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]
LABELS = "app.kubernetes.io/"


def pod(name, labels, spec, *, namespace="llm", node="node-0"):
    """A pod that runs."""
    statuses = [
        {"name": each["name"], "image": each["image"], "restartCount": 0, "state": RUNNING, "lastState": {}}
        for each in spec["containers"]
    ]
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": spec | {"nodeName": node},
        "status": {"phase": "Running", "conditions": [*READY], "containerStatuses": statuses},
    }


def node(name, *, cpu="64", memory="512Gi"):
    pressure = {"type": "MemoryPressure", "status": "False"}
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": cpu, "memory": memory, "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}, pressure],
        },
    }


def schema(value):
    """A schema that has the fields of ``value``."""
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: schema(each) for key, each in value.items()}}
    return {"type": "array" if isinstance(value, list) else "string"}


class DoctorServer(api_server.ApiServer):
    """``denied``: (verb, resource) that the user may not do. ``ray_versions``: those of ray.io; none: no CRD.
    ``silent``: plural names whose lists are never answered. ``log``: of every pod's ended container."""

    def __init__(self, rendered):
        super().__init__()
        self.RequestHandlerClass = _Handler
        self.denied, self.silent, self.reviews = set(), set(), []
        self.ray_versions, self.log = ["v1"], ""
        self.released = threading.Event()
        plurals = {kind: plural for kinds in api_server.KINDS.values() for kind, plural in kinds.items()}
        for (kind, name), each in rendered.items():
            if "helm.sh/hook" not in each["metadata"].get("annotations", {}):
                self.objects[plurals[kind], name] = each
        cluster = self.objects["rayclusters", "demo-farshore"]
        self.ray_spec = schema(cluster["spec"])
        # The chart sets them only with Redis, and the name only where Redis is external.
        redis = {key: {} for key in ("redisAddress", "redisPassword", "redisUsername")}
        self.ray_spec["properties"]["gcsFaultToleranceOptions"] = {"properties": redis}
        cluster["status"] = {"state": "ready", "conditions": []}
        head = cluster["spec"]["headGroupSpec"]["template"]
        self.add("pods", pod("demo-farshore-head", head["metadata"]["labels"], head["spec"]))
        for group in cluster["spec"]["workerGroupSpecs"]:
            template, name = group["template"], f"demo-farshore-{group['groupName']}-worker-x"
            self.add("pods", pod(name, template["metadata"]["labels"], template["spec"]))
        for plural, name in list(self.objects):
            if plural in ("deployments", "statefulsets"):
                made = self.objects[plural, name]
                made["status"] = api_server.status(made["kind"], made["spec"])
                template = made["spec"]["template"]
                self.add("pods", pod(f"{name}-0", template["metadata"]["labels"], template["spec"]))
        for number in range(3):
            self.add("nodes", node(f"node-{number}"))
        operator = {"name": "kuberay-operator", "image": "quay.io/kuberay/operator:v1.7.0", "args": []}
        labels = {f"{LABELS}component": "kuberay-operator", f"{LABELS}name": "kuberay-operator"}
        self.add("pods", pod("kuberay-1", labels, {"containers": [operator]}, namespace="kuberay"))
        claim = {"name": "data-demo-farshore-redis-0", "namespace": "llm"}
        self.add("persistentvolumeclaims", {"metadata": claim, "spec": {}, "status": {"phase": "Bound"}})

    def serve_forever(self, poll_interval=0.02):
        super().serve_forever(poll_interval)

    def add(self, plural, value):
        self.objects[plural, value["metadata"]["name"]] = value

    def warn(self, kind, name, message):
        about = {"kind": kind, "name": name}
        event = {"type": "Warning", "message": message, "involvedObject": about}
        self.add("events", event | {"metadata": {"name": f"{name}.1", "namespace": "llm"}})


class _Handler(api_server._Handler):
    disable_nagle_algorithm = True

    def _handle(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        if url.path == "/version":
            return self._send({"major": "1", "minor": "34"})
        if "ray.io" in parts:
            if not self.server.ray_versions or ("v1" in parts and "v1" not in self.server.ray_versions):
                return self._refuse(404, "NotFound", "the server could not find the requested resource")
            if url.path == "/apis/ray.io":
                return self._send({"versions": [{"version": each} for each in self.server.ray_versions]})
            if parts[0] == "openapi":
                kind = [{"group": "ray.io", "version": "v1", "kind": "RayCluster"}]
                described = {"properties": {"spec": self.server.ray_spec}}
                described["x-kubernetes-group-version-kind"] = kind
                return self._send({"components": {"schemas": {"io.ray.v1.RayCluster": described}}})
        if parts[-1] == "selfsubjectaccessreviews":
            return self._review(json.loads(body))
        if parts[-1] == "log":
            return self._text(self.server.log)
        if parts[-1] in self.server.silent:
            self.server.released.wait(60)
            self.close_connection = True
            return None
        namespace = parts[parts.index("namespaces") + 1] if "namespaces" in parts else None
        rest = parts[parts.index("namespaces") + 2 :] if namespace else parts[2:]
        if ("list" if len(rest) == 1 else "get", rest[0]) in self.server.denied:
            return self._refuse(403, "Forbidden", f'{rest[0]} is forbidden: User "tests" cannot read it')
        if len(rest) == 2:
            found = self.server.objects.get(tuple(rest))
            return self._send(found) if found else self._refuse(404, "NotFound", f"{rest[1]} not found")
        return self._list(rest[0], namespace, query)

    do_GET = do_POST = _handle

    def _list(self, plural, namespace, query):
        """A page of the objects."""
        items = [each for (kind, _), each in sorted(self.server.objects.items()) if kind == plural]
        if namespace:
            items = [each for each in items if each["metadata"].get("namespace") == namespace]
        wanted = dict(each.split("=") for each in query.get("labelSelector", "").split(",") if each)
        items = [each for each in items if wanted.items() <= each["metadata"].get("labels", {}).items()]
        fields = dict(each.split("=") for each in query.get("fieldSelector", "").split(",") if each)
        for path, value in fields.items():
            items = [each for each in items if api_server.at(each, path.split(".")) == value]
        first = int(query.get("continue", 0))
        end = first + min(int(query["limit"]), 2)
        more = {"continue": str(end)} if end < len(items) else {}
        self._send({"metadata": more, "items": items[first:end]})

    def _review(self, review):
        asked = review["spec"]["resourceAttributes"]
        assert review["kind"] == "SelfSubjectAccessReview" and asked["namespace"] == "llm"
        self.server.reviews.append((asked["verb"], asked["group"], asked["resource"]))
        allowed = (asked["verb"], asked["resource"]) not in self.server.denied
        self._send(review | {"status": {"allowed": allowed}}, 201)

    def _text(self, text):
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
