"""Tests of NativeFanout: answers go to their rows and heads, failed shards are named, and the others are
still sent their frames and waited for."""

import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farshore.attention_offload.fanout.native_fanout import NativeFanout, NativeRequest
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
"""For each shard, the rows (of three) and the heads (of six) that it sees."""


class Rig:
    """A NativeFanout to two shards. The test plays the shards, at the other ends of socket pairs."""

    def __init__(self, work):
        self.work = work
        pairs = [socket.socketpair() for _ in SEEN]
        self.connections = [
            NativeConnection(near, Transport.TCP, f"shard-{i}", work.model, work.dtype)
            for i, (near, _) in enumerate(pairs)
        ]
        self.far = [far for _, far in pairs]
        for connection in self.connections:
            connection.begin(work.step([], positions=(100,) * ROWS), DEADLINE_S)
        for far in self.far:
            self._frame(far)
        self.states = [State.identity(ROWS, 6, work.spec.v_dim, device="cpu") for _ in SEEN]
        self.requests = [
            NativeRequest(connection, *seen, state)
            for connection, seen, state in zip(self.connections, SEEN, self.states, strict=True)
        ]
        self.native_fanout = NativeFanout(self.requests, work.spec, work.dtype)

    def wait(self, *, layer=0, deadlines_s=(DEADLINE_S, DEADLINE_S), passed_s=0.0):
        return self.native_fanout.wait(1, layer, 0, deadlines_s, passed_s)

    def close(self):
        for connection, far in zip(self.connections, self.far, strict=True):
            connection.close()
            far.close()

    def _frame(self, far):
        _, _, _, _, count = header = HEADER.unpack(far.recv(12, socket.MSG_WAITALL))
        return header, far.recv(count, socket.MSG_WAITALL) if count else b""

    def received(self, shard):
        """(step, layer, micro-batch) and q of the next frame that the shard receives."""
        header, payload = self._frame(self.far[shard])
        rows, heads = SEEN[shard]
        q = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        return header[:3], q.view(len(rows), heads.stop - heads.start, self.work.spec.k_dim)

    def answer(self, shard, value, *, layer=0):
        """Answers a frame; every element of lse and o is ``value``."""
        rows, heads = SEEN[shard]
        numbers = len(rows) * (heads.stop - heads.start) * (1 + self.work.spec.v_dim)
        payload = torch.full((numbers,), float(value)).numpy().tobytes()
        self.far[shard].sendall(HEADER.pack(1, layer, 0, LAYER, len(payload)) + payload)

    def fail(self, shard, code):
        message = pb.Failure(code=code, message="gone").SerializeToString()
        self.far[shard].sendall(HEADER.pack(0, 0, 0, FAILURE, len(message)) + message)


@pytest.fixture
def rig(work):
    rig = Rig(work)
    yield rig
    rig.close()


def expected_state(shard, value, work):
    """The state after the shard has answered ``value``."""
    rows, heads = SEEN[shard]
    state = State.identity(ROWS, 6, work.spec.v_dim, device="cpu")
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
        for shard, found in enumerate(rig.states):
            assert_same(found, expected_state(shard, 10 * layer + shard, work))
    waited_s, measured = rig.native_fanout.times()
    assert waited_s > 0 and [answers for answers, _ in measured] == [3, 3]
    assert all(0 < seconds < 60 for _, times in measured for seconds in times)
    assert rig.native_fanout.times() == (0, [(0, []), (0, [])])


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["closed", "garbage", "no message", "refused"])
def test_a_shard_that_fails_is_named_and_the_other_is_waited_for(rig, work, lost, how):
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
    ((index, error),) = rig.wait().items()
    assert index == lost
    assert isinstance(error, NotFound if how == "refused" else TransportError)
    assert not isinstance(error, Late)
    assert ("gone" if how == "refused" else f"shard-{lost}") in str(error)
    assert_same(rig.states[other], expected_state(other, 3, work))
    assert_same(rig.states[lost], State.identity(ROWS, 6, work.spec.v_dim, device="cpu"))
    assert rig.connections[other].under_way == 0


def test_two_shards_that_fail_are_both_named(rig, work):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    rig.far[0].close()
    rig.fail(1, 5)
    found = rig.wait()
    assert found.keys() == {0, 1}
    assert isinstance(found[0], TransportError) and isinstance(found[1], NotFound)


def test_after_a_failed_send_the_other_shard_is_still_sent_its_frame(rig, work):
    for _ in range(native().MAX_UNDER_WAY):
        rig.connections[0].send(Sent(1, 0, 0, 2, 6), work.query(rows=2))
    found = rig.native_fanout.send(1, 1, 0, work.query(rows=ROWS))
    assert found.keys() == {0}
    assert isinstance(found[0], InvalidRequest) and "16 frames" in str(found[0])
    frame, _ = rig.received(1)
    assert frame == (1, 1, 0)


def test_a_fanout_to_the_remaining_shards_waits_for_frames_sent_by_the_first(rig, work):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    rig.far[0].close()
    others = NativeFanout([rig.requests[1]], work.spec, work.dtype)
    rig.answer(1, 4)
    assert others.wait(1, 0, 0, (DEADLINE_S,), 0.0) == {}
    assert_same(rig.states[1], expected_state(1, 4, work))
    ((frames, times_s),) = others.times()[1]
    assert (frames, times_s) == (1, []), "another NativeFanout sent the frame, so its latency is unknown"


@pytest.mark.parametrize("deadlines_s", [(0.05, 0.05), (0.01, 0.05), (0.05, 0.01)])
def test_all_late_shards_are_named(rig, work, deadlines_s):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    found = rig.wait(deadlines_s=deadlines_s)
    assert found.keys() == {0, 1}
    for index, error in found.items():
        assert isinstance(error, Late) and f"shard-{index}" in str(error)


def test_an_answer_that_is_there_is_taken_after_the_deadline(rig, work):
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    rig.answer(1, 4)
    found = rig.wait(deadlines_s=(1.0, 1.0), passed_s=2.0)
    assert found.keys() == {0} and isinstance(found[0], Late)
    assert_same(rig.states[1], expected_state(1, 4, work))


def test_each_shard_is_late_by_its_own_deadline(rig, work):
    """A shard with a short deadline is late without ending the wait for the other shard."""
    rig.native_fanout.send(1, 0, 0, work.query(rows=ROWS))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(rig.wait, deadlines_s=(0.01, DEADLINE_S))
        rig.answer(1, 4)
        found = waiting.result()
    assert found.keys() == {0} and isinstance(found[0], Late)
    assert_same(rig.states[1], expected_state(1, 4, work))


def test_queries_of_another_dtype_than_a_connection_was_opened_for_are_refused(rig, work):
    with pytest.raises(InvalidRequest, match="bfloat16"):
        NativeFanout(rig.requests[:1], work.spec, torch.bfloat16)
