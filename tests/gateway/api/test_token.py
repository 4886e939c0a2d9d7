"""A gateway in front of a cluster with a token: clients learn that the gateway has another, or none."""

import subprocess
import sys

import grpc
import pytest

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.proto import admin_pb2 as admin
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.proto.inference_pb2 import FINISH_REASON_STOP

CODE = grpc.StatusCode


class Engine(cluster_pb2_grpc.EngineServicer):
    """Ends each sequence at once."""

    def Run(self, messages, context):
        done = cluster_pb2.SequenceFinished(reason=FINISH_REASON_STOP)
        for message in messages:
            event = cluster_pb2.SequenceEvent(number=message.number, finished=done)
            yield cluster_pb2.EngineMessage(events=[event])


@pytest.fixture
def token(tmp_path):
    return ClusterToken.make(tmp_path / "token")


@pytest.fixture
def trusting(token):
    """The address of an engine, and of a directory, that ask for the token."""
    directory = DirectoryService(EmbeddedDirectory())

    def register(server):
        cluster_pb2_grpc.add_EngineServicer_to_server(Engine(), server)
        cluster_pb2_grpc.add_DirectoryServicer_to_server(directory, server)

    server, address = rpc.serve(
        register,
        service=cluster_pb2.DESCRIPTOR.services_by_name["Engine"].full_name,
        listen="127.0.0.1:0",
        threads=8,
        token=token,
    )
    yield address
    server.stop(0).wait()


@pytest.fixture(params=["none", "another"])
def wrong(request, tmp_path):
    """(a token that is not the cluster's, what its refusal says)"""
    if request.param == "none":
        return None, "--token-file"
    return ClusterToken.make(tmp_path / "another"), "copy one token file"


def test_with_the_token_requests_are_answered(start, token, trusting):
    farshore = start(engine_address=trusting, token=token)
    assert [event.WhichOneof("kind") for event in farshore.generate()][-1] == "finished"


def test_another_token_is_told_to_clients_who_are_not_asked_for_one(start, harness, trusting, wrong):
    token, fix = wrong
    farshore = start(engine_address=trusting, controller=trusting, token=token)
    # gRPC loses the status of a call that ends while a message is sent: see FROM_CORE.
    while rpc.FROM_CORE in (failure := harness.failure_of(farshore.generate())).details():
        assert failure.code() is CODE.UNAVAILABLE
    assert failure.code() in (CODE.UNAVAILABLE, CODE.INTERNAL)
    assert trusting in failure.details() and fix in failure.details()
    with pytest.raises(grpc.RpcError) as caught:
        farshore.operators.ClusterStatus(admin.ClusterStatusRequest(), timeout=30)
    assert caught.value.code() is CODE.UNAVAILABLE
    assert f"the controller at {trusting} refuses this gateway: " in caught.value.details()
    assert fix in caught.value.details()


def ends_with(*options):
    """What a gateway says when it ends by itself."""
    command = [sys.executable, "-P", "-m", "farshore.gateway", "--listen", "127.0.0.1:0", *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


def test_a_directory_that_refuses_the_token_ends_the_gateway(trusting, wrong):
    token, fix = wrong
    options = ["--token-file", str(token.path)] if token else []
    assert fix in ends_with("--directory", f"grpc://{trusting}", *options)


def test_a_token_file_that_others_may_read_ends_the_gateway(token):
    token.path.chmod(0o644)
    said = ends_with("--directory", "grpc://127.0.0.1:1", "--token-file", str(token.path))
    assert f"chmod 600 {token.path}" in said
