"""The controller's gRPC service over real gRPC services of workers, in this process."""

import socket
import threading

import grpc
import pytest

from farshore import rpc
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.shard.service import serve as serve_attention
from farshore.controller.config import ClusterConfig
from farshore.controller.service import PROBE_DEADLINE_S, ControllerService
from farshore.ids import WorkerId
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.config.load import load_config
from farshore.models.files.source import resolve
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto import inference_pb2 as api

SHARD = WorkerId("attention-0")
MEMORY_BYTES = 64 << 20


@pytest.fixture
def service():
    made = ControllerService(ClusterConfig(), load_config(resolve("smollm2")))
    yield made
    made.close()


@pytest.fixture
def stub(service):
    server, address = rpc.serve(
        lambda server: pb_grpc.add_ControllerServicer_to_server(service, server),
        service=pb.DESCRIPTOR.services_by_name["Controller"].full_name,
        listen="127.0.0.1:0",
        threads=2,
    )
    with grpc.insecure_channel(address) as channel:
        yield pb_grpc.ControllerStub(channel)
    server.stop(0).wait()


def test_status_shows_workers_that_answer_and_that_do_not(stub, service):
    server, address = serve_attention(
        AttentionService(SHARD, LocalStore(worker=SHARD, arena=Arena(MEMORY_BYTES))), "127.0.0.1:0"
    )
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        absent = f"127.0.0.1:{closed.getsockname()[1]}"
        service.attention |= {SHARD: address, WorkerId("attention-1"): absent}
        service.dense[WorkerId("dense-0")] = absent
        status = stub.Status(pb.StatusRequest())
    server.stop(0).wait()
    assert status.model == "smollm2" and status.max_positions == 8192
    assert (status.kv_format, status.max_decode_stall_ms, status.speculate_tokens) == ("bf16", 200.0, 0)
    assert {worker.worker_id: worker.state for worker in status.workers} == {
        "attention-0": "ready",
        "attention-1": "unreachable",
        "dense-0": "unreachable",
    }
    assert (status.pool_budget_bytes, status.pool_free_bytes) == (MEMORY_BYTES, MEMORY_BYTES)
    assert not status.sequences


class Rendezvous(pb_grpc.EngineServicer):
    """Engines none of which answers before all have been asked."""

    def __init__(self, engines):
        self.asked = threading.Barrier(engines, timeout=60)
        self.state = "ready"

    def Status(self, request, context):
        self.asked.wait()
        return pb.EngineStatus(worker=api.WorkerStatus(worker_id="dense", kind="dense", state=self.state))


@pytest.fixture
def rendezvous(service):
    """Three engines, which would all be unreachable if they were asked one after the other."""
    answering = Rendezvous(3)
    servers = []
    for index in range(3):
        server, address = rpc.serve(
            lambda server: pb_grpc.add_EngineServicer_to_server(answering, server),
            service=pb.DESCRIPTOR.services_by_name["Engine"].full_name,
            listen="127.0.0.1:0",
            threads=2,
        )
        servers.append(server)
        service.dense[WorkerId(f"dense-{index}")] = address
    yield answering
    for server in servers:
        server.stop(0).wait()


def test_workers_are_asked_at_once_and_under_one_deadline(stub, service, rendezvous):
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        address = f"127.0.0.1:{frozen.getsockname()[1]}"
        service.attention |= {WorkerId(f"attention-{index}"): address for index in range(8)}
        # Asking eight frozen workers one after the other would take more than twice this time.
        status = stub.Status(pb.StatusRequest(), timeout=3.5 * PROBE_DEADLINE_S)
    states = [worker.state for worker in status.workers]
    assert states == ["ready"] * 3 + ["unreachable"] * 8
    assert status.pool_budget_bytes == 0


def test_an_engine_that_has_ended_is_never_ready(stub, rendezvous):
    rendezvous.state = "failed"
    assert {worker.state for worker in stub.Status(pb.StatusRequest()).workers} == {"failed"}


def test_workers_are_reached_past_a_web_proxy(stub, service, rendezvous, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert {worker.state for worker in stub.Status(pb.StatusRequest()).workers} == {"ready"}
