"""Messages that are well-formed and mean anything: refused by name, or answered right, by a live service.

Each example takes honest messages and puts extreme or inconsistent values into some of their fields. Nothing
may crash, hang or take memory that is not bounded, and the next honest engine is served."""

import ctypes
import math
import resource
import socket
import struct
from itertools import count

import grpc
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore import rpc
from farshore.attention_offload import codec
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.shard import checks as door
from farshore.attention_offload.transport.connect import Dialler
from farshore.attention_offload.transport.frames import REMOTE, Transport, frame_bytes, native
from farshore.errors import Corrupt, Fenced, Full, Internal, InvalidRequest, NotFound, TransportError
from farshore.ids import SpanId
from farshore.kvstore.store import forms
from farshore.proto import attention_pb2 as pb
from farshore.proto import attention_pb2_grpc as pb_grpc

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

DEADLINE_S = 60.0
MOST_GROWTH_BYTES = 768 << 20
"""Of the whole process, over all examples of a test: one step's bounds, and what the allocator keeps."""

HEADER = struct.Struct("<IHBBI")
LAYER, BEGIN, FAILURE, _, AGAIN = range(5)
REFUSALS = (InvalidRequest, NotFound, Full, Fenced, Corrupt)
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

F = FieldDescriptor
SMALL = [0, 1, 2, 3, 4, 5, 8, 16, 17, 19, 20, 21, 63, 64, 255, 256, 257]
EDGES_32 = [2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**16 + 1, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1]
EDGES_64 = [*EDGES_32, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = {
    F.TYPE_UINT32: st.sampled_from(SMALL + EDGES_32),
    F.TYPE_UINT64: st.sampled_from(SMALL + EDGES_64),
    F.TYPE_BOOL: st.booleans(),
    F.TYPE_DOUBLE: st.sampled_from(
        [0.0, -0.0, -1.0, 1e-300, 1e-45, 1e300, math.inf, -math.inf, math.nan, 2.0]
    ),
    F.TYPE_STRING: st.sampled_from(["", "b", "x" * 300, "float32", "float64", "float16", "int8", "int4"]),
    F.TYPE_BYTES: st.sampled_from([b"", b"\0", bytes(32), bytes(191), bytes(192), bytes(1 << 16)]),
}


def places(message):
    """(message, field, index or None) of all its scalars, at any depth."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.type == F.TYPE_MESSAGE:
            if field.is_repeated:
                for it in value:
                    yield from places(it)
            elif message.HasField(field.name):
                yield from places(value)
        elif field.is_repeated:
            yield from ((message, field, i) for i in range(len(value)))
        else:
            yield message, field, None


def lists(message):
    """(message, field) of all repeated fields, at any depth."""
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            yield message, field
        if field.type == F.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            for it in inner if field.is_repeated else [inner] if message.HasField(field.name) else []:
                yield from lists(it)


@st.composite
def mutations(draw):
    """What to do to a message: which of its scalars and lists, counted modulo how many it has, and how."""
    scalars = draw(st.lists(st.integers(0, 999), min_size=1, max_size=3))
    shapes = draw(
        st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["clear", "double", "64"])), max_size=1)
    )
    values = {kind: draw(st.lists(some, min_size=4, max_size=4)) for kind, some in VALUES.items()}
    return scalars, shapes, values


def mutate(message, mutation):
    scalars, shapes, values = mutation
    for at, how in shapes:
        found = list(lists(message))
        if not found:
            continue
        parent, field = found[at % len(found)]
        items = list(getattr(parent, field.name))
        kept = {"clear": [], "double": items * 2, "64": items * 64}[how]
        parent.ClearField(field.name)
        getattr(parent, field.name).extend(kept)
    for number, at in enumerate(scalars):
        found = list(places(message))
        if not found:
            continue
        parent, field, index = found[at % len(found)]
        value = values[field.type][number]
        if index is None:
            setattr(parent, field.name, value)
        else:
            getattr(parent, field.name)[index] = value
    return message


class Live:
    """A shard, an honest span in it, and ways to say anything to it."""

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
        """The reply, or the error that it stands for."""
        try:
            return getattr(self.stub, method)(request, timeout=DEADLINE_S)
        except grpc.RpcError as failure:
            return rpc.error_of(failure, client="shard")

    def open(self):
        return codec.model_to_pb(self.work.model, self.work.dtype)

    def attend(self, transport, opening, begin, frame):
        """The first answer's bytes (lse, then o), or the error."""
        if transport is Transport.GRPC:
            frames = [pb.Frame(open=opening), pb.Frame(begin=begin), pb.Frame(layer=frame)]
            try:
                state = next(self.stub.Attend(iter(frames), timeout=DEADLINE_S))
            except grpc.RpcError as failure:
                return rpc.error_of(failure, client="shard")
            return state.lse + state.o
        dialler = Dialler(self.stub, self.shard.address, [transport], purpose="frames go")
        try:
            connected = dialler.connect(opening, deadline_s=DEADLINE_S)
        except TransportError as error:
            # Not offered: what the session is of, a native loop can't serve.
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
            pass  # refused already
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        kind, count = HEADER.unpack_from(answer)[3:]
        payload = answer[HEADER.size : HEADER.size + count]
        return codec.error_from_bytes(payload, client="shard") if kind == FAILURE else payload

    def _over_shared_memory(self, connection, begin, frame):
        module = native()
        wire = module.shared_memory(connection.detach(), DEADLINE_S, 0)
        room = 1 << 20
        q, out = ctypes.create_string_buffer(frame.q, max(1, len(frame.q))), ctypes.create_string_buffer(room)
        at = ctypes.addressof
        layer, micro_batch = min(frame.layer, 2**16 - 1), min(frame.micro_batch, 255)
        spec = self.work.spec
        sizes = frame_bytes(spec, rows=1, heads=6, dtype=self.work.dtype)
        try:
            module.begin(wire, begin.step, begin.SerializeToString(), room, DEADLINE_S)
            module.send(wire, frame.step, layer, micro_batch, 1, at(q), len(frame.q), len(frame.q))
            failure = module.wait(
                wire, frame.step, layer, micro_batch, 1,
                at(out), sizes.lse, sizes.lse, at(out) + sizes.lse, sizes.o, sizes.o, DEADLINE_S,
            )  # fmt: skip
        except OSError as error:
            # An answer of another size than this client takes: it was computed, and no error.
            assert "due is" in str(error), error
            return None
        if failure is not None:
            return codec.error_from_bytes(failure, client="shard")
        return out.raw[: sizes.lse + sizes.o]

    def check(self):
        """Everything is as it was, and an honest engine is served."""
        self.shard.store.check_integrity()
        assert self.work.run(self.local(), self.step) == self.expected
        frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(self.work.query(seed=0)))
        for transport in REMOTE:
            answer = self.attend(transport, self.open(), codec.step_to_pb(self.step), frame)
            lse, o = self.expected[1], self.expected[0]
            assert answer == bytes(flat(lse)) + bytes(flat(o))


def flat(nested):
    for it in nested:
        if isinstance(it, list):
            yield from flat(it)
        else:
            yield it


@pytest.fixture
def live(start_shard, work):
    it = Live(start_shard(memory_bytes=1 << 20), work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield it
    it.check()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown <= MOST_GROWTH_BYTES, f"{grown >> 20} MiB were taken"
    it.channel.close()


def refused_by_name(answer):
    """An error that says whose fault it is."""
    return isinstance(answer, REFUSALS) and not isinstance(answer, Internal) and len(str(answer)) < 3_000


# -- Open, Step, LayerFrame --------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", REMOTE)
@FUZZ
@given(which=st.sampled_from(["open", "begin", "begin", "frame", "all"]), mutation=mutations())
def test_what_a_stream_means_is_refused_by_name_or_answered_right(live, transport, which, mutation):
    opening, begin = live.open(), codec.step_to_pb(live.step)
    frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(live.work.query()))
    for name, message in (("open", opening), ("begin", begin), ("frame", frame)):
        if which in (name, "all"):
            mutate(message, mutation)
    answer = live.attend(transport, opening, begin, frame)
    # On a stream of bytes a frame of another length than was announced is no frame.
    no_frame = isinstance(answer, TransportError) and "oversized: a frame" in str(answer)
    if answer is None or refused_by_name(answer) or no_frame:
        return
    assert isinstance(answer, bytes), repr(answer)
    expected = in_process(live, opening, begin, frame)
    assert answer == expected[: len(answer)]


def in_process(live, opening, begin, frame):
    """What the same messages make of a session of this thread's."""
    model, dtype = codec.model_from_pb(opening), codec.dtype_of(opening.dtype)
    client, step = live.local(model), codec.step_from_pb(begin)
    client.begin(step)
    spec = model.specs[model.layer_class[frame.layer]]
    heads = (step.group1 - step.group0) * spec.q_heads_per_group
    shape = (len(step.micro_batches[frame.micro_batch]), heads, spec.k_dim)
    state = client.wait(client.send(frame.layer, frame.micro_batch, codec.from_bytes(frame.q, shape, dtype)))
    return codec.to_bytes(state.lse) + codec.to_bytes(state.o)


def specs(**changes):
    return lambda m: [setattr(m.specs[0], name, value) for name, value in changes.items()]


def layouts(**changes):
    return lambda m: [setattr(m.layouts[0], name, value) for name, value in changes.items()]


def both(**changes):
    return lambda m: (specs(**changes)(m), layouts(**changes)(m))


def classes(*values):
    def change(m):
        del m.layer_class[:]
        m.layer_class.extend(values)

    return change


OPENINGS = {
    "no heads": (specs(q_heads=0, k_heads=0, v_heads=0), "heads of Q, K and V: give 1 to"),
    "heads above the bound": (
        specs(q_heads=2**32 - 1, k_heads=1, v_heads=1),
        "heads of Q, K and V: give 1 to",
    ),
    "heads that don't divide": (specs(q_heads=7), "must be a multiple"),
    "no dims": (both(k_dim=0), "dims"),
    "dims that wrap an int": (both(k_dim=2**32 - 1), "dims"),
    "other dims than stored": (specs(k_dim=9), "is not how 2 layers"),
    "other heads than stored": (specs(q_heads=12, k_heads=6, v_heads=6), "is not how 2 layers"),
    "other groups than stored": (layouts(groups=1), "is not how 2 layers"),
    "more layers than stored": (classes(0, 0, 0), "is not how 3 layers"),
    "a layer of no class": (classes(0, 1), "a layer of class 1 in a model of 1 classes"),
    "no layers": (classes(), "a model of 0 layers"),
    "too many layers": (classes(*[0] * 4097), "a model of 4097 layers"),
    "no classes": (lambda m: (m.ClearField("specs"), m.ClearField("layouts")), "0 specs and 0 layouts"),
    "a layout too few": (lambda m: m.ClearField("layouts"), "1 specs and 0 layouts"),
    "V in K that is not": (both(v_in_k=True, v_dim=9), "inside K of 3 x 8"),
    "empty blocks": (layouts(block_tokens=0), "tokens in a block"),
    "endless blocks": (layouts(block_tokens=2**32 - 1), "tokens in a block"),
    "a scale of nothing": (specs(scale=0.0), "scale of 0.0"),
    "a scale that is no float32": (specs(scale=1e300), "scale of 1e[+]300"),
    "a scale that is no number": (specs(scale=math.nan), "scale of nan"),
    "a cap below 0": (specs(soft_cap=-1.0), "soft cap of -1.0"),
    "a window of nothing": (specs(window_tokens=0), "window of 0 tokens"),
    "a dtype that is none": (lambda m: setattr(m, "dtype", "f" * 10_000), "unknown dtype 'f+[.][.][.]"),
    "a format that is none": (layouts(format="fp3"), "unknown KV format 'fp3'"),
    "queries wider than the KV": (lambda m: setattr(m, "dtype", "float64"), "queries in float64"),
}


@pytest.mark.parametrize("transport", REMOTE)
@pytest.mark.parametrize(("change", "says"), OPENINGS.values(), ids=OPENINGS)
def test_an_opening_that_makes_no_sense_is_refused_by_name(live, transport, change, says):
    opening = live.open()
    change(opening)
    frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(live.work.query()))
    answer = live.attend(transport, opening, codec.step_to_pb(live.step), frame)
    with pytest.raises(InvalidRequest, match=says):
        raise answer


def rows(count, **changes):
    def change(step):
        del step.positions[:], step.micro_batch_rows[:]
        step.positions.extend([100] * count)
        step.micro_batch_rows.append(count)
        for name, value in changes.items():
            setattr(step.reads[0].reads[0], name, value)

    return change


def read(**changes):
    return lambda step: [setattr(step.reads[0].reads[0], name, value) for name, value in changes.items()]


def many_reads(step):
    step.reads[0].reads.extend(list(step.reads[0].reads) * door.MOST_READS)


def many_batches(step):
    step.micro_batch_rows.extend([0] * 256)


STEPS = {
    "no rows": (rows(0), "a step of 0 rows"),
    "too many rows": (rows(door.MOST_ROWS + 1), "a step of 4097 rows"),
    "micro-batches of other rows": (
        lambda m: m.micro_batch_rows.append(2**32 - 1),
        "micro-batches of 4294967296",
    ),
    "too many micro-batches": (many_batches, "in 257 micro-batches"),
    "too many reads": (many_reads, f"a step of {door.MOST_READS + 1} reads"),
    "no reads of its class": (lambda m: m.ClearField("reads"), "reads of 0 layer classes"),
    "a position beyond 31 bits": (lambda m: m.positions.__setitem__(0, 2**31), "a row at position 2147"),
    "groups the model hasn't": (lambda m: setattr(m, "group1", 4), "head groups 0 to 4 of a model of 3"),
    "groups backwards": (lambda m: setattr(m, "group0", 3), "head groups 3 to 3"),
    "a read of rows it hasn't": (read(rows=2), "a read of rows range.0, 2. in a step of 1"),
    "a read of no rows": (read(rows=0), "a read of rows"),
    "a read of rows that wrap": (read(row=1, rows=2**32 - 1), "a read of rows"),
    "a read of groups it hasn't": (read(group1=2**32 - 1), "a read of head groups"),
    "a read of no tokens": (read(last=0), "a read of positions 0 to 0"),
    "a read that is backwards": (read(first=9, last=3), "a read of positions 9 to 3"),
    "a read beyond 31 bits": (read(last=2**63), "a read of positions"),
    "a read below its origin": (read(origin=5, first=2), "begins at 5"),
    "another origin": (read(origin=3, first=3), "begins at position 0, the read says 3"),
    "beyond the seal": (read(last=21), "sealed are 0 to 20"),
}  # fmt: skip


@pytest.mark.parametrize("transport", REMOTE)
@pytest.mark.parametrize(("change", "says"), STEPS.values(), ids=STEPS)
def test_a_step_that_makes_no_sense_is_refused_by_name(live, transport, change, says):
    begin = codec.step_to_pb(live.step)
    change(begin)
    frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(live.work.query()))
    answer = live.attend(transport, live.open(), begin, frame)
    with pytest.raises(InvalidRequest, match=says):
        raise answer


@pytest.mark.parametrize("transport", REMOTE)
def test_sizes_whose_product_wraps_to_nothing_are_refused(live, transport):
    """16 rows of 4,096 heads of 16,384 float32: 2^32 bytes of q, which are 0 in 32 bits."""
    opening, begin = live.open(), codec.step_to_pb(live.step)
    heads, dim = forms.MOST_HEADS, forms.MOST_DIM
    specs(q_heads=heads, k_heads=1, v_heads=1, k_dim=dim, v_dim=dim)(opening)
    layouts(groups=1, k_heads_per_group=1, v_heads_per_group=1, k_dim=dim, v_dim=dim)(opening)
    rows(16, rows=16, group1=1)(begin)
    begin.group1 = 1
    answer = live.attend(transport, opening, begin, pb.LayerFrame(step=1, layer=0, q=b""))
    with pytest.raises(InvalidRequest, match=r"bytes a layer: .* at most"):
        raise answer


@pytest.mark.parametrize(
    "work_item",
    [
        (None, 2**32, 4, 4, 8),
        (None, 4, 2**32, 4, 8),
        (None, 4, 4, 2**32, 8),
        (None, 4, 2**30, 2**30, 8),
        (None, -1, 4, 4, 8),
    ],
)
def test_the_native_loop_takes_no_size_that_its_integers_cannot_hold(live, work_item):
    """Whatever Python were to say; no upper bits are dropped on the way."""
    near, far = socket.socketpair()
    with far:
        wire = native().stream(near.detach(), DEADLINE_S, True, 0)
        step = (1, 0, ((0, 0),), ((work_item,),), 0, 0, 0, True)
        with pytest.raises((RuntimeError, OverflowError), match=r"bytes in a layer's frame|too big"):
            native().serve(wire, step, False)


# -- cold calls --------------------------------------------------------------------------------------------


def honest_requests(live):
    """Of a sequence of their own, since what is fenced stays fenced."""
    caller = pb.Caller(engine=f"engine {next(live.names)}", sent_ns=1)
    name, other = f"s{next(live.names)}", f"o{next(live.names)}"
    key, layout = codec.key_to_pb(live.work.key(name)), codec.layout_to_pb(live.work.layout)
    span, owner = live.work.sealed_span(live.shard.store, name, 0, 20).span, live.work.owner
    block = pb.PrefixBlock(hash=bytes(32), first=0, tokens=range(16))
    return {
        "Create": pb.CreateRequest(key=key, capacity_tokens=20, layout=layout, epoch=owner, caller=caller),
        "Seal": pb.SealRequest(span_id=span, tokens=20, epoch=owner, blocks=[block], sequence_id=name),
        "FindPrefix": pb.FindPrefixRequest(blocks=[block], sequence_id=name, epoch=owner, caller=caller),
        "Hold": pb.HoldRequest(span_ids=[span], sequence_id=other, epoch=owner, caller=caller),
        "Drop": pb.HoldRequest(span_ids=[span], sequence_id=other, epoch=owner, caller=caller),
        "DropSequence": pb.SequenceRequest(sequence_id=other, epoch=owner, caller=caller),
        "Fence": pb.SequenceRequest(sequence_id=other, epoch=owner),
        "Connect": pb.ConnectRequest(open=live.open(), cores=[0], threads=1),
        "Beat": pb.BeatRequest(
            caller=caller,
            sequences=[pb.Wanted(sequence_id=other, epoch=owner, span_ids=[span])],
            complete=True,
        ),
    }


METHODS = ["Create", "Seal", "FindPrefix", "Hold", "Drop", "DropSequence", "Fence", "Connect", "Beat"]


@pytest.mark.parametrize("method", METHODS)
@FUZZ
@given(mutation=mutations())
def test_what_a_cold_call_means_is_refused_by_name_or_done(live, method, mutation):
    """The budget is the bound: what is granted is given back after each example."""
    request = mutate(honest_requests(live)[method], mutation)
    answer = live.call(method, request)
    assert not isinstance(answer, Exception) or refused_by_name(answer), repr(answer)
    usage = live.shard.store.usage()
    assert usage.granted_bytes <= usage.budget_bytes == 1 << 20
    live.shard.store.check_integrity()
    for sequence in live.shard.store.sequences() - {live.read.holder}:
        live.shard.store.drop_sequence(sequence, epoch=2**64)


@pytest.mark.parametrize("kind", ["Write", "Read"])
@FUZZ
@given(mutation=mutations())
def test_what_a_transfer_means_is_refused_by_name_or_done(live, kind, mutation):
    work, layout = live.work, live.work.layout
    name = dict(span_id=live.read.span, layer=1, first=0, sequence_id="a")
    if kind == "Read":
        request = mutate(pb.ReadRequest(**name, last=20), mutation)
        try:
            tokens = sum(chunk.tokens for chunk in live.stub.Read(request, timeout=DEADLINE_S))
        except grpc.RpcError as failure:
            assert refused_by_name(rpc.error_of(failure, client="shard"))
        else:
            assert tokens == request.last - request.first
        return
    k, v = (codec.to_bytes(it) for it in work.tokens(2))
    request = mutate(pb.WriteRequest(**name, tokens=2, epoch=work.owner, k=k, v=v), mutation)
    answer = live.call("Write", iter([request]))
    assert not isinstance(answer, Exception) or refused_by_name(answer), repr(answer)
    assert layout == live.shard.store.look_up(live.read.span, holder=live.read.holder).layout


CREATIONS = {
    "no heads": ({"groups": 0}, {}),
    "dims beyond": ({"k_dim": 2**32 - 1}, {}),
    "layers beyond": ({"layers": 2**32 - 1}, {}),
    "heads beyond": ({"k_heads_per_group": 2**31}, {}),
    "empty blocks": ({"block_tokens": 0}, {}),
    "endless blocks": ({"block_tokens": 2**32 - 1}, {}),
    "a format that is none": ({"format": "?"}, {}),
    "no tokens": ({}, {"capacity_tokens": 0}),
    "tokens beyond": ({}, {"capacity_tokens": 2**64 - 1}),
}


@pytest.mark.parametrize(("layout", "request_"), CREATIONS.values(), ids=CREATIONS)
def test_a_span_that_makes_no_sense_is_refused_before_memory_is_taken(live, layout, request_):
    request = honest_requests(live)["Create"]
    for message, changes in ((request.layout, layout), (request, request_)):
        for name, value in changes.items():
            setattr(message, name, value)
    before = live.shard.store.usage()
    assert type(live.call("Create", request)) is InvalidRequest
    assert live.shard.store.usage() == before


LISTS = {
    "Hold": (lambda m: m.span_ids.extend(["x"] * door.MOST_SPANS), "names 65537 spans"),
    "Drop": (lambda m: m.span_ids.extend(["x"] * door.MOST_SPANS), "names 65537 spans"),
    "FindPrefix": (lambda m: m.blocks.extend(list(m.blocks) * door.MOST_BLOCKS), "names 16385 blocks"),
    "Seal": (lambda m: m.blocks.extend(list(m.blocks) * door.MOST_BLOCKS), "names 16385 blocks"),
    "Beat": (lambda m: m.sequences[0].span_ids.extend(["x"] * door.MOST_WANTED), "a list of 1048578"),
}


@pytest.mark.parametrize("method", LISTS)
def test_a_call_that_names_too_much_is_refused(live, method):
    """Locks are held for as long as a list takes."""
    request = honest_requests(live)[method]
    lengthen, says = LISTS[method]
    lengthen(request)
    with pytest.raises(InvalidRequest, match=says):
        raise live.call(method, request)


def test_names_are_short_and_present(live):
    for method, field in (("Create", "key.sequence_id"), ("Hold", "sequence_id"), ("Beat", "caller.engine")):
        for name in ("", "x" * (door.MOST_NAME + 1)):
            request = honest_requests(live)[method]
            *path, last = field.split(".")
            message = request
            for it in path:
                message = getattr(message, it)
            setattr(message, last, name)
            assert type(live.call(method, request)) is InvalidRequest


def test_a_span_that_is_none_is_not_echoed_at_length(live):
    answer = live.call("Seal", pb.SealRequest(span_id="x" * 1_000_000, sequence_id="a"))
    assert type(answer) is NotFound and len(str(answer)) < 3_000
    assert SpanId(live.read.span) in {it.span for it in live.shard.store.announce()}
    assert torch.isfinite(live.shard.store.read(live.read.span, 0, 0, 20, sequence=live.read.holder)[0]).all()
