"""A live shard service for the tests of its checks: sends valid and altered messages over any transport."""

import ctypes
import resource
import socket
import struct
from itertools import count

import grpc
import pytest

from farshore import rpc
from farshore.attention_offload import codec
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.transport.connect import Dialler
from farshore.attention_offload.transport.frames import REMOTE, Transport, frame_bytes, native
from farshore.errors import Corrupt, Fenced, Full, Internal, InvalidRequest, NotFound, TransportError
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc

DEADLINE_S = 60.0
MOST_GROWTH_BYTES = 768 << 20
"""The limit for the process's memory over all examples of a test: one step's limits, and what the allocator
keeps."""

HEADER = struct.Struct("<IHBBI")
LAYER, BEGIN, FAILURE, _, _ = range(5)
REFUSALS = (InvalidRequest, NotFound, Full, Fenced, Corrupt)


class Live:
    """A live shard with one sealed span, and calls that send it any message."""

    def __init__(self, shard, work):
        self.shard, self.work = shard, work
        self.channel = grpc.insecure_channel(shard.address, options=rpc.OPTIONS)
        self.stub = pb_grpc.AttentionStub(self.channel)
        self.names = count()
        self.read = work.sealed_span(shard.store, "a", 0, 20)
        self.step = work.step([self.read])
        self.expected = work.run(self.local(), self.step)

    def local(self, model=None):
        return InProcessClient(self.shard.worker, self.shard.store, model or self.work.model)

    def call(self, method, request):
        """The reply, or the error that the call failed with."""
        try:
            return getattr(self.stub, method)(request, timeout=DEADLINE_S)
        except grpc.RpcError as failure:
            return rpc.error_of(failure, peer="shard")

    def open(self):
        return codec.model_to_pb(self.work.model, self.work.dtype)

    def valid_requests(self):
        """A valid request of each cold call, about new sequences: a fenced sequence stays fenced."""
        caller = pb.Caller(engine=f"engine {next(self.names)}", sent_ns=1)
        name, other = f"s{next(self.names)}", f"o{next(self.names)}"
        key, layout = codec.key_to_pb(self.work.key(name)), codec.layout_to_pb(self.work.layout)
        span, owner = self.work.sealed_span(self.shard.store, name, 0, 20).span, self.work.owner
        block = pb.PrefixBlock(hash=bytes(32), first=0, tokens=range(16))
        return {
            "Create": pb.CreateRequest(
                key=key, capacity_tokens=20, layout=layout, epoch=owner, caller=caller
            ),
            "Seal": pb.SealRequest(span_id=span, tokens=20, epoch=owner, blocks=[block], sequence_id=name),
            "FindPrefix": pb.FindPrefixRequest(hashes=[block.hash], caller=caller),
            "HoldPrefix": pb.HoldPrefixRequest(blocks=[block], sequence_id=name, epoch=owner, caller=caller),
            "Hold": pb.HoldRequest(span_ids=[span], sequence_id=other, epoch=owner, caller=caller),
            "Drop": pb.HoldRequest(span_ids=[span], sequence_id=other, epoch=owner, caller=caller),
            "DropSequence": pb.SequenceRequest(sequence_id=other, epoch=owner, caller=caller),
            "Fence": pb.SequenceRequest(sequence_id=other, epoch=owner),
            "Connect": pb.ConnectRequest(open=self.open(), cores=[0], threads=1),
            "Beat": pb.BeatRequest(
                caller=caller,
                wanted=[pb.WantedSpans(sequence_id=other, epoch=owner, span_ids=[span])],
                complete=True,
            ),
        }

    def attend(self, transport, opening, begin, frame):
        """The first answer's bytes (lse, then o); or the error; or None if there is no answer to compare."""
        if transport is Transport.GRPC:
            frames = [pb.Frame(open=opening), pb.Frame(begin=begin), pb.Frame(layer=frame)]
            try:
                state = next(self.stub.Attend(iter(frames), timeout=DEADLINE_S))
            except grpc.RpcError as failure:
                return rpc.error_of(failure, peer="shard")
            return state.lse + state.o
        dialler = Dialler(self.stub, self.shard.address, [transport], token=None, purpose="frames go")
        try:
            connected = dialler.connect(opening, deadline_s=DEADLINE_S)
        except TransportError as error:
            # The shard offers no native connection for a model that the native loop cannot serve.
            assert "offers none" in str(error) or not isinstance(error.__cause__, grpc.RpcError)
            return None
        except REFUSALS as error:
            return error
        with connected.connection as connection:
            if transport is Transport.TCP:
                return self._over_tcp(connection, begin, frame)
            return self._over_shared_memory(connection, begin, frame)

    def _over_tcp(self, connection, begin, frame):
        connection.settimeout(DEADLINE_S)
        step = begin.SerializeToString()
        data = HEADER.pack(begin.step, 0, 0, BEGIN, len(step)) + step
        layer, micro_batch = min(frame.layer, 2**16 - 1), min(frame.micro_batch, 255)
        data += HEADER.pack(frame.step, layer, micro_batch, LAYER, len(frame.q)) + frame.q
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The shard has refused the step already.
        answer = b""
        while received := connection.recv(1 << 16):
            answer += received
        kind, count = HEADER.unpack_from(answer)[3:]
        payload = answer[HEADER.size : HEADER.size + count]
        return codec.error_from_bytes(payload, peer="shard") if kind == FAILURE else payload

    def _over_shared_memory(self, connection, begin, frame):
        module = native()
        wire = module.shared_memory(connection.detach(), DEADLINE_S, 0)
        room = 1 << 20
        q, out = ctypes.create_string_buffer(frame.q, max(1, len(frame.q))), ctypes.create_string_buffer(room)
        address = ctypes.addressof
        layer, micro_batch = min(frame.layer, 2**16 - 1), min(frame.micro_batch, 255)
        spec = self.work.spec
        sizes = frame_bytes(spec, rows=1, heads=6, dtype=self.work.dtype)
        try:
            module.begin(wire, begin.step, begin.SerializeToString(), room, DEADLINE_S)
            module.send(wire, frame.step, layer, micro_batch, 1, (address(q), len(frame.q), len(frame.q)))
            failure = module.wait(
                wire, frame.step, layer, micro_batch, 1,
                (address(out), sizes.lse, sizes.lse), (address(out) + sizes.lse, sizes.o, sizes.o),
                DEADLINE_S,
            )  # fmt: skip
        except OSError as error:
            # The shard has computed an answer whose size differs from the one that this client expects.
            assert "due is" in str(error), error
            return None
        if failure is not None:
            return codec.error_from_bytes(failure, peer="shard")
        return out.raw[: sizes.lse + sizes.o]

    def check(self):
        """Asserts that the store is intact and that a valid step is answered correctly on every transport."""
        self.shard.store.check_integrity()
        assert self.work.run(self.local(), self.step) == self.expected
        frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(self.work.query(seed=0)))
        for transport in REMOTE:
            answer = self.attend(transport, self.open(), codec.step_to_pb(self.step), frame)
            lse, o = self.expected[1], self.expected[0]
            assert answer == bytes(flat(lse)) + bytes(flat(o))

    @staticmethod
    def refused_by_name(answer):
        """Whether ``answer`` is an error that names the caller's mistake, and is short."""
        return isinstance(answer, REFUSALS) and not isinstance(answer, Internal) and len(str(answer)) < 3_000


def flat(nested):
    for item in nested:
        if isinstance(item, list):
            yield from flat(item)
        else:
            yield item


@pytest.fixture
def live(start_shard, work):
    shard = Live(start_shard(memory_bytes=1 << 20), work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield shard
    shard.check()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown <= MOST_GROWTH_BYTES, f"{grown >> 20} MiB were taken"
    shard.channel.close()
