"""Well-formed messages with arbitrary values, from hypothesis: refused by name, or answered correctly.

Each example puts extreme or inconsistent values into some fields of valid messages. The shard must not crash,
hang or take unbounded memory, and must serve the next valid request.
"""

import math

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore import rpc
from farshore.attention_offload import codec
from farshore.attention_offload.transport.frames import REMOTE, native
from farshore.errors import TransportError
from farshore.proto import attention_pb2 as pb

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native module")

DEADLINE_S = 60.0
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


def scalars_of(message):
    """Yields (message, field, index or None) for all scalars, at any depth."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.type == F.TYPE_MESSAGE:
            if field.is_repeated:
                for item in value:
                    yield from scalars_of(item)
            elif message.HasField(field.name):
                yield from scalars_of(value)
        elif field.is_repeated:
            yield from ((message, field, i) for i in range(len(value)))
        else:
            yield message, field, None


def lists_of(message):
    """Yields (message, field) for all repeated fields, at any depth."""
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            yield message, field
        if field.type == F.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            for item in inner if field.is_repeated else [inner] if message.HasField(field.name) else []:
                yield from lists_of(item)


@st.composite
def mutations(draw):
    """A change of a message: (indices of its scalars, (index, change) of its lists, new values by type).

    Indices are taken modulo the number of scalars or lists in the message."""
    scalars = draw(st.lists(st.integers(0, 999), min_size=1, max_size=3))
    shapes = draw(
        st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["clear", "double", "64"])), max_size=1)
    )
    values = {kind: draw(st.lists(some, min_size=4, max_size=4)) for kind, some in VALUES.items()}
    return scalars, shapes, values


def mutate(message, mutation):
    scalars, shapes, values = mutation
    for index, change in shapes:
        found = list(lists_of(message))
        if not found:
            continue
        parent, field = found[index % len(found)]
        items = list(getattr(parent, field.name))
        kept = {"clear": [], "double": items * 2, "64": items * 64}[change]
        parent.ClearField(field.name)
        getattr(parent, field.name).extend(kept)
    for number, scalar in enumerate(scalars):
        found = list(scalars_of(message))
        if not found:
            continue
        parent, field, index = found[scalar % len(found)]
        value = values[field.type][number]
        if index is None:
            setattr(parent, field.name, value)
        else:
            getattr(parent, field.name)[index] = value
    return message


@pytest.mark.parametrize("transport", REMOTE)
@FUZZ
@given(which=st.sampled_from(["open", "begin", "begin", "frame", "all"]), mutation=mutations())
def test_altered_steps_are_refused_by_name_or_answered_correctly(live, transport, which, mutation):
    opening, begin = live.open(), codec.step_to_pb(live.step)
    frame = pb.LayerFrame(step=1, layer=0, q=codec.to_bytes(live.work.query()))
    for name, message in (("open", opening), ("begin", begin), ("frame", frame)):
        if which in (name, "all"):
            mutate(message, mutation)
    answer = live.attend(transport, opening, begin, frame)
    # Over TCP a layer frame of the wrong length is malformed.
    no_frame = isinstance(answer, TransportError) and "oversized: a frame" in str(answer)
    if answer is None or live.refused_by_name(answer) or no_frame:
        return
    assert isinstance(answer, bytes), repr(answer)
    expected = in_process(live, opening, begin, frame)
    assert answer == expected[: len(answer)]


def in_process(live, opening, begin, frame):
    """The bytes that a session in this thread answers to the same messages."""
    model, dtype = codec.model_from_pb(opening), codec.dtype_of(opening.dtype)
    client, step = live.local(model), codec.step_from_pb(begin)
    client.begin(step)
    spec = model.specs[model.layer_class[frame.layer]]
    heads = (step.group1 - step.group0) * spec.q_heads_per_group
    shape = (len(step.micro_batches[frame.micro_batch]), heads, spec.k_dim)
    state = client.wait(client.send(frame.layer, frame.micro_batch, codec.from_bytes(frame.q, shape, dtype)))
    return codec.to_bytes(state.lse) + codec.to_bytes(state.o)


METHODS = ["Create", "Seal", "FindPrefix", "HoldPrefix", "Hold", "Drop", "DropSequence", "Fence"]
METHODS += ["Connect", "Beat"]


@pytest.mark.parametrize("method", METHODS)
@FUZZ
@given(mutation=mutations())
def test_altered_cold_calls_are_refused_by_name_or_done(live, method, mutation):
    """Spans that an example creates are dropped after it, so that the budget stays the only limit."""
    request = mutate(live.valid_requests()[method], mutation)
    answer = live.call(method, request)
    assert not isinstance(answer, Exception) or live.refused_by_name(answer), repr(answer)
    usage = live.shard.store.usage()
    assert usage.granted_bytes <= usage.budget_bytes == 1 << 20
    live.shard.store.check_integrity()
    for sequence in live.shard.store.sequences() - {live.read.holder}:
        live.shard.store.drop_sequence(sequence, epoch=2**64)


@pytest.mark.parametrize("kind", ["Write", "Read"])
@FUZZ
@given(mutation=mutations())
def test_altered_transfers_are_refused_by_name_or_done(live, kind, mutation):
    work, layout = live.work, live.work.layout
    name = dict(span_id=live.read.span, layer=1, first_token=0, sequence_id="a")
    if kind == "Read":
        request = mutate(pb.ReadRequest(**name, end_token=20), mutation)
        try:
            tokens = sum(chunk.tokens for chunk in live.stub.Read(request, timeout=DEADLINE_S))
        except grpc.RpcError as failure:
            assert live.refused_by_name(rpc.error_of(failure, peer="shard"))
        else:
            assert tokens == request.end_token - request.first_token
        return
    k, v = (codec.to_bytes(tensor) for tensor in work.tokens(2))
    request = mutate(pb.WriteRequest(**name, tokens=2, epoch=work.owner, k=k, v=v), mutation)
    answer = live.call("Write", iter([request]))
    assert not isinstance(answer, Exception) or live.refused_by_name(answer), repr(answer)
    assert layout == live.shard.store.look_up(live.read.span, holder=live.read.holder).layout
