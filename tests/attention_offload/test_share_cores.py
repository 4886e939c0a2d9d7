"""An attention worker's process beside an engine's: what it asks the kernel for."""

import ctypes
import platform
import struct
import threading

import pytest

from farshore.attention_offload.cores import share_cores
from farshore.attention_offload.frames import native

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
SHORT_NS = 100_000

pytestmark = [
    pytest.mark.skipif(native() is None, reason="needs the native module"),
    pytest.mark.skipif(SCHED_GETATTR is None, reason="the system call's number here is not known"),
]


def turns():
    """This thread's policy, nice value and slice, in ns."""
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR, 0, attributes, 48, 0) == 0
    _, policy, _, nice, _, runtime_ns, _, _ = struct.unpack("=IIQiIQQQ", attributes.raw)
    return policy, nice, runtime_ns


def test_threads_started_from_then_on_take_short_turns_and_are_otherwise_as_before():
    seen = []

    def child():
        seen.append(turns())

    def worker():
        seen.append(turns())
        share_cores()
        share_cores()
        seen.append(turns())
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    before, after, inherited = seen
    assert after[:2] == before[:2]
    assert inherited == after
    assert after[2] in (SHORT_NS, before[2]), "a kernel before 6.12 knows no slices of a thread"
