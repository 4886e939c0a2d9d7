"""Tests of the shard's checks of reads, over every transport: a read must agree with the span it names, and
the span must be held until the answer is sent."""

import pytest
import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.shard.session import AttendedBytes, ShardSession
from farshore.attention_offload.transport.frames import REMOTE
from farshore.errors import InvalidRequest, NotFound
from farshore.ids import SequenceId, SpanId, WorkerId
from farshore.kernels.formats import KVFormat
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore

A, B = SequenceId("a"), SequenceId("b")


@pytest.fixture(params=[*REMOTE, "in process"])
def store_and_client(request, start_shard, reach, work):
    """(the shard's store, a function that makes a client of the shard)."""
    shard = start_shard()
    if request.param == "in process":
        return shard.store, lambda: InProcessClient(shard.worker, shard.store, work.model)
    return shard.store, lambda: reach(shard.address, transports=(request.param,))


def sealed(store, work, *, layout=None, layer_class=0, first=5, group0=0, group1=3, name="a"):
    """Creates two full spans of 20 tokens. Returns the read of the first, which is valid, and a read of the
    second, which has the given layout, class and groups."""
    layout = (layout or work.layout).of_groups(group1 - group0)
    key = work.key(name, first=first, group0=group0, group1=group1)
    key = type(key)(sequence=key.sequence, layer_class=layer_class, first=first, group0=group0, group1=group1)
    span = store.create(key, capacity_tokens=20, layout=layout, epoch=work.owner)
    for layer in range(layout.layers):
        k, v = (torch.zeros(heads, 20, dim) for heads, dim in
                ((layout.k_heads, layout.k_dim), (layout.v_heads, layout.v_dim)))  # fmt: skip
        if not layout.format.quantised:
            k, v = k.to(layout.format.dtype), v.to(layout.format.dtype)
        store.write(span, layer, 0, k, v, sequence=key.sequence, epoch=work.owner)
    store.seal(span, 20, sequence=key.sequence, epoch=work.owner)
    read = work.sealed_span(store, "honest", 5, 25)
    return read, read._replace(span=span, group0=group0, group1=group1, holder=key.sequence)


WRONG = {
    "no such span": (NotFound, {}, {"span": SpanId("shard/else/0")}, "no span"),
    "a stranger's": (NotFound, {}, {"holder": B}, "b does not hold"),
    "no sequence's": (NotFound, {}, {"holder": SequenceId("")}, "does not hold"),
    "origin": (InvalidRequest, {}, {"origin": 4}, "begins at position 5, the read says 4"),
    "groups below": (InvalidRequest, {"group0": 1}, {"group0": 0}, "holds head groups 1 to 3"),
    "groups above": (InvalidRequest, {"group1": 2}, {"group1": 3}, "holds head groups 0 to 2"),
    "class": (InvalidRequest, {"layer_class": 1}, {}, "of layer class 1, the read of 0"),
    "format": (InvalidRequest, {"layout": {"format": KVFormat.INT8}}, {}, "is stored as"),
    "dims": (InvalidRequest, {"layout": {"k_dim": 7}}, {}, "is stored as"),
    "V's dims": (InvalidRequest, {"layout": {"v_dim": 4}}, {}, "is stored as"),
    "heads": (InvalidRequest, {"layout": {"k_heads_per_group": 2}}, {}, "is stored as"),
    "layers": (InvalidRequest, {"layout": {"layers": 1}}, {}, "is stored as"),
    "blocks": (InvalidRequest, {"layout": {"block_tokens": 8}}, {}, "is stored as"),
    "unsealed": (InvalidRequest, {}, {"last": 26}, "sealed are 0 to 20"),
}


@pytest.mark.parametrize(("error", "stored", "asked", "says"), WRONG.values(), ids=WRONG)
def test_a_read_that_does_not_fit_its_span_is_refused_by_name(
    store_and_client, work, error, stored, asked, says
):
    store, make_client = store_and_client
    stored = dict(stored)
    if "layout" in stored:
        stored["layout"] = work.layout._replace(**stored["layout"])
    honest, read = sealed(store, work, **stored)
    client = make_client()
    expected = work.run(client, work.step([honest]))
    with pytest.raises(error, match=says):
        work.run(client, work.step([read._replace(**asked)], number=2))
    assert work.run(client, work.step([honest], number=3)) == expected
    for name in ("a", "honest"):
        store.drop_sequence(SequenceId(name), epoch=work.owner)


def test_a_class_reads_spans_of_its_own(store_and_client, work):
    """A span of one layer class cannot be read as a span of another class of equal shape, although their
    bytes have the same layout."""
    store, make_client = store_and_client
    layout = work.layout._replace(layers=1)
    work.layers, work.layout = 2, layout
    work.model = AttentionModel(specs=(work.spec,) * 2, layer_class=(0, 1), layouts=(layout,) * 2)
    first, _ = sealed(store, work)
    _, second = sealed(store, work, layer_class=1)
    step = work.step([first])
    client = make_client()
    both = type(step)(1, step.rows, step.positions, 0, 3, ((first,), (second,)), step.micro_batches)
    assert work.run(client, both)
    swapped = type(step)(2, step.rows, step.positions, 0, 3, ((second,), (first,)), step.micro_batches)
    with pytest.raises(InvalidRequest, match="of layer class"):
        work.run(client, swapped)
    for name in ("a", "honest"):
        store.drop_sequence(SequenceId(name), epoch=work.owner)


def test_a_repeated_step_notices_a_dropped_hold_although_the_span_stays(store_and_client, work):
    store, make_client = store_and_client
    read = work.sealed_span(store, "a", 0, 20)
    store.hold([read.span], sequence=B, epoch=work.owner)
    client = make_client()
    expected = work.run(client, work.step([read]))
    assert work.run(client, work.step([read], number=2)) == expected
    store.drop([read.span], sequence=A, epoch=work.owner)
    with pytest.raises(NotFound, match="a does not hold"):
        work.run(client, work.step([read], number=3))
    assert work.run(client, work.step([read._replace(holder=B)], number=4)) == expected
    store.drop_sequence(B, epoch=work.owner)


def test_a_span_dropped_in_the_middle_of_a_step_is_not_read_any_more(store_and_client, work):
    """At the next layer the memory may belong to another span: an engine's lease may expire during a step."""
    store, make_client = store_and_client
    read = work.sealed_span(store, "a", 0, 20)
    client = make_client()
    client.connect()
    client.begin(work.step([read]))
    client.wait(client.send(0, 0, work.query(seed=0)))
    store.drop_sequence(A, epoch=work.owner)
    other = work.sealed_span(store, "b", 0, 20)
    with pytest.raises(NotFound, match=read.span):
        client.wait(client.send(1, 0, work.query(seed=1)))
    assert work.run(client, work.step([other], number=2))
    store.drop_sequence(B, epoch=work.owner)


def test_other_spans_may_come_and_go_in_the_middle_of_a_step(store_and_client, work):
    store, make_client = store_and_client
    read = work.sealed_span(store, "a", 0, 20)
    client = make_client()
    step = work.step([read])
    expected = work.run(client, step)
    client.begin(work.step([read], number=2))
    states = []
    for layer in range(work.layers):
        work.sealed_span(store, "b", 0, 20)
        store.drop_sequence(B, epoch=work.owner)
        states.append(client.wait(client.send(layer, 0, work.query(seed=layer))))
    assert work.raw_bytes(states) == expected
    store.drop_sequence(A, epoch=work.owner)


def test_an_answer_is_not_sent_if_its_span_was_dropped_during_the_computation(work, monkeypatch):
    """The span is dropped while the kernels read it, after the check before the computation."""
    store = LocalStore(worker=WorkerId("shard"), arena=Arena(1 << 20))
    read = work.sealed_span(store, "a", 0, 20)
    session = ShardSession(store, work.model, AttendedBytes())
    session.begin(work.step([read]))
    (kernels,) = session._kernels
    partial = kernels.partial

    def dropped_meanwhile(*args, **options):
        partial(*args, **options)
        store.drop_sequence(A, epoch=work.owner)

    monkeypatch.setattr(kernels, "partial", dropped_meanwhile)
    with pytest.raises(NotFound):
        session.attend(1, 0, 0, work.query())
    store.check_integrity()
