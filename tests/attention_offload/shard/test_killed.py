"""kill -9 of either end, in real processes: the other end notices at once, and no resource is left behind."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from farshore.attention_offload.transport.frames import REMOTE, Transport, native
from farshore.errors import NotFound, TransportError
from farshore.ids import SequenceId

from ...waiting import until

pytestmark = pytest.mark.skipif(
    native() is None or not sys.platform.startswith("linux"), reason="needs the native module, and /proc"
)

DEADLINE_S = 60.0
FRAME_DEADLINE_S = 600.0
"""Longer than a test may take: a killed shard is noticed before any deadline."""

NATIVE = [Transport.SHARED_MEMORY, Transport.TCP]
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
client = RemoteClient(
    address, AttentionModel((spec,), (0,), (layout,)), torch.float32, transports=(Transport(transport),)
)
key = SpanKey(sequence=SequenceId("dies"), layer_class=0, first=0, group0=0, group1=1)
span = client.store.create(key, capacity_tokens=4, layout=layout, epoch=Epoch(1))
ones = torch.ones(1, 4, 8)
client.store.write(span, 0, 0, ones, ones, sequence=SequenceId("dies"), epoch=Epoch(1))
client.store.seal(span, 4, sequence=SequenceId("dies"), epoch=Epoch(1))
read = Read(span, 0, 0, 4, 0, 1, range(1), SequenceId("dies"))
client.connect()
client.begin(ShardStep(1, (0,), (9,), 0, 1, ((read,),), (range(1),)))
client.wait(client.send(0, 0, torch.ones(1, 2, 8)))
client.send(0, 0, torch.ones(1, 2, 8))
print("in the middle of a step", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(*arguments):
    """(process, its first line). Kills the process at the end."""
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


def resources(process_id):
    """Counts a process's resources for connections: sockets, shared memory, threads."""
    proc = Path("/proc", str(process_id))
    links, threads = [], []
    for descriptor in (proc / "fd").iterdir():
        with suppress(FileNotFoundError):  # The descriptor that reads this folder, in this process.
            links.append(os.readlink(descriptor))
    for thread in (proc / "task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # The thread has just ended.
            threads.append((thread / "comm").read_text().strip())
    return {
        "sockets": sum(link.startswith("socket:") for link in links),
        "memfds": sum("memfd:farshore" in link for link in links),
        "mapped": (proc / "maps").read_text().count("memfd:farshore"),
        "frame threads": threads.count("frames"),
    }


def files_left():
    """Files of Farshore in shared memory and in the folder for temporary files."""
    return {file for folder in ("/dev/shm", "/tmp") for file in Path(folder).glob("*farshore*")}


def answers(client):
    """Whether the shard answers. gRPC may reconnect up to two seconds late."""
    try:
        return bool(client.identify())
    except TransportError:
        return False


def test_killed_engines_leave_nothing_at_the_shard(reach, work):
    with shard_process() as (shard, address):
        clients = [reach(address, transports=(transport,)) for transport in NATIVE]
        step = work.step([work.sealed_span(clients[0].store, "a", 0, 20)])
        expected = work.run(clients[0], step)
        assert work.run(clients[1], step) == expected
        before, files = resources(shard.pid), files_left()
        for transport in NATIVE:
            with running("-c", ENGINE, address, str(transport)) as (engine, line):
                assert line == "in the middle of a step"
                during = resources(shard.pid)
                assert during["sockets"] >= before["sockets"] + 2, "hot frames, and bulk KV"
                assert during["mapped"] == before["mapped"] + (transport is Transport.SHARED_MEMORY)
                assert during["memfds"] == resources(engine.pid)["memfds"] == 0, "mapped, and no more"
                clients[0].store.beat(None)  # Starting an engine may take half of a lease.
                engine.kill()
                engine.wait(DEADLINE_S)
            until(lambda: resources(shard.pid) == before)
            clients[0].store.beat(None)
        assert files_left() == files
        assert all(work.run(client, step) == expected for client in clients)
        # The killed engine's holds stay until its lease expires or its sequence is dropped.
        free = clients[0].identify().free_bytes
        clients[0].store.drop_sequence(SequenceId("dies"), epoch=work.owner)
        assert clients[0].identify().free_bytes > free


def test_a_killed_shard_is_noticed_at_once_and_found_again(reach, work):
    before = resources(os.getpid())
    with shard_process() as (shard, address):
        clients = {transport: reach(address, transports=(transport,)) for transport in REMOTE}
        read = {name: work.sealed_span(client.store, name, 0, 20) for name, client in clients.items()}
        expected = {name: work.run(client, work.step([read[name]])) for name, client in clients.items()}
        for name, client in clients.items():
            client.begin(work.step([read[name]]))
        shard.kill()
        shard.wait(DEADLINE_S)
        for name, client in clients.items():
            with pytest.raises(TransportError, match=address) as caught:
                client.wait(client.send(0, 0, work.query()), deadline_s=FRAME_DEADLINE_S)
            assert caught.value.retryable
            with pytest.raises(TransportError, match=address):
                client.store.read(read[name].span, 0, 0, 20, sequence=read[name].holder)
            assert client.transport is None
        now = resources(os.getpid())
        assert now["mapped"] == before["mapped"] and now["memfds"] == before["memfds"]
    with shard_process(address):
        for name, client in clients.items():
            until(lambda: answers(client))  # noqa: B023
            with pytest.raises(NotFound):
                work.run(client, work.step([read[name]]))
            client.store.drop_sequence(SequenceId(name), epoch=work.owner)
            new = work.sealed_span(client.store, name, 0, 20)
            assert new.span not in {old.span for old in read.values()}, "another incarnation, the same name"
            assert work.run(client, work.step([new])) == expected[name]
            assert client.transport is name


def test_bulk_that_stalls_has_a_deadline(reach, work):
    """The shard is frozen during a transfer. After its thaw the client connects again."""
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
