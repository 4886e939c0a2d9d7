"""kill -9 of either end, real processes: the other one notices at once and says so, and nothing is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from farshore.attention_offload.transport.frames import REMOTE, Transport, native
from farshore.errors import NotFound, TransportError
from farshore.ids import SequenceId

pytestmark = pytest.mark.skipif(
    native() is None or not sys.platform.startswith("linux"), reason="needs the native module, and /proc"
)

DEADLINE_S = 60.0
FRAME_DEADLINE_S = 600.0
"""Far beyond a test's: a killed shard is noticed without waiting for it."""

PAST_GRPC = [Transport.SHARED_MEMORY, Transport.TCP]
KV_BYTES = 1 << 20

ENGINE = """
import sys
import torch
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.transport.frames import Transport
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.attention_offload.client.remote import RemoteClient
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kernels.base import AttentionSpec, KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import SpanKey

address, transport = sys.argv[1:]
spec = AttentionSpec(q_heads=2, k_heads=1, v_heads=1, k_dim=8, v_dim=8, scale=1.0)
layout = KVLayout.of(spec, layers=1, format=KVFormat.FLOAT32)
peer = RemoteClient(
    address, AttentionModel((spec,), (0,), (layout,)), torch.float32, transports=(Transport(transport),)
)
key = SpanKey(sequence=SequenceId("dies"), layer_class=0, first=0, group0=0, group1=1)
span = peer.store.create(key, capacity_tokens=4, layout=layout, epoch=Epoch(1))
ones = torch.ones(1, 4, 8)
peer.store.write(span, 0, 0, ones, ones, sequence=SequenceId("dies"), epoch=Epoch(1))
peer.store.seal(span, 4, sequence=SequenceId("dies"), epoch=Epoch(1))
read = Read(span, 0, 0, 4, 0, 1, range(1), SequenceId("dies"))
peer.connect()
peer.begin(ShardStep(1, (0,), (9,), 0, 1, ((read,),), (range(1),)))
peer.wait(peer.send(0, 0, torch.ones(1, 2, 8)))
peer.send(0, 0, torch.ones(1, 2, 8))
print("in the middle of a step", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(*arguments):
    """(process, its first line), killed in the end."""
    command = [sys.executable, "-P", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def shard_process(listen="127.0.0.1:0"):
    options = ("--worker", "shard", "--kv-memory-bytes", str(KV_BYTES), "--listen", listen)
    with running("-m", "farshore.workers.attention", *options) as (process, address):
        yield process, address


def held(process_id):
    """What a process holds that a connection needs: sockets, memory shared with others, threads."""
    at = Path("/proc", str(process_id))
    links, threads = [], []
    for it in (at / "fd").iterdir():
        with suppress(FileNotFoundError):  # this very look, if it is this process
            links.append(os.readlink(it))
    for it in (at / "task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            threads.append((it / "comm").read_text().strip())
    return {
        "sockets": sum(it.startswith("socket:") for it in links),
        "memfds": sum("memfd:farshore" in it for it in links),
        "mapped": (at / "maps").read_text().count("memfd:farshore"),
        "frame threads": threads.count("frames"),
    }


def named():
    """Files that somebody could have forgotten."""
    return {it for folder in ("/dev/shm", "/tmp") for it in Path(folder).glob("*farshore*")}


def eventually(condition):
    pause, until = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "not within the deadline"
        pause.wait(0.01)


def answers(client):
    """gRPC itself looks again after up to two seconds."""
    try:
        return bool(client.identify())
    except TransportError:
        return False


def test_killed_engines_leave_nothing_at_the_shard(reach, work):
    with shard_process() as (shard, address):
        clients = [reach(address, transports=(it,)) for it in PAST_GRPC]
        step = work.step([work.sealed_span(clients[0].store, "a", 0, 20)])
        expected = work.run(clients[0], step)
        assert work.run(clients[1], step) == expected
        before, files = held(shard.pid), named()
        for transport in PAST_GRPC:
            with running("-c", ENGINE, address, str(transport)) as (engine, line):
                assert line == "in the middle of a step"
                there = held(shard.pid)
                assert there["sockets"] >= before["sockets"] + 2, "hot frames, and bulk KV"
                assert there["mapped"] == before["mapped"] + (transport is Transport.SHARED_MEMORY)
                assert there["memfds"] == held(engine.pid)["memfds"] == 0, "mapped, and no more"
                clients[0].store.beat(None)  # to start an engine may take half of a lease
                engine.kill()
                engine.wait(DEADLINE_S)
            eventually(lambda: held(shard.pid) == before)
            clients[0].store.beat(None)
        assert named() == files
        assert all(work.run(client, step) == expected for client in clients)
        # Its spans live until their sequence's next owner, or the controller, gives them back.
        free = clients[0].identify().free_bytes
        clients[0].store.drop_sequence(SequenceId("dies"), epoch=work.owner)
        assert clients[0].identify().free_bytes > free


def test_a_killed_shard_is_noticed_at_once_and_found_again(reach, work):
    before = held(os.getpid())
    with shard_process() as (shard, address):
        clients = {it: reach(address, transports=(it,)) for it in REMOTE}
        read = {it: work.sealed_span(client.store, it, 0, 20) for it, client in clients.items()}
        expected = {it: work.run(client, work.step([read[it]])) for it, client in clients.items()}
        for it, client in clients.items():
            client.begin(work.step([read[it]]))
        shard.kill()
        shard.wait(DEADLINE_S)
        for it, client in clients.items():
            with pytest.raises(TransportError, match=address) as caught:
                client.wait(client.send(0, 0, work.query()), deadline_s=FRAME_DEADLINE_S)
            assert caught.value.retryable
            with pytest.raises(TransportError, match=address):
                client.store.read(read[it].span, 0, 0, 20, sequence=read[it].holder)
            assert client.transport is None
        now = held(os.getpid())
        assert now["mapped"] == before["mapped"] and now["memfds"] == before["memfds"]
    with shard_process(address):
        for it, client in clients.items():
            eventually(lambda: answers(client))  # noqa: B023
            with pytest.raises(NotFound):
                work.run(client, work.step([read[it]]))
            client.store.drop_sequence(SequenceId(it), epoch=work.owner)
            again = work.step([work.sealed_span(client.store, it, 0, 20)])
            assert work.run(client, again) == expected[it]
            assert client.transport is it


def test_bulk_that_stalls_has_a_deadline(reach, work):
    """A shard frozen in the middle of a transfer; awake again, it is reconnected to."""
    with shard_process() as (shard, address):
        client = reach(address, transports=(Transport.TCP,), deadline_s=0.5)
        read = work.sealed_span(client.store, "a", 0, 20)
        expected = work.run(client, work.step([read]))
        shard.send_signal(signal.SIGSTOP)
        os.waitpid(shard.pid, os.WUNTRACED)
        with pytest.raises(TransportError, match=r"no progress of bulk KV within 0\.5 s"):
            client.store.read(read.span, 0, 0, 20, sequence=read.holder)
        shard.send_signal(signal.SIGCONT)
        assert work.run(client, work.step([read])) == expected
        assert client.store.read(read.span, 0, 0, 20, sequence=read.holder)[0].shape[1] == 20
