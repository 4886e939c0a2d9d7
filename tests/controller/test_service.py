"""The controller's gRPC service over real gRPC services of workers, in this process."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest

from farshore import rpc
from farshore.attention_offload.shard.server import serve as serve_attention
from farshore.attention_offload.shard.service import AttentionService
from farshore.controller.config import ClusterConfig
from farshore.controller.controller import MAX_CALLS
from farshore.controller.events import Events
from farshore.controller.service import MOST_FOLLOWERS, STATUS_AGE_S, AdminService
from farshore.errors import InvalidRequest, NotFound
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.model_spec import ModelSpec
from farshore.models.config.load import load_spec
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto.words import word

from ..waiting import until

SHARD = WorkerId("attention-0")
MEMORY_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Workers are awaited as long as a busy machine takes."""
    monkeypatch.setattr("farshore.controller.service.PROBE_DEADLINE_S", 60.0)


@pytest.fixture
def directory():
    return EmbeddedDirectory()


class Recorded:
    """Operations that record what they are asked."""

    def __init__(self):
        self.events = Events()
        self.counts = {"dense": 1, "attention": 2}
        self.downs = 0
        self.drains = []

    def scale(self, changes):
        if changes.get("attention") == 0:
            raise InvalidRequest("--attention-workers 0: give at least 1")
        self.counts |= changes
        return self.counts

    def drain(self, worker, timeout_s):
        if worker != SHARD:
            raise NotFound(f"no worker {worker!r} runs")
        self.drains.append((worker, timeout_s))
        return worker

    def begin_down(self):
        self.downs += 1


@pytest.fixture
def operations():
    return Recorded()


@pytest.fixture
def listed(directory):
    """listed(worker, kind, address, ...): lists a worker in the directory."""

    def renew(worker, kind, address, **fields):
        directory.renew(
            WorkerRecord(
                worker=WorkerId(worker),
                kind=kind,
                slot=worker,
                address=address,
                host="127.0.0.1",
                process_id=1,
                device=f"{kind}'s device",
                **{"state": "serving", **fields},
            )
        )

    return renew


@pytest.fixture
def clock():
    """Stands still unless the test changes ``now_s``."""
    return SimpleNamespace(now_s=0.0)


@pytest.fixture
def service(directory, operations, clock):
    model = load_spec(ModelSpec())[1]
    made = AdminService(ClusterConfig(), model, directory, operations, clock=lambda: clock.now_s)
    yield made
    made.close()


@pytest.fixture
def stub(service):
    server, address = rpc.serve(
        lambda server: admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server),
        service=admin.DESCRIPTOR.services_by_name["AdminService"].full_name,
        listen="127.0.0.1:0",
        threads=8,
        token=None,
    )
    with grpc.insecure_channel(address) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)
    server.stop(0).wait()


def test_status_shows_workers_that_answer_and_that_do_not(stub, listed):
    server, address = serve_attention(
        AttentionService(SHARD, LocalStore(worker=SHARD, arena=Arena(MEMORY_BYTES))), "127.0.0.1:0"
    )
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        absent = f"127.0.0.1:{closed.getsockname()[1]}"
        listed(SHARD, "attention", address, node="machine-1", zone="rack-3")
        listed("attention-1", "attention", absent, node="machine-2")
        listed("dense-0", "dense", absent)
        status = stub.ClusterStatus(admin.ClusterStatusRequest())
    server.stop(0).wait()
    assert status.model == "smollm2" and status.max_positions == 8192
    assert (status.kv_format, status.max_decode_stall_ms, status.speculate_tokens) == ("bf16", 200.0, 0)
    assert {worker.worker_id: worker.state for worker in status.workers} == {
        "attention-0": admin.WORKER_STATE_READY,
        "attention-1": admin.WORKER_STATE_UNREACHABLE,
        "dense-0": admin.WORKER_STATE_UNREACHABLE,
    }
    assert all(w.device == f"{word(admin.WorkerKind, w.kind)}'s device" for w in status.workers)
    assert {worker.worker_id: (worker.node, worker.zone) for worker in status.workers} == {
        "attention-0": ("machine-1", "rack-3"),
        "attention-1": ("machine-2", ""),
        "dense-0": ("", ""),
    }
    assert (status.pool_budget_bytes, status.pool_free_bytes) == (MEMORY_BYTES, MEMORY_BYTES)
    assert not status.sequences


@pytest.mark.parametrize("kind", ["dense", "attention"])
@pytest.mark.parametrize("address", ["", "127.0.0.1:1"])
def test_status_shows_a_worker_that_failed_also_one_that_could_not_load(stub, listed, kind, address):
    listed("dense-0", "dense", "", state="loading")
    listed("failed-0", kind, address, state="failed", failure="no such model", node="machine-1")
    (worker,) = stub.ClusterStatus(admin.ClusterStatusRequest()).workers
    assert worker == admin.WorkerStatus(
        worker_id="failed-0",
        kind=admin.WORKER_KIND_DENSE if kind == "dense" else admin.WORKER_KIND_ATTENTION,
        state=admin.WORKER_STATE_FAILED,
        failure="no such model",
        address=address,
        host="127.0.0.1",
        process_id=1,
        device=f"{kind}'s device",
        node="machine-1",
    )


class Rendezvous(pb_grpc.EngineServicer):
    """Engines none of which answers before all have been asked."""

    def __init__(self, engines):
        self.asked = threading.Barrier(engines, timeout=60)
        self.state = admin.WORKER_STATE_READY
        self.calls = 0

    def Status(self, request, context):
        if self.asked.wait() == 0:
            self.calls += 1
        return pb.EngineStatus(
            worker=admin.WorkerStatus(worker_id="dense", kind=admin.WORKER_KIND_DENSE, state=self.state)
        )


@pytest.fixture
def rendezvous(listed):
    """Three engines, which would all be unreachable if they were asked one after the other."""
    answering = Rendezvous(3)
    servers = []
    for index in range(3):
        server, address = rpc.serve(
            lambda server: pb_grpc.add_EngineServicer_to_server(answering, server),
            service=pb.DESCRIPTOR.services_by_name["Engine"].full_name,
            listen="127.0.0.1:0",
            threads=2,
            token=None,
        )
        servers.append(server)
        listed(f"dense-{index}", "dense", address)
    yield answering
    for server in servers:
        server.stop(0).wait()


def test_workers_are_asked_at_once_and_under_one_deadline(stub, listed, rendezvous, monkeypatch):
    deadline_s = 4.0
    monkeypatch.setattr("farshore.controller.service.PROBE_DEADLINE_S", deadline_s)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        address = f"127.0.0.1:{frozen.getsockname()[1]}"
        for index in range(8):
            listed(f"attention-{index}", "attention", address)
        # Asking eight frozen workers one after the other would take longer than that.
        status = stub.ClusterStatus(admin.ClusterStatusRequest(), timeout=7 * deadline_s)
    states = [worker.state for worker in status.workers]
    assert states == [admin.WORKER_STATE_READY] * 3 + [admin.WORKER_STATE_UNREACHABLE] * 8
    assert status.pool_budget_bytes == 0


def test_an_engine_that_has_ended_is_never_ready(stub, rendezvous):
    rendezvous.state = admin.WORKER_STATE_FAILED
    assert {worker.state for worker in stub.ClusterStatus(admin.ClusterStatusRequest()).workers} == {
        admin.WORKER_STATE_FAILED
    }


def test_callers_share_an_answer_that_is_new_or_being_made(stub, rendezvous, clock):
    def ask(_):
        return len(stub.ClusterStatus(admin.ClusterStatusRequest()).workers)

    with ThreadPoolExecutor(6) as callers:
        assert list(callers.map(ask, range(6))) == [3] * 6
    assert rendezvous.calls == 1
    rendezvous.state = admin.WORKER_STATE_FAILED
    clock.now_s += STATUS_AGE_S / 2
    assert stub.ClusterStatus(admin.ClusterStatusRequest()).workers[0].state == admin.WORKER_STATE_READY
    clock.now_s += STATUS_AGE_S / 2
    assert stub.ClusterStatus(admin.ClusterStatusRequest()).workers[0].state == admin.WORKER_STATE_FAILED
    assert rendezvous.calls == 2


def test_status_shows_who_drains(stub, listed, directory, rendezvous):
    directory.close([], draining=["dense-1"])
    status = stub.ClusterStatus(admin.ClusterStatusRequest())
    assert [worker.state for worker in status.workers] == [
        admin.WORKER_STATE_READY,
        admin.WORKER_STATE_DRAINING,
        admin.WORKER_STATE_READY,
    ]


def test_drain_marks_a_worker_that_runs(stub, operations):
    assert stub.Drain(admin.DrainRequest(worker_id=SHARD)).worker_id == SHARD
    stub.Drain(admin.DrainRequest(worker_id=SHARD, timeout_s=0))
    assert operations.drains == [(SHARD, None), (SHARD, 0.0)]
    for request, code in (
        (admin.DrainRequest(worker_id="attention-9"), grpc.StatusCode.NOT_FOUND),
        (admin.DrainRequest(worker_id=SHARD, timeout_s=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (admin.DrainRequest(worker_id=SHARD, timeout_s=float("nan")), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            stub.Drain(request)
        assert refused.value.code() is code
    assert len(operations.drains) == 2


def test_workers_are_reached_past_a_web_proxy(stub, rendezvous, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert {worker.state for worker in stub.ClusterStatus(admin.ClusterStatusRequest()).workers} == {
        admin.WORKER_STATE_READY
    }


def test_scale_changes_what_is_named_and_refuses_what_cannot_work(stub, operations):
    reply = stub.Scale(admin.ScaleRequest(attention_workers=4))
    assert (reply.dense_workers, reply.attention_workers) == (1, 4)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Scale(admin.ScaleRequest(attention_workers=0))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert operations.counts == {"dense": 1, "attention": 4}


def test_down_begins_once_for_each_call(stub, operations):
    stub.Down(admin.DownRequest())
    assert operations.downs == 1


def test_events_are_streamed_from_a_number_on_and_as_they_come(stub, operations):
    for index in range(3):
        operations.events.add("joined", f"attention-{index}")
    kept = list(stub.WatchEvents(admin.WatchEventsRequest(since=1)))
    assert [(event.number, event.subject) for event in kept] == [(2, "attention-1"), (3, "attention-2")]
    following = stub.WatchEvents(admin.WatchEventsRequest(since=3, follow=True), timeout=60)
    operations.events.add("lost", "attention-0", "it was killed")
    event = next(following)
    assert (event.kind, event.detail) == ("lost", "it was killed")
    following.cancel()


def test_connections_to_workers_that_are_gone_are_closed(service, stub, directory, rendezvous, clock):
    stub.ClusterStatus(admin.ClusterStatusRequest())
    gone, *left = directory.listing().workers
    directory.withdraw(gone.worker)
    rendezvous.asked = threading.Barrier(2, timeout=60)
    clock.now_s += STATUS_AGE_S
    stub.ClusterStatus(admin.ClusterStatusRequest())
    assert service._channels.keys() == {worker.address for worker in left}


def test_followers_of_events_leave_calls_for_the_workers(service, operations, directory):
    """The directory's server is the operators', too."""

    def register(server):
        admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
        pb_grpc.add_DirectoryServicer_to_server(DirectoryService(directory), server)

    server, address = rpc.serve(
        register,
        service=admin.DESCRIPTOR.services_by_name["AdminService"].full_name,
        listen="127.0.0.1:0",
        threads=MAX_CALLS,
        token=None,
    )
    operations.events.add("joined", "attention-0")
    with grpc.insecure_channel(address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        streams = [
            stub.WatchEvents(admin.WatchEventsRequest(follow=True), timeout=60) for _ in range(MAX_CALLS)
        ]
        followed, refused = [], []
        for stream in streams:
            try:
                next(stream)
                followed.append(stream)
            except grpc.RpcError as error:
                refused.append(error)
        assert len(followed) == MOST_FOLLOWERS
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert f"{MOST_FOLLOWERS} calls follow the events already" in refused[0].details()
        pb_grpc.DirectoryStub(channel).List(pb.ListRequest(), timeout=60)
        assert list(stub.WatchEvents(admin.WatchEventsRequest()))
        # A reader that is gone makes room.
        followed[0].cancel()

        def follows():
            with contextlib.suppress(grpc.RpcError):
                return next(stub.WatchEvents(admin.WatchEventsRequest(follow=True), timeout=60))

        until(follows)
    server.stop(0).wait()


def test_callers_of_the_state_leave_calls_for_the_workers(service, stub, directory, rendezvous, monkeypatch):
    """While no engine answers."""
    monkeypatch.setattr(service, "_asking", rpc.CallLimit(2, "calls ask for the state already"))
    rendezvous.asked = threading.Barrier(4, timeout=60)
    calls = [stub.ClusterStatus.future(admin.ClusterStatusRequest(), timeout=60) for _ in range(3)]
    until(lambda: any(call.done() for call in calls))
    (refused,) = [call for call in calls if call.done()]
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 calls ask for the state already" in refused.details()
    assert list(stub.WatchEvents(admin.WatchEventsRequest(), timeout=60)) == []
    rendezvous.asked.wait()
    assert all(call is refused or len(call.result().workers) == 3 for call in calls)


def test_status_tells_the_first_name_and_the_length(directory, operations):
    spec = ModelSpec(served_names=("one", "two"), max_model_len=99)
    service = AdminService(ClusterConfig(spec=spec), load_spec(spec)[1], directory, operations)
    status = service.ClusterStatus(admin.ClusterStatusRequest(), None)
    assert (status.model, status.max_positions) == ("one", 99)
