"""Kubernetes' API as plain objects: one bounded call at a time, errors as ours.

Used by the checks and by ``farshore doctor``. Must not know what the checks look for. Answers stay the
dictionaries that the server sent: the client's own classes refuse objects that lack a required field.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from farshore.errors import (
    DeadlineExceeded,
    FarshoreError,
    InvalidRequest,
    NotFound,
    TransportError,
    Unauthenticated,
)

PAGE_OBJECTS = 250
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubeApi:
    """``namespace``: that of the kubeconfig's context or of this pod; ``default`` where neither names one."""

    def __init__(self, configuration: client.Configuration, *, namespace: str, timeout_s: float) -> None:
        # The client would try four times, and each time as long.
        configuration.retries = False
        self.namespace = namespace
        self._timeout_s = timeout_s
        self._explains = True
        if not configuration.verify_ssl:
            # It would say so at each call, and the kubeconfig has chosen it.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self._client = client.ApiClient(configuration)

    @classmethod
    def connect(cls, *, kubeconfig: str | None, context: str | None, timeout_s: float) -> "KubeApi":
        """With ``kubeconfig``, else $KUBECONFIG, else ~/.kube/config, else the configuration that Kubernetes
        gives to pods. Calls nothing but the login command that a kubeconfig may name. Raises InvalidRequest
        where there is none, or it can't be used."""
        files = os.path.expanduser(kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config")
        found = client.Configuration()
        try:
            if kubeconfig or context or any(Path(file).is_file() for file in files.split(os.pathsep)):
                config.load_kube_config(files, context, client_configuration=found, persist_config=False)
                contexts, active = config.list_kube_config_contexts(files)
                named = {each["name"]: each for each in contexts}
                chosen = named[context] if context else active
                namespace = chosen["context"].get("namespace") or "default"
            else:
                config.load_incluster_config(client_configuration=found)
                namespace = _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        except (ConfigException, yaml.YAMLError, OSError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"no usable configuration for Kubernetes ({error}): give --kubeconfig FILE, or set KUBECONFIG"
            ) from error
        return cls(found, namespace=namespace, timeout_s=timeout_s)

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The object at ``path``, such as ``/api/v1/nodes/a``. Raises NotFound, InvalidRequest (with the
        server's reason, as where the caller may not read it), Unauthenticated, TransportError, and
        DeadlineExceeded after the timeout."""
        return self._object("GET", path, query)

    def text(self, path: str, query: Mapping[str, str]) -> str:
        """As :meth:`get`, of what is no JSON."""
        return self._call("GET", path, query).decode(errors="replace")

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the server answers to ``body``. Raises as :meth:`get`."""
        return self._object("POST", path, body=body)

    def items(self, path: str, **query: str) -> Iterator[dict[str, Any]]:
        """The objects of a list, page by page; none where the server does not know the kind. Raises as
        :meth:`get`."""
        following = ""
        while True:
            pages = {"limit": str(PAGE_OBJECTS)} | ({"continue": following} if following else {})
            try:
                page = self.get(path, query | pages)
            except NotFound:
                return
            yield from page.get("items") or ()
            following = (page.get("metadata") or {}).get("continue") or ""
            if not following:
                return

    def warning(self, namespace: str, kind: str, name: str) -> str:
        """The message of the newest event of type Warning about an object, by :meth:`explanation`."""
        about = f"involvedObject.kind={kind},involvedObject.name={name},type=Warning"

        def when(event: dict[str, Any]) -> str:
            return event.get("lastTimestamp") or event.get("eventTime") or ""

        def newest() -> str:
            events = list(self.items(namespaced("v1", namespace, "events"), fieldSelector=about))
            return max(events, key=when).get("message") or "" if events else ""

        return self.explanation(newest)

    def explanation(self, read: Callable[[], str]) -> str:
        """What ``read`` returns; empty where it raises FarshoreError: it only explains what a check has found
        already. After one that was late nothing more is read: each of many pods would wait as long."""
        if not self._explains:
            return ""
        try:
            return read()
        except DeadlineExceeded:
            self._explains = False
        except FarshoreError:
            pass
        return ""

    def _object(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None
    ) -> dict[str, Any]:
        answer = self._call(method, path, query, body)
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise InvalidRequest(f"{path}: the answer is no JSON: is this Kubernetes' API server?") from error
        if not isinstance(found, dict):
            raise InvalidRequest(f"{path}: the answer is no object: is this Kubernetes' API server?")
        return found

    def _call(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Any = None
    ) -> bytes:
        def exchange() -> tuple[int, bytes]:
            headers = {"Accept": "application/json, */*", "Content-Type": "application/json"}
            request = self._client.param_serialize(
                method,
                quote(path),
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._client.call_api(*request, _request_timeout=self._timeout_s)
            return response.status, response.read()

        where = f"{self._client.configuration.host}{path}"
        try:
            status, answer = self._bounded(exchange)
        except urllib3.exceptions.NewConnectionError as error:
            # urllib3 counts it among the timeouts.
            raise TransportError(f"{where}: no connection: {error}") from error
        except (TimeoutError, urllib3.exceptions.TimeoutError) as error:
            raise DeadlineExceeded(f"{where}: no answer within {self._timeout_s:g} s") from error
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise TransportError(f"{where}: no answer: {reason}") from error
        if 200 <= status < 300:
            return answer
        raise _refusal(status, where, answer)

    def _bounded(self, exchange: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
        """The timeout of a socket begins again with each byte: a thread bounds the whole exchange. One that
        is late is left behind, and ends with the process."""
        future: Future[tuple[int, bytes]] = Future()

        def run() -> None:
            try:
                future.set_result(exchange())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future.result(self._timeout_s)


def namespaced(group: str, namespace: str, resource: str, name: str = "") -> str:
    """The path of a namespace's objects; ``group`` as in apiVersion, such as ``apps/v1``."""
    root = f"/apis/{group}" if "/" in group else f"/api/{group}"
    return f"{root}/namespaces/{namespace}/{resource}" + (f"/{name}" if name else "")


def _refusal(status: int, where: str, answer: bytes) -> FarshoreError:
    try:
        reason = json.loads(answer)["message"]
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP status {status}"
    if status == 401:
        return Unauthenticated(f"{where}: the credentials are refused ({reason}): log in again")
    if status == 404:
        return NotFound(f"{where}: {reason}")
    if status == 429 or status >= 500:
        return TransportError(f"{where}: {reason}")
    return InvalidRequest(f"{where}: {reason}")
