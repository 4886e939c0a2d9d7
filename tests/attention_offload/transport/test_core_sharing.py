"""An engine and a shard on one host detect that they share cores, and adapt their threads to that."""

import ctypes
import os
import platform
import struct
import subprocess
import sys
import threading

import pytest

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.transport import core_sharing
from farshore.attention_offload.transport.frames import Transport, native

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
SHORT_SLICE_NS = 100_000

pytestmark = [
    pytest.mark.skipif(native() is None, reason="needs the native module"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cores are asked of Linux"),
]


@pytest.mark.parametrize(
    ("local", "local_threads", "other", "threads", "expected"),
    [
        ({0, 1}, 2, {0, 1}, 2, True),
        ({0, 1}, 2, {1}, 1, True),
        ({0, 1}, 1, {0, 1}, 1, False),
        ({0, 1}, 2, {2, 3}, 9, False),
        (set(range(8)), 4, set(range(4, 16)), 12, False),
        (set(range(8)), 5, set(range(4, 16)), 12, True),
        ({0}, 1, set(), 0, False),
    ],
)
def test_oversubscription(monkeypatch, local, local_threads, other, threads, expected):
    monkeypatch.setattr(core_sharing, "usable_cores", lambda: sorted(local))
    monkeypatch.setattr(core_sharing.torch, "get_num_threads", lambda: local_threads)
    assert core_sharing.oversubscribed_with(other, threads) is expected


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.TCP])
@pytest.mark.parametrize("shared", [True, False])
def test_both_ends_are_told_and_the_states_are_the_same(
    start_shard, reach, work, monkeypatch, transport, shared
):
    monkeypatch.setattr("farshore.attention_offload.shard.service.oversubscribed_with", lambda *_: shared)
    shard = start_shard()
    client = reach(shard.address, transports=(transport,))
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    assert work.run(client, step) == work.run(InProcessClient(shard.worker, shard.store, work.model), step)
    assert client.native_connection.shares_cores is shared


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(core_sharing.usable_cores()) < 2, reason="one core"
)
def test_the_shard_moves_to_the_core_of_an_engine_that_shares_its_cores(
    start_shard, reach, work, monkeypatch
):
    """And follows the engine when it moves to another core."""
    monkeypatch.setattr("farshore.attention_offload.shard.service.oversubscribed_with", lambda *_: True)
    shard = start_shard()
    client = reach(shard.address, transports=(Transport.SHARED_MEMORY,))
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    (serving,) = [thread for thread in _new_threads(client.connect) if thread.name == "frames"]
    work.run(client, step)  # From here on the shard's thread knows the cores that it may use.
    before = os.sched_getaffinity(0)
    try:
        first, second = sorted(before)[:2]
        for core, other in ((first, second), (second, first), (first, second)):
            os.sched_setaffinity(0, {core})
            os.sched_setaffinity(serving.native_id, {other})
            for number in range(1, 9):
                work.run(client, work.step(step.reads[0], number=number))
            # The shard moves after two frames on another core.
            assert os.sched_getaffinity(serving.native_id) == {core}
    finally:
        os.sched_setaffinity(0, before)


def _new_threads(call):
    known = set(threading.enumerate())
    call()
    return set(threading.enumerate()) - known


LOWERS_PRIORITY = """
import os
import torch
from farshore.attention_offload.transport.core_sharing import lower_pool_priority
from farshore.kernels.base import AttentionSpec, State
from farshore.kernels.cpu.attention import extend

spec = AttentionSpec(4, 4, 4, 64, 64, 0.125)
x = torch.zeros(512, 4, 64)
out = State.identity(512, 4, 64, device="cpu")
call = dict(q_positions=torch.arange(512), k_position=0, threads=2, out=out)

def compute():
    extend(x, x.transpose(0, 1), x.transpose(0, 1), spec, **call)

def niceness():
    return sorted(os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task"))

compute()
before = niceness()
assert before.count(before[0]) == len(before), before
lower_pool_priority()
while before[0] < 19 and niceness() == before:
    compute()
assert niceness() == [*before[:-1], min(before[0] + 3, 19)], niceness()
assert os.getpriority(os.PRIO_PROCESS, 0) == before[0]
"""


def test_only_the_pools_threads_get_a_lower_priority():
    """In a separate process, because a priority cannot be raised again."""
    found = subprocess.run(
        [sys.executable, "-P", "-c", LOWERS_PRIORITY],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def scheduling():
    """(policy, nice value, time slice in ns) of this thread."""
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR, 0, attributes, 48, 0) == 0
    _, policy, _, nice, _, runtime_ns, _, _ = struct.unpack("=IIQiIQQQ", attributes.raw)
    return policy, nice, runtime_ns


@pytest.mark.skipif(SCHED_GETATTR is None, reason="the system call's number here is not known")
def test_threads_started_afterwards_have_short_time_slices_and_are_otherwise_unchanged():
    seen = []

    def child():
        seen.append(scheduling())

    def worker():
        seen.append(scheduling())
        core_sharing.share_cores()
        core_sharing.share_cores()
        seen.append(scheduling())
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    before, after, inherited = seen
    assert after[:2] == before[:2]
    assert inherited == after
    assert after[2] in (SHORT_SLICE_NS, before[2]), "a kernel before 6.12 knows no slices of a thread"
