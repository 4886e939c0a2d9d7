"""Deadlines, keepalive pings, the health of each service and reflection, as generic clients use them."""

import contextlib
import socket
import struct

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from farshore.gateway.limits import Limits
from farshore.proto import inference_pb2 as api

from ...waiting import until

INFERENCE, ADMIN = "farshore.inference.v1.InferenceService", "farshore.admin.v1.AdminService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PING, GOAWAY, SETTINGS = 6, 7, 4
ACK = 1


def with_a_deadline(farshore, ask, count=1):
    """The call that ``ask(timeout_s)`` makes, with a deadline that left ``count`` sequences the time to reach
    the engine."""

    def attempt(timeout_s):
        wanted, call = farshore.engine.arrived + count, ask(timeout_s)
        until(lambda: farshore.engine.arrived >= wanted or call.done())
        return call if farshore.engine.arrived >= wanted else None

    attempts = (attempt(timeout_s) for timeout_s in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    return next(call for call in attempts if call is not None)


@pytest.mark.parametrize("request_id", ["", "a"])
def test_a_clients_deadline_ends_the_sequence(start, harness, request_id):
    """The time that a named request has, if its client does not come back."""
    farshore = start(limits=Limits(grace_s=0.01, drain_s=0.1))

    def ask(timeout_s):
        asked = api.GenerateRequest(text="Hello", request_id=request_id and f"{request_id} {timeout_s}")
        return farshore.stub.Generate(asked, timeout=timeout_s)

    call = with_a_deadline(farshore, ask)
    assert harness.failure_of(call).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    while not farshore.engine.idle:
        assert farshore.engine.next_sequence().ended.wait(60)


def test_a_deadline_that_has_passed_starts_nothing(farshore, harness):
    call = farshore.stub.Generate(api.GenerateRequest(text="Hello"), timeout=-1)
    assert harness.failure_of(call).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert farshore.engine.idle


def test_a_batchs_deadline_ends_its_sequences(farshore):
    asked = api.BatchGenerateRequest(requests=[api.GenerateRequest(text="Hello") for _ in range(2)])
    call = with_a_deadline(
        farshore, lambda timeout_s: farshore.stub.BatchGenerate.future(asked, timeout=timeout_s), count=2
    )
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    while not farshore.engine.idle:
        assert farshore.engine.next_sequence().ended.wait(60)


class Http2:
    """A connection that speaks HTTP/2's frames."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._frame(SETTINGS, b""))
        self._stream = self._socket.makefile("rb")

    @staticmethod
    def _frame(kind, payload):
        return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + bytes(4) + payload

    def ping(self, *numbers):
        """One write: a gateway that hangs up at one of them breaks none of the others."""
        self._socket.sendall(b"".join(self._frame(PING, number.to_bytes(8)) for number in numbers))

    def frames(self):
        """(kind, flags, payload) of each frame until the connection ends."""
        while len(head := self._stream.read(9)) == 9:
            size = int.from_bytes(head[:3])
            yield head[3], head[4], self._stream.read(size)

    def close(self):
        self._stream.close()
        self._socket.close()


@pytest.fixture
def connect():
    made = []

    def new(address):
        made.append(Http2(address))
        return made[-1]

    yield new
    for connection in made:
        connection.close()


def test_pings_at_the_permitted_rate_are_answered_without_calls(start, connect):
    farshore = start(limits=Limits(ping_interval_ms=0, drain_s=0.1))
    connection = connect(farshore.address)
    for number in range(20):
        connection.ping(number)
    acknowledged = set()
    for kind, flags, payload in connection.frames():
        assert kind != GOAWAY, payload
        if kind == PING and flags & ACK:
            acknowledged.add(int.from_bytes(payload))
        if len(acknowledged) == 20:
            break
    assert acknowledged == set(range(20))


def test_a_client_that_pings_too_often_is_told_so(farshore, connect):
    connection = connect(farshore.address)
    connection.ping(*range(20))
    goodbyes = [payload for kind, _, payload in connection.frames() if kind == GOAWAY]
    assert any(b"too_many_pings" in payload for payload in goodbyes)


def _wait_for(stub, service, status):
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)
    assert any(reply.status == status for reply in watch)
    watch.cancel()


def test_the_health_of_each_service_is_its_own(start, engines):
    """The client API's follows the engine, the operators' follows the controller."""
    engine = engines()
    limits = Limits(probe_s=0.1, missed_probes=1000, cancel_s=0.5, drain_s=0.1)
    farshore = start(engine_address=engine.address, limits=limits)  # The controller is the FakeEngine.
    stub = health_pb2_grpc.HealthStub(farshore.channel)
    for service in ("", INFERENCE, ADMIN):
        _wait_for(stub, service, SERVING)
    farshore.stop_engine()
    _wait_for(stub, ADMIN, NOT_SERVING)
    for service in ("", INFERENCE):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status == SERVING
    engine.tell("failed")
    for service in ("", INFERENCE):
        _wait_for(stub, service, NOT_SERVING)


def test_the_health_of_an_unknown_service(farshore):
    with pytest.raises(grpc.RpcError) as caught:
        stub = health_pb2_grpc.HealthStub(farshore.channel)
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=30)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_a_generic_client_learns_services_and_messages(farshore, version):
    ask = farshore.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed, *described = ask(
        iter(
            [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                *(
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
                    for name in (INFERENCE, ADMIN)
                ),
            ]
        ),
        timeout=30,
    )
    names = {service.name for service in listed.list_services_response.service}
    assert {INFERENCE, ADMIN, "grpc.health.v1.Health"} <= names
    packages = []
    for reply in described:
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(raw)
            for raw in reply.file_descriptor_response.file_descriptor_proto
        ]
        packages += [file.package for file in files]
        assert any(service.name.endswith("Service") for file in files for service in file.service)
    assert {"farshore.inference.v1", "farshore.admin.v1"} <= set(packages)


def test_calls_that_stay_open_leave_room_for_others(start):
    """Watches of the health, and of the services: two of four."""
    farshore = start(limits=Limits(max_readers=1, other_calls=4, drain_s=0.1))
    stub = health_pb2_grpc.HealthStub(farshore.channel)
    request = health_pb2.HealthCheckRequest()
    watches = [stub.Watch(request, timeout=60) for _ in range(2)]
    assert all(next(watch).status == SERVING for watch in watches)
    ask = farshore.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    for refused in (stub.Watch(request, timeout=30), ask(iter([asked]), timeout=30)):
        with pytest.raises(grpc.RpcError) as caught:
            next(refused)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 calls watch this gateway already" in caught.value.details()
    assert stub.Check(request, timeout=30).status == SERVING
    farshore.engine.auto = ()
    assert len(list(farshore.generate())) == 2
    watches[0].cancel()

    def watched():
        with contextlib.suppress(grpc.RpcError):
            return next(stub.Watch(request, timeout=30))

    until(watched)
