"""The real gateway as a child process: an unexpected end is described, a requested one is no failure."""

import os
import signal
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.controller.driver.gateway_process import GatewayProcess
from farshore.errors import ModelError, StartupError
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.model_spec import ModelSpec
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto import inference_pb2 as api
from farshore.proto import inference_pb2_grpc

from ...waiting import until

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NOWHERE = dict(directory="grpc://127.0.0.1:1", controller="127.0.0.1:2")


@pytest.fixture
def token_file(tmp_path):
    ClusterToken.make(tmp_path / "token")
    return str(tmp_path / "token")


@pytest.fixture
def gateway(harness, loop_thread, token_file):
    """A gateway that finds an engine: a FakeEngine that an embedded directory lists."""
    directory = EmbeddedDirectory(clock=lambda: 0.0)
    with harness.engine(loop_thread) as engine:
        directory.renew(harness.dense("dense-0-a", engine.address))
        server, listed_at = rpc.serve(
            lambda server: pb_grpc.add_DirectoryServicer_to_server(DirectoryService(directory), server),
            service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
            listen="127.0.0.1:0",
            threads=8,
            token=ClusterToken.read(token_file),
        )
        made = GatewayProcess(
            spec=ModelSpec(),
            listen="127.0.0.1:0",
            http="127.0.0.1:0",
            directory=f"grpc://{listed_at}",
            controller=listed_at,
            token_file=token_file,
            drain_s=60.0,
        )
        made.engine = engine
        yield made
        made.stop()
        server.stop(0).wait()


def _process_id(gateway):
    return gateway._process.pid


def _await_end(gateway):
    os.waitid(os.P_PID, _process_id(gateway), os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize(
    ("number", "ending"),
    # After SIGTERM the gateway ends with code 0, which is unexpected all the same.
    [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGTERM, "ended with code 0")],
)
def test_an_unexpected_end(gateway, number, ending):
    gateway.check_start()
    gateway.serve()
    gateway.check_start()
    assert gateway.ended() is None
    os.kill(_process_id(gateway), number)
    _await_end(gateway)
    assert gateway.ended() == f"the gateway (process {_process_id(gateway)}) {ending}"


def test_a_requested_end(gateway):
    gateway.serve()
    gateway.stop()
    assert gateway.ended() is None


@pytest.fixture
def running(gateway):
    """(the sequence of a request that runs, its stream, the thread that stops the gateway): the gateway has
    begun to end."""
    with grpc.insecure_channel(gateway.serve()) as channel:
        request = api.GenerateRequest(text="Hello")
        stream = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)
        sequence = gateway.engine.next_sequence()
        stopping = threading.Thread(target=gateway.stop, kwargs={"drains": True})
        stopping.start()
        check = health_pb2_grpc.HealthStub(channel).Check
        until(lambda: check(health_pb2.HealthCheckRequest()).status == NOT_SERVING)
        yield sequence, stream, stopping
        stopping.join()


def test_a_running_request_may_end(gateway, running):
    sequence, stream, stopping = running
    sequence.tokens(1, 2)
    sequence.finish()
    assert list(stream)[-1].HasField("finished")
    stopping.join()
    assert gateway._process.returncode == 0


def test_an_end_that_waits_for_no_request(gateway, running):
    _, stream, stopping = running
    gateway.end_now()
    with pytest.raises(grpc.RpcError):
        list(stream)
    stopping.join()
    assert gateway._process.returncode == -signal.SIGKILL and gateway.ended() is None


def test_an_error_while_it_loads_is_told_before_it_is_asked_to_serve(tmp_path, token_file):
    template = tmp_path / "bad.jinja"
    template.write_text("{% for %}")
    spec = ModelSpec(chat_template=str(template))
    options = dict(listen="127.0.0.1:0", http=None, token_file=token_file, drain_s=0.0)
    gateway = GatewayProcess(spec=spec, **options, **NOWHERE)
    try:
        _await_end(gateway)
        gateway._reported.wait()
        with pytest.raises(ModelError, match="--chat-template"):
            gateway.check_start()
    finally:
        gateway.stop()


def test_an_end_before_it_serves(gateway):
    os.kill(_process_id(gateway), signal.SIGKILL)
    with pytest.raises(StartupError, match="was killed by SIGKILL"):
        gateway.serve()
