"""Workers that end: what they serve drains first, for a limited time, and health and directory say so."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.remote import RemoteClient
from farshore.ids import Epoch, SequenceId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kvstore.base import SpanKey
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.store.store import LocalStore
from farshore.proto import admin_pb2 as admin
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.proto import inference_pb2 as api
from farshore.workers.dense import DenseWorker
from farshore.workers.ending import Ending

from ..waiting import until
from .hold.endless import ENDLESS
from .hold.paused import pause_next
from .in_process import DENSE, attention_worker, dense_config

DEADLINE_S = 60.0
HEALTH = health_pb2.HealthCheckResponse
SPEC = AttentionSpec(q_heads=2, k_heads=1, v_heads=1, k_dim=8, v_dim=8, scale=1.0)
LAYOUT = KVLayout.of(SPEC, layers=1, format=KVFormat.FLOAT32)


class Dense:
    """A dense worker in this process, with its gRPC service."""

    def __init__(self, folder):
        self.directory = EmbeddedDirectory(clock=lambda: 0.0)
        self.worker = DenseWorker(dense_config(folder), self.directory, host="127.0.0.1")
        self.worker.run()
        until(lambda: self.state() == "serving", "it is not listed")
        (record,) = self.directory.listing().workers
        self.channel = grpc.insecure_channel(record.address)
        self.stub = pb_grpc.EngineStub(self.channel)
        self.ended = threading.Event()
        self.ending = Ending(self.worker, then=lambda code: self.ended.set())

    def state(self):
        return next((record.state for record in self.directory.listing().workers), None)

    def health(self):
        request = health_pb2.HealthCheckRequest(service="farshore.cluster.v1.Engine")
        return health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=DEADLINE_S).status

    def generate(self, name, tokens):
        sampling = api.Sampling(max_tokens=tokens, temperature=0)
        request = pb.SequenceRequest(sequence_id=name, epoch=1, prompt=[1, 2, 3], sampling=sampling)
        message = pb.GatewayMessage(number=1, submit=request.SerializeToString())
        call = self.stub.Run(iter([message]), timeout=DEADLINE_S)
        try:
            for reply in call:
                yield from reply.events
        finally:
            call.cancel()

    def running(self, name):
        """The stream of an endless request that has generated a token."""
        stream = self.generate(name, ENDLESS.max_tokens)
        assert next(event for event in stream if event.HasField("token"))
        return stream


@pytest.fixture
def dense(tiny_folder):
    made = Dense(tiny_folder)
    yield made
    made.ending.begin(0.0)
    assert made.ended.wait(DEADLINE_S)
    made.channel.close()


def refused(events):
    failed = list(events)[-1].failed
    assert failed.code == grpc.StatusCode.UNAVAILABLE.value[0]
    return failed.message


def test_a_drained_dense_worker_refuses_new_requests_and_ends_with_its_last_one(dense):
    stands_still, stream = pause_next(dense.worker._engine, 2), dense.generate("a", 50)
    assert next(event for event in stream if event.HasField("token"))
    with stands_still:
        dense.ending.begin(DEADLINE_S)
        until(lambda: dense.state() == "draining", "the directory does not say so")
        assert dense.health() == HEALTH.NOT_SERVING
        assert dense.stub.Status(pb.EngineStatusRequest()).worker.state == admin.WORKER_STATE_DRAINING
        assert "dense-0-aa is draining: send the request again" in refused(dense.generate("b", 1))
    events = list(stream)
    assert events[-1].HasField("finished") and sum(e.HasField("token") for e in events) == 49
    assert dense.ended.wait(DEADLINE_S)
    assert dense.state() is None


def test_what_is_left_after_the_drain_fails_and_says_what_to_do(dense):
    stream = dense.running("a")
    dense.ending.begin(DEADLINE_S)
    # A second call, as when the whole cluster ends, only shortens the time.
    dense.ending.begin(0.0)
    assert "dense worker dense-0-aa was drained: send the request again" in refused(stream)
    assert dense.ended.wait(DEADLINE_S)


def test_the_directory_drains_a_dense_worker_and_opens_it_again(dense):
    stream = dense.running("a")
    dense.directory.close([], draining=[DENSE])
    until(lambda: dense.health() == HEALTH.NOT_SERVING, "health says nothing of the drain")
    assert "is draining" in refused(dense.generate("b", 1))
    assert dense.state() == "serving" and not dense.ended.is_set()
    dense.directory.close([])
    until(lambda: dense.health() == HEALTH.SERVING, "it does not open again")
    assert list(dense.generate("c", 1))[-1].HasField("finished")
    stream.close()
    until(lambda: dense.worker.is_drained, "the sequence of a cut call goes on")


def key(sequence):
    return SpanKey(sequence=SequenceId(sequence), layer_class=0, first=0, group0=0, group1=1)


@contextlib.contextmanager
def client_of(address):
    client = RemoteClient(address, AttentionModel((SPEC,), (0,), (LAYOUT,)), torch.float32)
    try:
        yield client
    finally:
        client.close()


def test_an_attention_worker_drains_until_no_sequence_holds_a_span():
    directory = EmbeddedDirectory(clock=lambda: 0.0)
    worker = attention_worker(directory)
    ended = threading.Event()
    ending = Ending(worker, then=lambda code: ended.set())
    with client_of(worker.address()) as client, grpc.insecure_channel(worker.address()) as channel:
        span = client.store.create(key("a"), capacity_tokens=4, layout=LAYOUT, epoch=Epoch(1))
        ending.begin(DEADLINE_S)
        until(lambda: [r.state for r in directory.listing().workers] == ["draining"], "not listed so")
        check = health_pb2.HealthCheckRequest(service="farshore.attention.v1.Attention")
        assert health_pb2_grpc.HealthStub(channel).Check(check).status == HEALTH.NOT_SERVING
        assert not worker.is_drained and not ended.is_set()
        client.store.drop([span], sequence=SequenceId("a"), epoch=Epoch(1))
        assert ended.wait(DEADLINE_S)
    assert not directory.listing().workers


def test_an_attention_worker_whose_device_fails_is_not_ready(monkeypatch):
    """After an illegal access a GPU refuses every call. The worker says so, and its process is to end."""
    runtimes = []

    def on_a_device(**options):
        runtimes.append(DeferringRuntime(seed=1))
        return LocalStore(**options, runtime=runtimes[0])

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr("farshore.workers.attention.LocalStore", on_a_device)
    monkeypatch.setattr("farshore.attention_offload.shard.engine_holds.TICK_S", 0.01)
    directory, failed = EmbeddedDirectory(clock=lambda: 0.0), []
    worker = attention_worker(directory, on_failed=lambda: failed.append(None))
    with grpc.insecure_channel(worker.address()) as channel:
        check = health_pb2.HealthCheckRequest(service="farshore.attention.v1.Attention")
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(check).status == HEALTH.SERVING and not failed
        monkeypatch.setattr(runtimes[0].main, "record", broken)
        until(lambda: health.Check(check).status == HEALTH.NOT_SERVING, "the device was not looked after")
        until(lambda: [r.state for r in directory.listing().workers] == ["failed"], "not listed so")
    (record,) = directory.listing().workers
    assert record.failure == "the device failed: CUDA error: an illegal memory access was encountered"
    worker.stop()
    assert len(failed) == 1


def test_sigterm_drains_an_attention_worker_that_runs_as_a_program():
    command = [sys.executable, "-P", "-m", "farshore.workers.attention"]
    options = ["--worker", "shard", "--kv-memory-bytes", str(8 << 20), "--drain-timeout", str(DEADLINE_S)]
    with subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().strip()
        with client_of(address) as client:
            span = client.store.create(key("a"), capacity_tokens=4, layout=LAYOUT, epoch=Epoch(1))
            os.kill(process.pid, signal.SIGTERM)
            with grpc.insecure_channel(address) as channel:
                check = health_pb2.HealthCheckRequest()
                health = health_pb2_grpc.HealthStub(channel)
                until(lambda: health.Check(check).status == HEALTH.NOT_SERVING, "SIGTERM was not heard")
            ones = torch.ones(1, 4, 8)
            client.store.write(span, 0, 0, ones, ones, sequence=SequenceId("a"), epoch=Epoch(1))
            assert process.poll() is None
            client.store.drop([span], sequence=SequenceId("a"), epoch=Epoch(1))
            assert process.wait(DEADLINE_S) == 0
        process.stdin.close()
