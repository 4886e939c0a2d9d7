"""Calls are repeated, unary ones by gRPC's service config: against a gateway that fails as often as the test
says."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from farshore.errors import Internal, InvalidRequest, TransportError
from farshore.proto import inference_pb2 as api
from farshore.proto import inference_pb2_grpc

PUSHBACK = "grpc-retry-pushback-ms"


class Flaky(inference_pb2_grpc.InferenceServiceServicer):
    """Fails the first ``failures`` calls. Records all requests."""

    def __init__(self):
        self.failures = 0
        self.code = grpc.StatusCode.UNAVAILABLE
        self.pushback_ms = 1
        self.requests = []
        self.asked = threading.Event()

    def _fail_first(self, request, context):
        self.requests.append(request)
        self.asked.set()
        if len(self.requests) <= self.failures:
            context.set_trailing_metadata(((PUSHBACK, str(self.pushback_ms)),))
            context.abort(self.code, "not now")

    def ListModels(self, request, context):
        self._fail_first(request, context)
        return api.ListModelsResponse(models=[api.Model(name="smollm2")])

    def Generate(self, request, context):
        self._fail_first(request, context)
        yield api.GenerateEvent(accepted=api.Accepted(request_id=request.request_id, prompt_tokens=1))
        yield api.GenerateEvent(
            finished=api.Finished(choices=[api.Completion(reason=api.FINISH_REASON_STOP)])
        )


@pytest.fixture
def flaky():
    """A Flaky and its ``address``."""
    servicer = Flaky()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", -1)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        servicer.server = server
        yield servicer
        server.stop(0).wait(30)


def test_a_unary_call_is_repeated(flaky, sdk):
    flaky.failures = 2
    assert [model.name for model in sdk(flaky.address).models()] == ["smollm2"]
    assert len(flaky.requests) == 3


def test_a_call_is_repeated_twice_at_most(flaky, sdk):
    flaky.failures = 9
    with pytest.raises(TransportError, match="not now"):
        sdk(flaky.address).models()
    assert len(flaky.requests) == 3


def test_a_request_is_repeated_as_it_was(flaky, sdk):
    """Before its first message; also one larger than gRPC's buffer for repeated calls is by default."""
    flaky.failures = 2
    answer = sdk(flaky.address).generate("word " * 100_000).result()
    first, *others = flaky.requests
    assert others == [first, first] and first.request_id == answer.request_id


def test_the_servers_hint_is_followed(flaky, sdk):
    """A negative one: do not repeat."""
    flaky.failures, flaky.pushback_ms = 9, -1
    with pytest.raises(TransportError):
        sdk(flaky.address).models()
    assert len(flaky.requests) == 1


@pytest.mark.parametrize(
    "code, kind", [(grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest), (grpc.StatusCode.INTERNAL, Internal)]
)
def test_other_errors_are_not_repeated(flaky, sdk, code, kind):
    flaky.failures, flaky.code = 9, code
    for call in (lambda client: client.models(), lambda client: client.generate("Hi").result()):
        flaky.requests.clear()
        with pytest.raises(kind, match="not now"):
            call(sdk(flaky.address))
        assert len(flaky.requests) == 1


def test_a_gateway_that_ends_while_a_stream_waits_to_be_repeated(flaky, sdk):
    """gRPC's own repetition of a call may never end then."""
    flaky.failures, flaky.pushback_ms = math.inf, 500
    streams = [sdk(flaky.address).generate(f"Hi {number}") for number in range(8)]
    with ThreadPoolExecutor(len(streams)) as readers:
        results = [readers.submit(stream.result) for stream in streams]
        while len(flaky.requests) < len(streams):
            flaky.asked.wait(30)
            flaky.asked.clear()
        flaky.server.stop(0).wait(30)
        for result in results:
            with pytest.raises(TransportError):
                result.result(60)


def test_the_next_gateway_is_asked_instead(flaky, gateway, sdk):
    flaky.failures = 9
    client = sdk([flaky.address, gateway().address])
    assert [model.root for model in client.models()] != [""]
    assert len(flaky.requests) == 1
