"""A shard's service over gRPC on loopback: the same bits and the same errors as in process."""

import os

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote_store import WRITE_CHUNK_BYTES
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.plan.step_plan import StepPlan, split_rows
from farshore.attention_offload.shard.server import serve
from farshore.attention_offload.shard.service import READ_CHUNK_BYTES
from farshore.errors import FarshoreError, Fenced, Full, InvalidRequest, NotFound, PortInUse
from farshore.ids import SequenceId, SpanId, WorkerId
from farshore.kernels.base import State
from farshore.kernels.formats import KVFormat
from farshore.kernels.reference import merge
from farshore.kvstore.base import SpanSlice
from farshore.kvstore.prefix import PrefixBlock

DEADLINE_S = 60.0
A = SequenceId("a")


# -- states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_states_equal_those_of_the_in_process_client_bit_for_bit(shard, connect, work):
    remote, local = connect(shard.address), InProcessClient(shard.worker, shard.store, work.model)
    a0 = work.sealed_span(remote.store, "a", 0, 20)
    a1 = work.sealed_span(remote.store, "a", 20, 57)
    b = work.sealed_span(remote.store, "b", 0, 11)._replace(rows=range(1, 2))
    c = work.sealed_span(remote.store, "c", 5, 40, 1, 3)
    both = range(0, 2)
    steps = [
        work.step([a0, a1, b], positions=(57, 11)),
        work.step([a0._replace(rows=both), b], positions=(60, 61), number=2),
        work.step([a1._replace(first=31, last=33)], number=3),
        work.step([c, b._replace(group0=1)], positions=(40, 11), number=4, group0=1),
        work.step([c._replace(group0=2)], number=5, group0=2),
    ]
    for step in steps:
        assert work.run(remote, step) == work.run(local, step)
    assert remote.identify().attended_bytes == local.identify().attended_bytes > 0


def test_frames_may_run_ahead_of_their_answers(shard, connect, work):
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    client.begin(step)
    sent = [client.send(layer, 0, work.query(seed=layer)) for layer in range(work.layers)]
    assert work.raw_bytes([client.wait(frame) for frame in sent]) == expected


def test_answers_of_a_step_given_up_half_way_are_never_seen(shard, connect, work):
    client = connect(shard.address)
    read = work.sealed_span(client.store, "a", 0, 20)
    expected = work.run(client, work.step([read]))
    client.begin(work.step([read], number=2))
    client.send(0, 0, work.query(seed=9))
    assert work.run(client, work.step([read], number=2)) == expected


def test_fanout_puts_the_states_of_two_servers_where_they_belong(start_shard, connect, work):
    shards = {name: start_shard(worker=name) for name in (WorkerId("x"), WorkerId("y"))}
    remote = {worker: connect(shard.address) for worker, shard in shards.items()}
    local = {worker: InProcessClient(worker, shard.store, work.model) for worker, shard in shards.items()}
    reads = {
        "y": (work.sealed_span(remote["y"].store, "a", 0, 20),),
        "x": (work.sealed_span(remote["x"].store, "a", 20, 40, 1, 3)._replace(rows=range(1, 2)),),
    }
    a = SequenceId("a")
    plan = StepPlan(1, 3, (a, a), (40, 41), {a: work.owner}, (reads,))
    over_grpc, in_process = Fanout(remote, work.model), Fanout(local, work.model)
    for client in remote.values():
        client.connect()
    q = work.query(rows=2)
    for fanout in (over_grpc, in_process):
        fanout.begin(plan, split_rows(2, 1))
    for layer in range(work.layers):
        for fanout in (over_grpc, in_process):
            fanout.send(layer, 0, q)
        got, expected = (fanout.wait(layer, 0) for fanout in (over_grpc, in_process))
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.o, theirs.o) and torch.equal(mine.lse, theirs.lse)
        assert got[1].lse[0].isneginf().all() and got[1].lse[1, :2].isneginf().all()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_micro_batches_get_the_states_of_the_whole_step(start_shard, connect, work, n):
    """Each shard reads some rows and heads only, and has no rows of some micro-batches."""
    names = [WorkerId("x"), WorkerId("y")]
    clients = {name: connect(start_shard(worker=name).address) for name in names}
    for client in clients.values():
        client.connect()
    x, y = (clients[name].store for name in names)
    reads = {
        "x": tuple(
            work.sealed_span(x, name, 0, 20 + row)._replace(rows=range(row, row + 1))
            for row, name in enumerate("abcd")
        ),
        "y": (
            work.sealed_span(y, "b", 21, 40, 1, 3)._replace(rows=range(1, 2)),
            work.sealed_span(y, "d", 23, 40)._replace(rows=range(3, 4)),
        ),
    }
    sequences = tuple(SequenceId(name) for name in "abcd")
    plan = StepPlan(1, 3, sequences, (40,) * 4, dict.fromkeys(sequences, work.owner), (reads,))
    q = work.query(rows=4)
    fanout = Fanout(clients, work.model)

    def merged(cuts):
        fanout.begin(plan, cuts)
        out = []
        for layer in range(work.layers):
            for i, cut in enumerate(cuts):
                fanout.send(layer, i, q[cut.start : cut.stop])
            for i, cut in enumerate(cuts):
                total = State.identity(len(cut), 6, work.spec.v_dim, device="cpu")
                merge(fanout.wait(layer, i), out=total)
                out.append(total)
        return [torch.cat([state[i] for state in out]) for i in (0, 1)]

    whole = merged(split_rows(4, 1))
    cut = merged(split_rows(4, n))
    for mine, theirs in zip(cut, whole, strict=True):
        assert torch.equal(mine, theirs)
    assert all(link.frames and not link.failures and link.p99_ms > 0 for link in fanout.links())


@pytest.mark.parametrize(
    ("change", "layer", "heads", "error"),
    [
        ({"span": SpanId("shard/else/99")}, 0, 3, NotFound),
        ({"last": 21}, 0, 3, InvalidRequest),
        ({}, 1, 2, InvalidRequest),
    ],
    ids=["an unknown span", "beyond the seal", "q of other heads"],
)
def test_a_step_refused_says_why_and_the_next_one_runs(shard, connect, change, layer, heads, error, work):
    client = connect(shard.address)
    read = work.sealed_span(client.store, "a", 0, 20)
    client.connect()
    client.begin(work.step([read._replace(**change)]))
    with pytest.raises(error):
        client.wait(client.send(layer, 0, work.query(groups=heads)))
    assert work.run(client, work.step([read]))


# -- the store ---------------------------------------------------------------------------------------------


def test_a_span_makes_the_round_trip(shard, connect, work):
    store = connect(shard.address).store
    (k0, v0), (k1, v1) = work.tokens(20, seed=0), work.tokens(20, seed=1)
    span = store.create(work.key("a", first=7), capacity_tokens=20, layout=work.layout, epoch=work.owner)
    store.write(span, 0, 0, k0, v0, sequence=A, epoch=work.owner)
    store.write(span, 1, 0, k1[:, :12], v1[:, :12], sequence=A, epoch=work.owner)
    store.write(span, 1, 12, k1[:, 12:], v1[:, 12:], sequence=A, epoch=work.owner)
    digest = store.seal(span, 20, sequence=A, epoch=work.owner)
    assert (
        digest
        == store.seal(span, 20, sequence=A, epoch=work.owner)
        == shard.store.seal(span, 20, sequence=A, epoch=work.owner)
    )
    for layer, (k, v) in enumerate([(k0, v0), (k1, v1)]):
        got_k, got_v = store.read(span, layer, 3, 19, sequence=A)
        assert torch.equal(got_k, k[:, 3:19]) and torch.equal(got_v, v[:, 3:19])
    assert [kv.shape[1] for kv in store.read(span, 0, 5, 5, sequence=A)] == [0, 0]
    assert store.announce() == shard.store.announce()
    assert store.announce()[0].key == work.key("a", first=7)
    store.drop([span], sequence=SequenceId("a"), epoch=work.owner)
    assert shard.store.announce() == []


def test_a_span_larger_than_a_message_travels_in_chunks(start_shard, connect, work):
    shard = start_shard(memory_bytes=64 << 20)
    store = connect(shard.address).store
    count = 2 * max(READ_CHUNK_BYTES, WRITE_CHUNK_BYTES) // (work.layout.token_bytes // work.layers) + 5
    span = store.create(work.key("a"), capacity_tokens=count, layout=work.layout, epoch=work.owner)
    k, v = work.tokens(count)
    for layer in range(work.layers):
        store.write(span, layer, 0, k, v, sequence=A, epoch=work.owner)
    store.seal(span, count, sequence=A, epoch=work.owner)
    got_k, got_v = store.read(span, 1, 0, count, sequence=A)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


def test_a_span_stays_readable_for_as_long_as_a_sequence_holds_it(shard, connect, work):
    store = connect(shard.address).store
    span = work.sealed_span(store, "a", 0, 20).span
    b = SequenceId("b")
    for _ in range(2):
        store.hold([span], sequence=b, epoch=work.owner)
    for _ in range(2):
        store.drop_sequence(SequenceId("a"), epoch=work.owner)
    store.drop([span], sequence=b, epoch=work.old)
    assert store.read(span, 0, 0, 20, sequence=b)[0].shape[1] == 20
    store.drop([span], sequence=b, epoch=work.owner)
    with pytest.raises(NotFound):
        store.read(span, 0, 0, 20, sequence=b)
    assert shard.store.announce() == []


def test_a_prefix_is_found_read_and_held_by_a_connection_that_did_not_write_it(shard, connect, work):
    writer, finder = connect(shard.address).store, connect(shard.address).store
    named = [
        PrefixBlock(bytes([i]) * 32, tuple(range(i, i + 8)), first) for i, first in enumerate(range(8, 32, 8))
    ]
    key = work.key("a", first=8, group0=1)
    layout = work.layout.of_groups(2)
    span = writer.create(key, capacity_tokens=20, layout=layout, epoch=work.owner)
    data = [work.tokens(20, seed=layer, groups=2) for layer in range(work.layers)]
    for layer, (k, v) in enumerate(data):
        writer.write(span, layer, 0, k, v, sequence=A, epoch=work.owner)
    writer.seal(span, 20, sequence=A, epoch=work.owner, blocks=named)
    with pytest.raises(NotFound):
        finder.read(span, 0, 0, 1, sequence=SequenceId("b"))
    located = finder.find_prefix([block.hash for block in named], layer_class=0)
    with pytest.raises(NotFound):
        finder.read(span, 0, 0, 1, sequence=SequenceId("b"))
    found = finder.hold_prefix(named, layer_class=0, sequence=SequenceId("b"), epoch=work.owner)
    assert found.slices == [SpanSlice(span=span, key=key, layout=layout, first=8, last=24)]
    assert found == located
    assert found.available_bytes == connect(shard.address).identify().free_bytes
    writer.drop_sequence(SequenceId("a"), epoch=work.owner)
    assert torch.equal(finder.read(span, 1, 3, 16, sequence=SequenceId("b"))[0], data[1][0][:, 3:16])
    finder.drop([span], sequence=SequenceId("b"), epoch=work.owner)
    assert [info.holders for info in finder.announce()] == [0]
    identity = connect(shard.address).identify()
    assert identity.free_bytes == identity.budget_bytes
    assert identity.cached_bytes == shard.store.usage().cached_bytes > 0
    # A fork, or a reader that knows the id, holds the span in order to read it.
    writer.hold([span], sequence=SequenceId("c"), epoch=work.owner)
    assert torch.equal(writer.read(span, 0, 0, 20, sequence=SequenceId("c"))[1], data[0][1])


def test_drop_sequence_and_fence_reach_the_store(shard, connect, work):
    store = connect(shard.address).store
    work.sealed_span(store, "a", 0, 20)
    work.sealed_span(store, "b", 0, 20)
    store.drop_sequence(SequenceId("a"), epoch=work.old)
    assert len(store.announce()) == 2
    store.drop_sequence(SequenceId("a"), epoch=work.owner)
    assert [info.key.sequence for info in store.announce()] == ["b"]
    store.fence(SequenceId("b"), work.new)
    with pytest.raises(Fenced):
        store.create(work.key("b", first=20), capacity_tokens=1, layout=work.layout, epoch=work.owner)


UNKNOWN = SpanId("shard/else/99")
REFUSALS = {
    "full": (Full, lambda w, s, _: s.create(
        w.key("b"), capacity_tokens=1 << 20, layout=w.layout, epoch=w.owner)),
    "groups": (InvalidRequest, lambda w, s, _: s.create(
        w.key("b"), capacity_tokens=9, layout=w.layout.of_groups(2), epoch=w.new)),
    "v in k": (InvalidRequest, lambda w, s, _: s.create(
        w.key("b"), capacity_tokens=9, layout=w.layout._replace(v_in_k=True, v_dim=9), epoch=w.new)),
    "gaps": (InvalidRequest, lambda w, s, span: s.seal(span, 25, sequence=A, epoch=w.owner)),
    "old seal": (Fenced, lambda w, s, span: s.seal(span, 20, sequence=A, epoch=w.old)),
    "old write": (Fenced, lambda w, s, span: s.write(span, 0, 20, *w.tokens(1), sequence=A, epoch=w.old)),
    "sealed": (InvalidRequest, lambda w, s, span: s.write(
        span, 0, 19, *w.tokens(1), sequence=A, epoch=w.owner)),
    "capacity": (InvalidRequest, lambda w, s, span: s.write(
        span, 0, 29, *w.tokens(2), sequence=A, epoch=w.owner)),
    "layer": (InvalidRequest, lambda w, s, span: s.write(
        span, 2, 20, *w.tokens(1), sequence=A, epoch=w.owner)),
    "heads": (InvalidRequest, lambda w, s, span: s.write(
        span, 0, 20, *w.tokens(1, groups=2), sequence=A, epoch=w.owner)),
    "dtype": (InvalidRequest, lambda w, s, span: s.write(
        span, 0, 20, *w.tokens(1, format=KVFormat.FLOAT16), sequence=A, epoch=w.owner)),
    "another's write": (NotFound, lambda w, s, span: s.write(
        span, 0, 20, *w.tokens(1), sequence=SequenceId("b"), epoch=w.new)),
    "another's seal": (NotFound, lambda w, s, span: s.seal(
        span, 20, sequence=SequenceId("b"), epoch=w.new)),
    "another's read": (NotFound, lambda w, s, span: s.read(span, 0, 0, 20, sequence=SequenceId("b"))),
    "unsealed": (InvalidRequest, lambda w, s, span: s.read(span, 0, 0, 21, sequence=A)),
    "backwards": (InvalidRequest, lambda w, s, span: s.read(span, 0, 5, 4, sequence=A)),
    "read what": (NotFound, lambda w, s, _: s.read(UNKNOWN, 0, 0, 1, sequence=A)),
    "write what": (NotFound, lambda w, s, _: s.write(UNKNOWN, 0, 0, *w.tokens(1), sequence=A, epoch=w.owner)),
    "seal what": (NotFound, lambda w, s, _: s.seal(UNKNOWN, 1, sequence=A, epoch=w.owner)),
    "hold what": (NotFound, lambda w, s, span: s.hold(
        [span, UNKNOWN], sequence=SequenceId("b"), epoch=w.owner)),
    "old hold": (Fenced, lambda w, s, span: s.hold([span], sequence=SequenceId("a"), epoch=w.old)),
    "old find": (Fenced, lambda w, s, _: s.hold_prefix(
        [], layer_class=0, sequence=SequenceId("a"), epoch=w.old)),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_arrives_as_the_store_itself_would_raise_it(start_shard, shard, connect, error, call, work):
    refusals, messages = [], []
    for store in (connect(shard.address).store, start_shard().store):
        span = store.create(work.key("a"), capacity_tokens=30, layout=work.layout, epoch=work.owner)
        for layer in range(work.layers):
            store.write(span, layer, 0, *work.tokens(20), sequence=A, epoch=work.owner)
        store.seal(span, 20, sequence=A, epoch=work.owner)
        with pytest.raises(FarshoreError) as caught:
            call(work, store, span)
        refusals.append(caught.value)
        messages.append(str(caught.value).replace(span, "the span"))
    over_grpc, in_process = refusals
    assert type(over_grpc) is type(in_process) is error
    assert getattr(over_grpc, "free_bytes", None) == getattr(in_process, "free_bytes", None)
    if error is not NotFound:
        assert messages[0] == messages[1]


# -- the server --------------------------------------------------------------------------------------------


def test_health_and_reflection_answer(shard):
    with grpc.insecure_channel(shard.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", shard.service_name):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([question]), timeout=DEADLINE_S)
        assert shard.service_name in {service.name for service in answer.list_services_response.service}


def test_a_taken_port_is_refused(shard):
    with pytest.raises(PortInUse, match="choose another port"):
        serve(shard.service, shard.address)


def test_a_client_identifies_the_shard(shard, connect, work):
    identity = connect(shard.address).identify()
    assert identity == InProcessClient(shard.worker, shard.store, work.model).identify()
    assert identity.process_id == os.getpid()
