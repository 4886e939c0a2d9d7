"""One call for several shards: states where they belong, who failed, and all others sent to and waited
for."""

import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farshore.attention_offload.fanout.native_fanout import NativeFanout, Part
from farshore.attention_offload.transport.frames import Sent, Transport, native
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.errors import InvalidRequest, Late, NotFound, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

HEADER = struct.Struct("<IHBBI")
LAYER, FAILURE = 0, 2
ROWS = 3
DEADLINE_S = 60.0
SEEN = (((0, 2), slice(0, 6)), ((1,), slice(2, 6)))
"""By shard: rows of three, and heads of six."""


class Rig:
    """Two shards that answer what a test says, over the two ends of sockets."""

    def __init__(self, work):
        self.work = work
        pairs = [socket.socketpair() for _ in SEEN]
        self.streams = [
            NativeConnection(near, Transport.TCP, f"shard-{i}", work.model, work.dtype)
            for i, (near, _) in enumerate(pairs)
        ]
        self.far = [far for _, far in pairs]
        for stream in self.streams:
            stream.begin(work.step([], positions=(100,) * ROWS), DEADLINE_S)
        for far in self.far:
            self._frame(far)
        self.wholes = [State.identity(ROWS, 6, work.spec.v_dim) for _ in SEEN]
        parts = [Part(s, *seen, w) for s, seen, w in zip(self.streams, SEEN, self.wholes, strict=True)]
        self.native_fanout = NativeFanout(parts, work.spec, work.dtype)

    def wait(self, *, layer=0, deadlines_s=(DEADLINE_S, DEADLINE_S), passed_s=0.0):
        return self.native_fanout.wait(1, layer, 0, deadlines_s, passed_s)

    def close(self):
        for stream, far in zip(self.streams, self.far, strict=True):
            stream.close()
            far.close()

    def _frame(self, far):
        _, _, _, _, count = header = HEADER.unpack(far.recv(12, socket.MSG_WAITALL))
        return header, far.recv(count, socket.MSG_WAITALL) if count else b""

    def received(self, shard):
        """(step, layer, micro-batch) and q."""
        header, payload = self._frame(self.far[shard])
        rows, heads = SEEN[shard]
        q = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        return header[:3], q.view(len(rows), heads.stop - heads.start, self.work.spec.k_dim)

    def answer(self, shard, value, *, layer=0):
        """Everything ``value``, lse and o."""
        rows, heads = SEEN[shard]
        numbers = len(rows) * (heads.stop - heads.start) * (1 + self.work.spec.v_dim)
        payload = torch.full((numbers,), float(value)).numpy().tobytes()
        self.far[shard].sendall(HEADER.pack(1, layer, 0, LAYER, len(payload)) + payload)

    def fail(self, shard, code):
        message = pb.Failure(code=code, message="gone").SerializeToString()
        self.far[shard].sendall(HEADER.pack(0, 0, 0, FAILURE, len(message)) + message)


@pytest.fixture
def rig(work):
    it = Rig(work)
    yield it
    it.close()


def whole(shard, value, work):
    """The state that a shard's answer of ``value`` makes."""
    rows, heads = SEEN[shard]
    state = State.identity(ROWS, 6, work.spec.v_dim)
    for row in rows:
        state.o[row, heads] = state.lse[row, heads] = float(value)
    return state


def assert_same(found, expected):
    assert torch.equal(found.o, expected.o) and torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_shard_gets_what_it_sees_and_answers_where_that_belongs(rig, work, order):
    for layer in range(3):
        q = work.query(rows=ROWS, seed=layer)
        assert rig.native_fanout.send(1, layer, 0, q) == {}
        for shard, (rows, heads) in enumerate(SEEN):
            frame, seen = rig.received(shard)
            assert frame == (1, layer, 0) and torch.equal(seen, q[list(rows), heads])
        for shard in order:
            rig.answer(shard, 10 * layer + shard, layer=layer)
        assert rig.wait(layer=layer) == {}
        for shard, found in enumerate(rig.wholes):
            assert_same(found, whole(shard, 10 * layer + shard, work))
    waited_s, parts = rig.native_fanout.times()
    assert waited_s > 0 and [answers for answers, _ in parts] == [3, 3]
    assert all(0 < seconds < 60 for _, times in parts for seconds in times)
    assert rig.native_fanout.times() == (0, [(0, []), (0, [])])


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["closed", "garbage", "no message", "refused"])
def test_one_that_fails_is_named_and_the_other_is_waited_for(rig, work, lost, how):
    other = 1 - lost
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    if how == "closed":
        rig.far[lost].close()
    elif how == "garbage":
        rig.answer(lost, 5, layer=1)
    elif how == "no message":
        rig.far[lost].sendall(HEADER.pack(0, 0, 0, FAILURE, 2) + b"\xff\xff")
    else:
        rig.fail(lost, 5)
    rig.answer(other, 3)
    (found,) = rig.wait().items()
    assert found[0] == lost
    assert isinstance(found[1], NotFound if how == "refused" else TransportError)
    assert not isinstance(found[1], Late)
    assert ("gone" if how == "refused" else f"shard-{lost}") in str(found[1])
    assert_same(rig.wholes[other], whole(other, 3, work))
    assert_same(rig.wholes[lost], State.identity(ROWS, 6, work.spec.v_dim))
    assert rig.streams[other].under_way == 0


def test_both_that_fail_are_named(rig, work):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    rig.far[0].close()
    rig.fail(1, 5)
    found = rig.wait()
    assert found.keys() == {0, 1}
    assert isinstance(found[0], TransportError) and isinstance(found[1], NotFound)


def test_a_send_that_fails_keeps_no_other_from_being_sent(rig, work):
    for _ in range(native().MAX_UNDER_WAY):
        rig.streams[0].send(Sent(1, 0, 0, 2, 6), work.query(rows=2))
    found = rig.native_fanout.send(1, 1, 0, work.query(rows=ROWS))
    assert found.keys() == {0}
    assert isinstance(found[0], InvalidRequest) and "16 frames" in str(found[0])
    frame, _ = rig.received(1)
    assert frame == (1, 1, 0)


def test_the_others_exchange_waits_for_what_was_sent_before(rig, work):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    rig.far[0].close()
    part = Part(rig.streams[1], *SEEN[1], rig.wholes[1])
    others = NativeFanout([part], work.spec, work.dtype)
    rig.answer(1, 4)
    assert others.wait(1, 0, 0, (DEADLINE_S,), 0.0) == {}
    assert_same(rig.wholes[1], whole(1, 4, work))
    ((frames, times_s),) = others.times()[1]
    assert (frames, times_s) == (1, []), "sent by another exchange: it is not known when"


@pytest.mark.parametrize("deadlines_s", [(0.05, 0.05), (0.01, 0.05), (0.05, 0.01)])
def test_all_that_are_late_are_named(rig, work, deadlines_s):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    found = rig.wait(deadlines_s=deadlines_s)
    assert found.keys() == {0, 1}
    for index, error in found.items():
        assert isinstance(error, Late) and f"shard-{index}" in str(error)


def test_a_deadline_that_is_over_takes_what_is_there(rig, work):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    rig.answer(1, 4)
    found = rig.wait(deadlines_s=(1.0, 1.0), passed_s=2.0)
    assert found.keys() == {0} and isinstance(found[0], Late)
    assert_same(rig.wholes[1], whole(1, 4, work))


def test_each_is_late_by_its_own_deadline(rig, work):
    """One that is soon late delays no answer of another, which may take longer."""
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(rig.wait, deadlines_s=(0.01, DEADLINE_S))
        rig.answer(1, 4)
        found = waiting.result()
    assert found.keys() == {0} and isinstance(found[0], Late)
    assert_same(rig.wholes[1], whole(1, 4, work))


def test_queries_of_another_dtype_than_a_connection_was_opened_for_are_refused(rig, work):
    part = Part(rig.streams[0], *SEEN[0], rig.wholes[0])
    with pytest.raises(InvalidRequest, match="bfloat16"):
        NativeFanout([part], work.spec, torch.bfloat16)
