"""A shard or its connection fails: the engine gets a TransportError, and the step can run again."""

import gc
import os
import signal
import subprocess
import sys
import threading

import grpc
import pytest

from farshore.attention_offload.shard import server
from farshore.attention_offload.shard.service import AttentionService
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import DeadlineExceeded, Late, Overloaded, TransportError
from farshore.ids import SequenceId

from ...waiting import until

DEADLINE_S = 60.0


def cancelled(context):
    context.cancel()


def late(context):
    context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "late")


@pytest.mark.parametrize("transport", [Transport.GRPC])
@pytest.mark.parametrize("breaking", [cancelled, late])
def test_a_broken_stream_is_a_transport_error_and_the_step_can_run_again(
    start_shard, connect, breaking_service, breaking, work
):
    shard = start_shard(service=breaking_service)
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    shard.service.do[work.layers + 2] = breaking
    client.begin(step)
    client.wait(client.send(0, 0, work.query()))
    sent = client.send(1, 0, work.query())
    with pytest.raises(TransportError):
        client.wait(sent)
    with pytest.raises(TransportError, match="begin the step again"):
        client.wait(sent)
    with pytest.raises(TransportError, match="begin the step again"):
        client.send(1, 0, work.query())
    assert work.run(client, step) == expected


@pytest.mark.parametrize("transport", [Transport.GRPC])
def test_streams_of_many_engines_leave_room_for_cold_calls(start_shard, connect, work, monkeypatch):
    monkeypatch.setattr(server, "MAX_CALLS", 2)
    address = start_shard().address
    clients = [connect(address) for _ in range(2)]
    step = work.step([work.sealed_span(clients[0].store, "a", 0, 20)])
    expected = work.run(clients[0], step)
    with pytest.raises(Overloaded, match="1 streams are open"):
        work.run(clients[1], step)
    assert clients[1].identify().free_bytes
    clients[0].break_off()

    def has_room():
        try:
            assert work.run(clients[1], step) == expected
        except Overloaded:  # The shard has not noticed yet that the other stream is gone.
            clients[1].break_off()
            return False
        return True

    until(has_room, "the shard does not notice that the other stream is gone")


def test_a_late_cold_call_is_a_transport_error(start_shard, connect):
    class Late(AttentionService):
        def identity(self):
            raise DeadlineExceeded("late")

    client = connect(start_shard(service=Late).address)
    with pytest.raises(TransportError, match="late"):
        client.identify()


def test_a_client_works_again_when_the_server_is_back_on_its_port(shard, connect, work):
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    client.begin(step)
    client.wait(client.send(0, 0, work.query()))
    shard.restart()
    with pytest.raises(TransportError, match=shard.address):
        client.wait(client.send(1, 0, work.query()))
    assert work.run(client, step) == expected
    assert client.store.announce() == shard.store.announce()


def test_every_call_to_a_stopped_server_is_a_transport_error(shard, connect, work):
    client = connect(shard.address)
    read = work.sealed_span(client.store, "a", 0, 20)
    shard.stop()
    calls = [
        lambda: work.run(client, work.step([read])),
        client.identify,
        client.store.announce,
        lambda: client.store.read(read.span, 0, 0, 20, sequence=read.holder),
        lambda: client.store.write(read.span, 0, 20, *work.tokens(1), sequence=read.holder, epoch=work.owner),
        lambda: client.store.seal(read.span, 20, sequence=read.holder, epoch=work.owner),
        lambda: client.store.drop_sequence(SequenceId("a"), epoch=work.owner),
    ]
    for call in calls:
        with pytest.raises(TransportError) as caught:
            call()
        assert caught.value.retryable and isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize("transport", [Transport.GRPC])
def test_closing_a_client_with_an_open_stream_leaves_no_thread_blocked(
    start_shard, connect, breaking_service, work
):
    shard = start_shard(service=breaking_service)
    before = set(threading.enumerate())
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    work.run(client, step)
    client.begin(step)
    client.send(0, 0, work.query())
    client.close()
    assert shard.service.stream_ended.wait(DEADLINE_S), "the server still serves the stream"
    gc.collect()  # gRPC's asyncio thread ends with the last call.
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(shard.service_name):  # The server's idle threads stay.
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), thread.name


SHARD_PROCESS = """
from farshore.attention_offload.shard.server import serve
from farshore.attention_offload.shard.service import AttentionService
from farshore.ids import WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore

worker = WorkerId("shard")
server, address = serve(
    AttentionService(worker, LocalStore(worker=worker, arena=Arena(1 << 20))), "127.0.0.1:0"
)
print(address, flush=True)
server.wait_for_termination()
"""


@pytest.fixture
def shard_process():
    """(process, address) of a shard that can be frozen and killed."""
    command = [sys.executable, "-P", "-c", SHARD_PROCESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def freeze(process):
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def test_a_frozen_shard_is_a_transport_error_at_the_deadline(shard_process, connect, work):
    process, address = shard_process
    client, patient = connect(address), connect(address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(patient, step)
    client.connect()
    client.begin(step)
    freeze(process)
    sent = client.send(0, 0, work.query())
    with pytest.raises(Late, match="no answer in time"):
        client.wait(sent, deadline_s=0.5)
    process.send_signal(signal.SIGCONT)
    assert work.run(patient, step) == expected


def test_a_shard_killed_in_the_middle_of_a_step_is_a_transport_error(shard_process, connect, work):
    process, address = shard_process
    client = connect(address)
    client.connect()
    client.begin(work.step([work.sealed_span(client.store, "a", 0, 20)]))
    client.wait(client.send(0, 0, work.query()))
    freeze(process)
    sent = client.send(1, 0, work.query())
    process.kill()
    with pytest.raises(TransportError):
        client.wait(sent)
    with pytest.raises(TransportError):
        client.identify()
