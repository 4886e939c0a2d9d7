"""Hot frames over gRPC: frames are sent at once, a refusal keeps its reason, and nothing is left open."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from farshore import rpc
from farshore.attention_offload import codec
from farshore.attention_offload.client.remote import MAX_UNDER_WAY
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import InvalidRequest, Late, NotFound, TransportError
from farshore.ids import SpanId
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc
from farshore.rpc import SHARD_ENVIRONMENT

DEADLINE_S = 60.0


@pytest.fixture
def transport():
    return Transport.GRPC


class Counting(AttentionService):
    """A shard that sets ``answered`` after ``due`` answers, and ``ended`` when a stream has ended."""

    def __init__(self, worker, store):
        super().__init__(worker, store)
        self.due = 0
        self.answered = threading.Event()
        self.ended = threading.Event()

    def Attend(self, frames, context):
        try:
            for state in super().Attend(frames, context):
                yield state
                self.due -= 1
                if not self.due:
                    self.answered.set()
        finally:
            self.ended.set()


def test_frames_are_answered_before_the_engine_waits_for_them(start_shard, connect, work):
    shard = start_shard(service=Counting)
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    shard.service.due = work.layers
    client.begin(step)
    sent = [client.send(layer, 0, work.query(seed=layer)) for layer in range(work.layers)]
    assert shard.service.answered.wait(DEADLINE_S)
    assert work.raw_bytes([client.wait(frame) for frame in sent]) == expected


def test_a_refusal_ends_the_step_whatever_is_written_meanwhile_and_the_next_one_runs(
    start_shard, connect, work
):
    shard = start_shard(service=Counting)
    client = connect(shard.address)
    read = work.sealed_span(client.store, "a", 0, 20)
    work.run(client, work.step([read]))
    client.begin(work.step([read._replace(span=SpanId("shard/99"))], number=2))
    sent = client.send(0, 0, work.query())
    assert shard.service.ended.wait(DEADLINE_S)
    client.send(1, 0, work.query())
    with pytest.raises(NotFound, match="shard/99"):
        client.wait(sent)
    assert work.run(client, work.step([read]))


def test_a_refusal_that_meets_a_write_arrives_as_it_is(start_shard, connect, work):
    """Frames are written without a pause, so that the refusal may arrive during any of the writes."""
    shard = start_shard(service=Counting)
    client = connect(shard.address)
    read = work.sealed_span(client.store, "a", 0, 20)
    for frames in range(1, MAX_UNDER_WAY):
        for _ in range(4):
            work.run(client, work.step([read]))
            client.begin(work.step([read._replace(span=SpanId("shard/99"))], number=2))
            sent = [client.send(0, 0, work.query()) for _ in range(frames)]
            with pytest.raises(NotFound, match="shard/99"):
                client.wait(sent[0])


def test_a_frame_before_any_step_is_refused(shard, work):
    layer = pb.LayerFrame(step=1, layer=0, micro_batch=0, q=codec.to_bytes(work.query()))
    frames = [pb.Frame(open=codec.model_to_pb(work.model, work.dtype)), pb.Frame(layer=layer)]
    with grpc.insecure_channel(shard.address) as channel, pytest.raises(grpc.RpcError) as caught:
        next(pb_grpc.AttentionStub(channel).Attend(iter(frames), timeout=DEADLINE_S))
    assert isinstance(rpc.error_of(caught.value, peer="shard"), InvalidRequest)


def test_engines_of_two_threads_have_separate_event_loops(start_shard, connect, work):
    shards = [start_shard(worker=name) for name in "xy"]
    clients = [connect(shard.address) for shard in shards]
    steps = [work.step([work.sealed_span(client.store, "a", 0, 20)]) for client in clients]
    both = threading.Barrier(2)

    def engine(client, step):
        states = []
        for _ in range(20):
            both.wait(DEADLINE_S)
            states.append(work.run(client, step))
        client.close()
        return states

    with ThreadPoolExecutor(2) as threads:
        mine, theirs = threads.map(engine, clients, steps)
    assert mine == theirs and all(states == mine[0] for states in mine)


def test_a_stream_to_a_stopped_shard_is_a_transport_error(shard, connect):
    client = connect(shard.address)
    shard.stop()
    with pytest.raises(TransportError, match=shard.address):
        client.connect()
    assert client.transport is None


def test_a_stream_to_a_shard_that_freezes_before_it_opens_is_late(start_process, connect, work):
    """The stream opens with the first step and within its deadline; another thread may create it."""
    process = start_process()
    client = connect(process.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    with ThreadPoolExecutor(1) as thread:
        thread.submit(client.connect).result(DEADLINE_S)
    process.freeze()
    with pytest.raises(Late, match="no answer in time"):
        client.begin(step, deadline_s=0.3)
        client.wait(client.send(0, 0, work.query()), deadline_s=0.3)
    assert not client.ready
    with pytest.raises(TransportError, match=process.address):
        client.connect(deadline_s=0.3)
    process.process.send_signal(signal.SIGCONT)
    assert work.run(client, step)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_closed_streams_leave_no_socket_and_no_complaint(start_process, connect, work, caplog):
    client = connect(start_process().address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])

    def use():
        work.run(client, step)
        client.begin(step)
        client.send(0, 0, work.query())
        client.break_off()
        gc.collect()

    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    use()  # The thread's event loop stays open.
    before = open_files()
    for _ in range(5):
        use()
    # gRPC closes unused sockets some time later.
    pause, until = threading.Event(), time.monotonic() + DEADLINE_S
    while open_files() > before:
        assert time.monotonic() < until, "sockets are left behind"
        pause.wait(0.01)
    assert not [record for record in caplog.records if record.name == "asyncio"]


# -- the environment of an attention worker ----------------------------------------------------------------


@pytest.mark.parametrize(("more", "known"), [("", True), (",no_such_thing", False)])
def test_grpc_knows_what_a_worker_tells_it(more, known):
    """gRPC warns about unknown names: a release may drop those that a worker sets."""
    environment = os.environ | {name: value + more for name, value in SHARD_ENVIRONMENT.items()}
    command = [sys.executable, "-P", "-c", "import grpc"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0 and ("Unknown experiment" not in ran.stderr) is known, ran.stderr
