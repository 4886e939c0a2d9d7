"""A stand-in for the Hugging Face hub: a small HTTP server that answers the requests of the hub's real
client, as far as resolving a model goes. It knows repositories, revisions, gates and tokens; weights are
redirected, as the hub redirects them to its CDN. It was written from the client's source, and no real hub was
asked.
"""

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MAIN = "a" * 40
OTHER = "b" * 40


@dataclass
class Repository:
    """``files``: name -> content. ``revisions``: branch, tag or commit -> commit. ``readers``: the tokens
    that may read a gated one; None: it isn't gated. ``owners``: the same for a private one."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(
        default_factory=lambda: {"main": MAIN, "v1": OTHER, OTHER: OTHER, MAIN: MAIN}
    )
    readers: set[str] | None = None
    owners: set[str] | None = None


class StandInHub(ThreadingHTTPServer):
    """``requests``: (method, path without query) of every request. ``status``: answer everything with this
    error. ``breaks_off``: send half of every weight file. ``on_request``: called with method and path before
    a request is answered."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories = {}
        self.requests = []
        self.status = None
        self.breaks_off = False
        self.on_request = lambda method, path: None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def add(self, name, files, **options):
        content = {file: text.encode() if isinstance(text, str) else text for file, text in files.items()}
        self.repositories[name] = Repository(content, **options)

    def downloads(self):
        """The files that were downloaded, sorted, once for each time."""
        return sorted(
            path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path
        ) + sorted(
            path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/cdn/" in path
        )

    def close(self):
        self.shutdown()
        self.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._handle()

    def do_HEAD(self):
        self._handle()

    def log_message(self, *_):
        """Nothing is printed."""

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        self.server.on_request(self.command, path)
        if self.server.status is not None:
            return self._answer(self.server.status, b"")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._listing("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        if len(parts) >= 5 and parts[2] in ("resolve", "cdn"):
            return self._file(
                "/".join(parts[:2]), parts[3], "/".join(parts[4:]), redirected=parts[2] == "cdn"
            )
        return self._answer(404, b"")

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _found(self, name, revision):
        """The repository, or None after an error was answered."""
        repository, token = self.server.repositories.get(name), self._token()
        if repository is None or (repository.owners is not None and token not in repository.owners):
            self._answer(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in repository.revisions:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository

    def _listing(self, name, revision):
        if (repository := self._found(name, revision)) is None:
            return
        siblings = [{"rfilename": file, "size": len(data)} for file, data in repository.files.items()]
        # The client prints this on stderr, unless it is told not to.
        warning = {"X-HF-Warning": "unauthenticated; please set a token"}
        info = {"id": name, "sha": repository.revisions[revision], "siblings": siblings}
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"} | warning)

    def _file(self, name, revision, file, *, redirected):
        if (repository := self._found(name, revision)) is None:
            return
        commit = {"X-Repo-Commit": repository.revisions[revision]}
        if repository.readers is not None and self._token() not in repository.readers and not redirected:
            refusal = {"X-Error-Code": "GatedRepo"}
            return self._answer(403 if self._token() else 401, b"", commit | refusal)
        if (data := repository.files.get(file)) is None:
            return self._answer(404, b"", commit | {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if file.endswith((".safetensors", ".gguf")) and not redirected:
            linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(len(data))}
            location = {"Location": f"/{name}/cdn/{revision}/{file}"}
            return self._answer(302, b"", commit | linked | location)
        self._answer(200, data, commit | {"ETag": etag}, cut=redirected and self.server.breaks_off)

    def _answer(self, status, body, headers=None, *, cut=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):
                self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut
