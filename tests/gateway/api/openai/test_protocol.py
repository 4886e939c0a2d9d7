"""HTTP itself: methods, types, sizes, health, and calls that are no JSON."""

import socket

import httpx2
import pytest
from grpc_health.v1 import health_pb2

from farshore import __version__
from farshore.errors import PortInUse
from farshore.gateway.limits import Limits

from ....waiting import until

BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}


def test_health_version_and_description(http, base_url):
    assert httpx2.get(f"{base_url}/health").status_code == 200
    assert httpx2.get(f"{base_url}/ready").status_code == 200
    assert httpx2.get(f"{base_url}/version").json() == {"version": __version__}
    described = httpx2.get(f"{base_url}/openapi.json").json()
    assert described["openapi"].startswith("3.1") and "/v1/chat/completions" in described["paths"]


def test_the_description_is_made_once(http, base_url, monkeypatch):
    first = httpx2.get(f"{base_url}/openapi.json")
    monkeypatch.setattr("farshore.gateway.api.openai.endpoints.description", None)
    again = httpx2.get(f"{base_url}/openapi.json")
    assert again.json() == first.json() and again.headers["content-type"] == "application/json"


def test_a_gateway_without_an_engine_is_alive_and_not_ready(start, harness, loop_thread):
    made = start(http="127.0.0.1:0", engine_address="127.0.0.1:1")
    base = f"http://{made.gateway.http_address}"
    assert httpx2.get(f"{base}/health").status_code == 200
    ready = httpx2.get(f"{base}/ready")
    assert ready.status_code == 503 and ready.json()["error"]["message"]
    refused = httpx2.post(f"{base}/v1/chat/completions", json=BODY)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (b"[]", 400), (b"", 400), (b'{"messages": ' + b"[" * 5000, 400)]
)
def test_a_body_that_is_no_request_is_a_400(base_url, body, status):
    headers = {"content-type": "application/json"}
    reply = httpx2.post(f"{base_url}/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == status and reply.json()["error"]["message"]


def test_other_types_paths_and_methods_are_refused(base_url):
    url = f"{base_url}/v1/chat/completions"
    assert httpx2.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx2.get(url).status_code == 405
    lost = httpx2.get(f"{base_url}/v2/none")
    assert lost.status_code == 404 and lost.json()["error"]["type"] == "not_found_error"


def test_a_body_that_is_too_large_is_a_413(start):
    made = start(http="127.0.0.1:0", limits=Limits(message_bytes=1000, message_bytes_per_position=0))
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "x" * 3000}]}
    reply = httpx2.post(f"http://{made.gateway.http_address}/v1/chat/completions", json=body)
    assert reply.status_code == 413


def test_too_many_open_calls_are_refused_in_openais_shape(start):
    made = start(http="127.0.0.1:0", limits=Limits(max_readers=1, other_calls=0, drain_s=0.1))
    url = f"http://{made.gateway.http_address}"
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=BODY | {"stream": True}) as first:
        made.engine.next_sequence().tokens(10)
        assert first.status_code == 200
        refused = httpx2.post(f"{url}/v1/chat/completions", json=BODY, headers={"x-request-id": "t"})
        assert httpx2.get(f"{url}/health").status_code == 200
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1" and refused.headers["x-request-id"] == "t"


def test_idle_connections_are_no_open_calls(start):
    made = start(http="127.0.0.1:0", limits=Limits(max_readers=1, other_calls=0, drain_s=0.1))
    made.engine.auto = (10,)
    url = f"http://{made.gateway.http_address}"
    with httpx2.Client() as idle, httpx2.Client() as other:
        assert idle.get(f"{url}/health").status_code == 200  # and keeps its connection
        assert other.get(f"{url}/version").status_code == 200
        assert httpx2.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200


def test_a_client_that_sends_half_a_head_holds_up_no_other(base_url):
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/chat/completions HT")
        assert httpx2.get(f"{base_url}/health").status_code == 200


def test_an_engine_that_fails_is_not_ready(http, base_url, loop_thread, harness):
    loop_thread.run(
        http.engine.health.set(harness.ENGINE_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    )
    until(lambda: httpx2.get(f"{base_url}/ready").status_code == 503, "the gateway is ready still")


def test_a_taken_http_port_keeps_the_gateway_from_starting(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port}"):
            start(http=f"127.0.0.1:{port}")
