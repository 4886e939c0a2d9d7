"""The page over HTTP: its headers, that it needs nothing else, and what a status that fails looks like."""

import base64
import hashlib
import re

import httpx2
import pytest

from farshore.proto import admin_pb2 as admin

UNKNOWN = "status is unknown"


def parts(kind, document):
    """The inline parts of a document: the texts of its elements of a kind."""
    return re.findall(rf"<{kind}>(.*?)</{kind}>", document, re.DOTALL)


def test_the_page_may_run_its_own_script_alone(url):
    reply = httpx2.get(f"{url}/")
    assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    for kind, directive in (("script", "script-src"), ("style", "style-src")):
        (inline,) = parts(kind, reply.text)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy)


def test_the_page_needs_nothing_from_elsewhere(url):
    document = httpx2.get(f"{url}/").text
    assert not re.search(r"https?://|\bsrc=|@import|url\(", document)
    assert re.findall(r'href="([^"]*)"', document) == ["data:,"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", document)
    assert not re.search(r"<[^>]* on\w+=", document)


def test_the_status(url, controller):
    controller.statuses = [
        admin.ClusterStatusResponse(
            model="smollm2",
            workers=[
                admin.WorkerStatus(
                    worker_id="dense-0-a",
                    kind=admin.WORKER_KIND_DENSE,
                    host="h",
                    state=admin.WORKER_STATE_READY,
                    tokens=n,
                )
            ],
            sequences=[admin.SequenceStatus(sequence_id="a", owner="dense-0-a", tokens=9, tail_first=4)],
        )
        for n in (100, 200)
    ]
    controller.events = [admin.ClusterEvent(number=1, kind="started", subject="dense-0-a")]
    first = httpx2.get(f"{url}/status.json")
    assert first.status_code == 200 and first.headers["cache-control"] == "no-store"
    assert first.json()["tokens_per_s"] is None
    now = httpx2.get(f"{url}/status.json").json()
    assert now["tokens_per_s"] > 0
    assert now["workers"][0]["worker_id"] == "dense-0-a"
    assert now["sequences"] == [
        {
            "sequence_id": "a",
            "owner": "dense-0-a",
            "tokens": 9,
            "tail_first": 4,
            "spans": [],
            "spans_left_out": 0,
        }
    ]
    assert [event["kind"] for event in now["events"]] == ["started"]


def test_a_controller_that_is_away(start):
    made = start(http="127.0.0.1:0", controller="127.0.0.1:1")
    base = f"http://{made.gateway.http_address}"
    reply = httpx2.get(f"{base}/status.json")
    assert reply.status_code == 503 and reply.headers["retry-after"]
    assert UNKNOWN in reply.json()["error"]["message"]
    assert httpx2.get(f"{base}/").status_code == 200


def test_a_controller_that_comes_back(url, controller, unavailable):
    controller.statuses = [unavailable, *controller.statuses]
    refused = httpx2.get(f"{url}/status.json")
    assert refused.status_code == 503 and "no directory" in refused.json()["error"]["message"]
    assert httpx2.get(f"{url}/status.json").json()["model"] == "smollm2"


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_the_page_changes_nothing(url, path):
    assert httpx2.post(f"{url}{path}", json={}).status_code == 405
    assert httpx2.head(f"{url}{path}").status_code == 200
    described = httpx2.get(f"{url}/openapi.json").json()
    assert list(described["paths"][path]) == ["get"]
