"""The API as plain objects: deadlines, pages, refusals, configuration; against an HTTP server of the test."""

import datetime
import ipaddress
import json
import ssl
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from farshore.client.doctor.kube_api import KubeApi, namespaced
from farshore.errors import DeadlineExceeded, InvalidRequest, NotFound, TransportError, Unauthenticated


class Server(ThreadingHTTPServer):
    """``answers``: path -> (status, body). /trickle sends a byte at a time, and never the last one."""

    daemon_threads = True

    def __init__(self, tls=None):
        super().__init__(("127.0.0.1", 0), Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.answers, self.paths, self.headers = {}, [], []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.paths.append(self.path)
        self.server.headers.append(dict(self.headers))
        trickle = self.path == "/trickle"
        status, body = (200, b" " * 10_000) if trickle else self.server.answers[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not trickle:
            self.wfile.write(body)
            return
        self.close_connection = True
        try:
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b" ")
        except OSError:
            pass


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stopped.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def kubeconfig(server, tmp_path):
    """A file with the contexts a (namespace llm) and b (none), of the user with the token t."""
    cluster = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
    at = {"cluster": "c", "user": "u"}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "a", "context": at | {"namespace": "llm"}}, {"name": "b", "context": at}],
        "current-context": "a",
    }
    file = tmp_path / "kubeconfig"
    file.write_text(json.dumps(content))
    return str(file)


@pytest.fixture
def api(kubeconfig):
    return KubeApi.connect(kubeconfig=kubeconfig, context=None, timeout_s=20)


def test_the_namespace_is_the_contexts_and_the_token_is_sent(server, api, kubeconfig):
    server.answers["/version"] = (200, b'{"major": "1"}')
    assert api.namespace == "llm" and api.get("/version") == {"major": "1"}
    assert server.headers[0]["authorization"] == "Bearer t"
    assert KubeApi.connect(kubeconfig=kubeconfig, context="b", timeout_s=1).namespace == "default"
    with pytest.raises(InvalidRequest, match="--kubeconfig"):
        KubeApi.connect(kubeconfig=kubeconfig, context="c", timeout_s=1)


def test_the_environment_names_the_file(monkeypatch, kubeconfig, tmp_path):
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'none'}:{kubeconfig}")
    assert KubeApi.connect(kubeconfig=None, context=None, timeout_s=1).namespace == "llm"


@pytest.mark.parametrize("content", ["", "{[", "[]", "{}", '{"clusters": []}', '{"current-context": "x"}'])
def test_a_file_that_is_no_kubeconfig(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(InvalidRequest, match="no usable configuration"):
        KubeApi.connect(kubeconfig=str(tmp_path / "file"), context=None, timeout_s=1)


def test_neither_a_file_nor_a_pod(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(InvalidRequest, match="give --kubeconfig FILE, or set KUBECONFIG"):
        KubeApi.connect(kubeconfig=None, context=None, timeout_s=1)


def test_an_answer_that_trickles_is_late(kubeconfig):
    """Each byte comes in time for the socket; the whole never comes."""
    api = KubeApi.connect(kubeconfig=kubeconfig, context=None, timeout_s=0.3)
    with pytest.raises(DeadlineExceeded, match=r"/trickle: no answer within 0\.3 s"):
        api.get("/trickle")


def test_after_a_late_explanation_none_is_read(server, kubeconfig):
    api = KubeApi.connect(kubeconfig=kubeconfig, context=None, timeout_s=3.0)
    server.answers["/x"] = (403, b"{}")
    assert api.explanation(lambda: api.text("/x", {})) == ""
    assert api.explanation(lambda: "why") == "why"
    assert api.explanation(lambda: api.text("/trickle", {})) == ""
    assert api.explanation(lambda: "why") == "" and server.paths == ["/x", "/trickle"]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, Unauthenticated),
        (403, InvalidRequest),
        (404, NotFound),
        (429, TransportError),
        (503, TransportError),
    ],
)
def test_refusals_keep_the_servers_words(server, api, status, error):
    server.answers["/x"] = (status, b'{"message": "because"}')
    with pytest.raises(error, match="because") as raised:
        api.get("/x")
    assert type(raised.value) is error
    server.answers["/x"] = (status, b"<html>")
    with pytest.raises(error, match=str(status)):
        api.get("/x")
    assert len(server.paths) == 2, "nothing is tried again"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b""])
def test_an_answer_that_is_no_object(server, api, body):
    server.answers["/x"] = (200, body)
    with pytest.raises(InvalidRequest, match="is this Kubernetes"):
        api.get("/x")


def test_pages_are_followed_to_the_last(server, api):
    path = namespaced("v1", "llm", "pods")
    first = {"items": [{"a": 1}], "metadata": {"continue": "x/y"}}
    server.answers[f"{path}?labelSelector=k%3Dv&limit=250"] = (200, json.dumps(first).encode())
    last = json.dumps({"items": [{"a": 2}], "metadata": {}}).encode()
    server.answers[f"{path}?labelSelector=k%3Dv&limit=250&continue=x/y"] = (200, last)
    assert list(api.items(path, labelSelector="k=v")) == [{"a": 1}, {"a": 2}]


def test_a_kind_that_the_server_does_not_know_has_no_items(server, api):
    server.answers["/apis/ray.io/v1/rayclusters?limit=250"] = (404, b"404 page not found")
    assert list(api.items("/apis/ray.io/v1/rayclusters")) == []


def test_the_newest_warning(server, api):
    def event(when, text):
        return {"lastTimestamp": when, "message": text}

    listed = {"items": [event("2026-01-02", "new"), event("2026-01-01", "old"), {"message": "undated"}]}
    about = "involvedObject.kind%3DPod%2CinvolvedObject.name%3Dp%2Ctype%3DWarning"
    path = f"/api/v1/namespaces/llm/events?fieldSelector={about}&limit=250"
    server.answers[path] = (200, json.dumps(listed).encode())
    assert api.warning("llm", "Pod", "p") == "new"
    server.answers[path] = (403, b"{}")
    assert api.warning("llm", "Pod", "p") == ""


def self_signed(folder):
    """An SSLContext of a server whose certificate nothing vouches for."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kube-apiserver")])
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "server.pem"
    file.write_bytes(key.private_bytes(*pem) + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


def test_a_kubeconfig_that_skips_the_check_of_certificates_is_not_warned_of_at_each_call(
    kubeconfig, tmp_path
):
    """kubectl does not warn either; a doctor's run makes more than a hundred calls."""
    server = Server(self_signed(tmp_path))
    server.answers["/version"] = (200, b"{}")
    content = json.loads((tmp_path / "kubeconfig").read_text())
    cluster = content["clusters"][0]["cluster"]
    cluster["server"] = f"https://127.0.0.1:{server.server_address[1]}"
    (tmp_path / "kubeconfig").write_text(json.dumps(content))
    with pytest.raises(TransportError, match="CERTIFICATE_VERIFY_FAILED"):
        KubeApi.connect(kubeconfig=kubeconfig, context=None, timeout_s=20).get("/version")
    cluster["insecure-skip-tls-verify"] = True
    (tmp_path / "kubeconfig").write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        api = KubeApi.connect(kubeconfig=kubeconfig, context=None, timeout_s=20)
        assert api.get("/version") == {}
    server.shutdown()
    server.server_close()
    assert [str(each.message) for each in shown] == []
