"""One call for several shards: states where they belong, and who failed, while the others are waited for."""

import socket
import struct

import pytest
import torch

from farshore.attention_offload.exchange import Exchange, Lost, Part
from farshore.attention_offload.frame_stream import FrameStream
from farshore.attention_offload.frames import Transport, native
from farshore.errors import InvalidRequest, NotFound, TransportError
from farshore.kernels.base import State
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

HEADER = struct.Struct("<IHBBI")
LAYER, FAILURE = 0, 2
ROWS = 3
SEEN = (((0, 2), slice(0, 6)), ((1,), slice(2, 6)))
"""By shard: rows of three, and heads of six."""


class Rig:
    """Two shards that answer what a test says, over the two ends of sockets."""

    def __init__(self, work, deadline_s=60.0):
        self.work = work
        options = {"frame_deadline_s": deadline_s}
        pairs = [socket.socketpair() for _ in SEEN]
        self.streams = [
            FrameStream(near, Transport.TCP, f"shard-{i}", work.model, work.dtype, **options)
            for i, (near, _) in enumerate(pairs)
        ]
        self.far = [far for _, far in pairs]
        for stream in self.streams:
            stream.begin(work.step([], positions=(100,) * ROWS))
        for far in self.far:
            self._frame(far)
        self.wholes = [State.identity(ROWS, 6, work.spec.v_dim) for _ in SEEN]
        parts = [Part(s, *seen, w) for s, seen, w in zip(self.streams, SEEN, self.wholes, strict=True)]
        self.exchange = Exchange(parts, work.spec, work.dtype)

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
        rig.exchange.send(1, layer, 0, q)
        for shard, (rows, heads) in enumerate(SEEN):
            frame, seen = rig.received(shard)
            assert frame == (1, layer, 0) and torch.equal(seen, q[list(rows), heads])
        for shard in order:
            rig.answer(shard, 10 * layer + shard, layer=layer)
        rig.exchange.wait()
        for shard, found in enumerate(rig.wholes):
            assert_same(found, whole(shard, 10 * layer + shard, work))
    waited_s, parts = rig.exchange.times()
    assert waited_s > 0 and [answers for answers, _ in parts] == [3, 3]
    assert all(0 < seconds < 60 for _, times in parts for seconds in times)
    assert rig.exchange.times() == (0, [(0, []), (0, [])])


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["closed", "garbage", "refused"])
def test_one_that_fails_is_named_and_the_other_is_waited_for(rig, work, lost, how):
    rig.exchange.send(1, 0, 0, work.query(rows=ROWS))
    if how == "closed":
        rig.far[lost].close()
    elif how == "garbage":
        rig.answer(lost, 5, layer=1)
    else:
        rig.fail(lost, 5)
    with pytest.raises(Lost) as failed:
        rig.exchange.wait()
    assert failed.value.index == lost
    assert isinstance(failed.value.error, NotFound if how == "refused" else TransportError)
    assert ("gone" if how == "refused" else f"shard-{lost}") in str(failed.value.error)
    other = 1 - lost
    owed = rig.exchange.owed()[other]
    rows, heads = SEEN[other]
    assert owed == (1, 0, 0, len(rows), heads.stop - heads.start)
    rig.answer(other, 3)
    out = State(torch.zeros(owed.rows, owed.heads, work.spec.v_dim), torch.zeros(owed.rows, owed.heads))
    rig.streams[other].wait(owed, out)
    assert (out.o == 3).all() and (out.lse == 3).all()
    assert_same(rig.wholes[lost], State.identity(ROWS, 6, work.spec.v_dim))


def test_what_had_come_before_another_failed_is_kept(rig, work):
    rig.exchange.send(1, 0, 0, work.query(rows=ROWS))
    rig.answer(0, 4)
    rig.far[1].close()
    with pytest.raises(Lost) as failed:
        rig.exchange.wait()
    assert failed.value.index == 1
    assert rig.exchange.owed()[0] is None
    assert_same(rig.wholes[0], whole(0, 4, work))


def test_nobody_is_waited_for_beyond_the_deadline(work):
    rig = Rig(work, deadline_s=0.05)
    try:
        rig.exchange.send(1, 0, 0, work.query(rows=ROWS))
        with pytest.raises(Lost) as failed:
            rig.exchange.wait()
        assert isinstance(failed.value.error, TransportError) and "0.05 s" in str(failed.value.error)
    finally:
        rig.close()


def test_more_frames_than_fit_are_refused_and_not_sent(rig, work):
    for _ in range(native().MAX_UNDER_WAY):
        rig.exchange.send(1, 0, 0, work.query(rows=ROWS))
    with pytest.raises(Lost) as failed:
        rig.exchange.send(1, 0, 0, work.query(rows=ROWS))
    assert isinstance(failed.value.error, InvalidRequest) and "16 frames" in str(failed.value.error)


def test_queries_of_another_dtype_than_a_connection_was_opened_for_are_refused(rig, work):
    part = Part(rig.streams[0], *SEEN[0], rig.wholes[0])
    with pytest.raises(InvalidRequest, match="bfloat16"):
        Exchange([part], work.spec, torch.bfloat16)
