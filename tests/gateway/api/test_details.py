"""The details of failed calls, on every path by which a call fails: reason, retry, field."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from farshore import rpc
from farshore.gateway.limits import Limits
from farshore.proto import admin_pb2 as admin
from farshore.proto import inference_pb2 as api

LIMITS = Limits(retry_after_ms=250, drain_s=0.1)
KINDS = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest)


def details(error):
    """(reason, milliseconds after which to retry or None, the wrong field or None) of a failed call."""
    found = {}
    status = rpc_status.from_call(error)
    assert status.code == error.code().value[0] and status.message == error.details()
    for detail in status.details:
        for kind in KINDS:
            if detail.Is(kind.DESCRIPTOR):
                found[kind] = message = kind()
                detail.Unpack(message)
    info, retry, bad = (found.get(kind) for kind in KINDS)
    assert info.domain == "farshore"
    pushback = dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")
    after_ms = None if retry is None else retry.retry_delay.ToMilliseconds()
    assert pushback == (None if after_ms is None else str(after_ms))
    return info.reason, after_ms, None if bad is None else bad.field_violations[0].field


def _engine_fails(code, kind, *, free_bytes=None):
    def call(farshore):
        stream = farshore.generate()
        sequence = farshore.engine.next_sequence()
        full = {} if free_bytes is None else {rpc.FREE_BYTES: str(free_bytes)}
        sequence.fail(code, "why", kind, **full)
        return stream

    return call


def _named_twice(farshore):
    next(farshore.generate(request_id="a"))
    return farshore.generate("Another", request_id="a")


PATHS = {
    "before tokenizing": (
        lambda f: f.generate(sampling=dict(top_p=3.0)),
        ("INVALID_REQUEST", None, "sampling.top_p"),
    ),
    "while tokenizing": (
        lambda f: f.generate(None, tokens=api.TokenIds(ids=[49152])),
        ("INVALID_REQUEST", None, "prompt"),
    ),
    "no such message": (
        lambda f: f.channel.unary_stream("/farshore.inference.v1.InferenceService/Generate", None, None)(
            b"\xff", timeout=30
        ),
        ("INVALID_REQUEST", None, None),
    ),
    "model": (lambda f: f.generate(model="gpt-9"), ("MODEL_ERROR", None, "model")),
    "unknown": (lambda f: f.generate(None, request_id="x"), ("NOT_FOUND", None, None)),
    "id of another": (_named_twice, ("ALREADY_EXISTS", None, "request_id")),
    "engine overloaded": (
        _engine_fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "Overloaded"),
        ("OVERLOADED", 250, None),
    ),
    "pool too small": (
        _engine_fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "Full", free_bytes=5),
        ("FULL", None, None),
    ),
    "engine lost": (_engine_fails(grpc.StatusCode.UNAVAILABLE, None), ("UNAVAILABLE", 250, None)),
    "shard lost": (_engine_fails(grpc.StatusCode.UNAVAILABLE, "Lost"), ("LOST", 250, None)),
    "engine's bug": (_engine_fails(grpc.StatusCode.INTERNAL, "Internal"), ("INTERNAL", None, None)),
    "damaged KV": (_engine_fails(grpc.StatusCode.DATA_LOSS, "Corrupt"), ("CORRUPT", None, None)),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_failed_stream(start, harness, path):
    call, expected = PATHS[path]
    farshore = start(limits=LIMITS)
    assert details(harness.failure_of(call(farshore))) == expected


def test_a_bug_in_the_gateway(start, harness):
    farshore = start(limits=LIMITS)
    call = farshore.generate()
    farshore.engine.next_sequence().token(token_id=1, choice=7)  # An unknown choice, which raises.
    assert details(harness.failure_of(call)) == ("INTERNAL", None, None)


UNARY = {
    "Cancel": (api.CancelRequest(request_id="x"), ("NOT_FOUND", None, None)),
    "Tokenize": (api.TokenizeRequest(), ("INVALID_REQUEST", None, "prompt")),
    "Detokenize": (api.DetokenizeRequest(ids=[49152]), ("INVALID_REQUEST", None, "prompt")),
    "GetModel": (api.GetModelRequest(name="x"), ("NOT_FOUND", None, None)),
    "BatchGenerate": (api.BatchGenerateRequest(), ("INVALID_REQUEST", None, "requests")),
}


@pytest.mark.parametrize("method", UNARY)
def test_a_failed_call(farshore, method):
    request, expected = UNARY[method]
    with pytest.raises(grpc.RpcError) as caught:
        getattr(farshore.stub, method)(request, timeout=30)
    assert details(caught.value) == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            (grpc.StatusCode.NOT_FOUND, "no worker x", ((rpc.ERROR_KIND, "NotFound"),)),
            ("NOT_FOUND", None, None),
        ),
        ((grpc.StatusCode.UNAVAILABLE, "no directory"), ("UNAVAILABLE", 250, None)),
        ((grpc.StatusCode.INTERNAL, "?"), ("UNAVAILABLE", 250, None)),
        ((grpc.StatusCode.UNAUTHENTICATED, "no proof"), ("UNAVAILABLE", 250, None)),
    ],
)
def test_an_operators_call(start, status, expected):
    farshore = start(limits=LIMITS)
    farshore.engine.status = status
    with pytest.raises(grpc.RpcError) as caught:
        farshore.operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=30)
    assert details(caught.value) == expected
