"""Repeated steps: a header is sent instead of the plan, as long as the reads and their spans are the same."""

import pytest
import torch

from farshore.attention_offload import codec
from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.shard.session import AttendedBytes, ShardSession
from farshore.attention_offload.transport.frames import REMOTE, Transport
from farshore.errors import InvalidRequest, Late, NotFound, TransportError
from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore


@pytest.fixture
def announced(monkeypatch):
    """The numbers of the steps whose plan was sent."""
    sent, encode = [], codec.step_to_pb

    def counted(step):
        sent.append(step.step)
        return encode(step)

    monkeypatch.setattr(codec, "step_to_pb", counted)
    return sent


@pytest.mark.parametrize("transport", REMOTE)
def test_the_plan_is_sent_once_and_repeated_steps_give_the_same_states(start_shard, connect, work, announced):
    shard = start_shard()
    client, local = connect(shard.address), InProcessClient(shard.worker, shard.store, work.model)
    read = work.sealed_span(client.store, "a", 0, 20)
    expected = work.run(local, work.step([read]))
    for number in range(1, 5):
        assert work.run(client, work.step([read], number=number, positions=(100 + number,))) == expected
    assert announced == [1]


@pytest.mark.parametrize("transport", REMOTE)
def test_other_reads_need_a_new_plan(start_shard, connect, work, announced):
    shard = start_shard()
    client, local = connect(shard.address), InProcessClient(shard.worker, shard.store, work.model)
    a, b = (work.sealed_span(client.store, name, 0, 20 + len(name)) for name in ("a", "bb"))
    behind = work.sealed_span(client.store, "a", 21, 43)
    steps = [[a], [a], [b], [a, behind], [a._replace(last=19)], [a]]
    for number, reads in enumerate(steps, 1):
        step = work.step(reads, number=number)
        assert work.run(client, step) == work.run(local, step)
    assert announced == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("transport", REMOTE)
def test_a_repeated_step_notices_a_dropped_span(shard, connect, work, announced):
    """After another sequence's drop all spans are found again; after its own drop the step fails."""
    client = connect(shard.address)
    read, other = (work.sealed_span(client.store, name, 0, 20) for name in "ab")
    expected = work.run(client, work.step([read]))
    client.store.drop([other.span], sequence=SequenceId("b"), epoch=work.owner)
    for number in (2, 3):
        assert work.run(client, work.step([read], number=number)) == expected
    client.store.drop([read.span], sequence=SequenceId("a"), epoch=work.owner)
    with pytest.raises(NotFound, match=read.span):
        work.run(client, work.step([read], number=4))
    assert announced == [1]


@pytest.mark.parametrize("transport", REMOTE)
def test_a_new_connection_is_told_the_plan(shard, connect, work, announced):
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    client.break_off()
    assert work.run(client, step) == expected
    assert announced == [1, 1]


@pytest.mark.parametrize("transport", REMOTE)
def test_a_step_dropped_half_way_leaves_the_connection_as_it_is(shard, connect, work, announced):
    client = connect(shard.address)
    step = work.step([work.sealed_span(client.store, "a", 0, 20)])
    expected = work.run(client, step)
    for _ in range(3):
        client.begin(step)
        for layer in range(work.layers):
            client.send(layer, 0, work.query(seed=9))
        client.begin(step)
        client.send(0, 0, work.query(seed=8))
        assert work.run(client, step) == expected
    assert announced == [1]


@pytest.mark.parametrize("transport", REMOTE)
@pytest.mark.parametrize("repeated", [True, False])
def test_steps_that_are_announced_and_never_run(shard, connect, work, repeated):
    """More steps than shared memory has slots. It happens if another shard has no connection."""
    client = connect(shard.address)
    reads = [work.sealed_span(client.store, name, 0, 20) for name in "ab"]
    expected = work.run(client, work.step(reads[:1]))
    for number in range(2, 50):
        client.begin(work.step([reads[0 if repeated else number % 2]], number=number))
    assert work.run(client, work.step(reads[:1], number=50)) == expected


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.TCP])
def test_a_connection_that_the_shard_closes_between_two_steps_is_lost(
    start_process, connect, work, announced
):
    """The next step raises TransportError; later steps raise Late until the client connects again."""
    process = start_process()
    client = connect(process.address)
    reads = [work.sealed_span(client.store, "a", 0, 20)]
    work.run(client, work.step(reads))
    process.restart()
    assert not client.ready
    with pytest.raises(TransportError, match="closed the connection"):
        client.begin(work.step(reads, number=2))
    with pytest.raises(Late, match="no connection"):
        client.begin(work.step(reads, number=3))
    with pytest.raises(NotFound):
        work.run(client, work.step(reads, number=4))
    assert announced == [1, 4]


def windowed(work):
    spec = work.spec._replace(window_tokens=30)
    return AttentionModel(specs=(spec,), layer_class=(0,) * work.layers, layouts=(work.layout,))


@pytest.mark.parametrize("transport", [Transport.SHARED_MEMORY, Transport.GRPC])
def test_a_model_with_a_window_sends_positions_with_every_step(
    start_shard, reach, work, transport, announced
):
    shard = start_shard()
    work.model = windowed(work)
    client = reach(shard.address, transports=(transport,))
    local = InProcessClient(shard.worker, shard.store, work.model)
    read = work.sealed_span(client.store, "a", 0, 20)
    for number, position in enumerate((35, 40), 1):
        step = work.step([read], number=number, positions=(position,))
        assert work.run(client, step) == work.run(local, step)
    assert announced == [1, 2]


def test_a_session_refuses_to_repeat_no_step_or_a_windowed_one(work):
    store = LocalStore(worker=WorkerId("shard"), arena=Arena(1 << 20))
    with pytest.raises(InvalidRequest, match="there was none"):
        ShardSession(store, work.model, AttendedBytes()).repeat_step(7)
    session = ShardSession(store, windowed(work), AttendedBytes())
    session.begin(work.step([work.sealed_span(store, "a", 0, 20)]))
    with pytest.raises(InvalidRequest, match="window"):
        session.repeat_step(8)


def test_a_session_takes_the_repeated_steps_number(work):
    store = LocalStore(worker=WorkerId("shard"), arena=Arena(1 << 20))
    session = ShardSession(store, work.model, AttendedBytes())
    session.begin(work.step([work.sealed_span(store, "a", 0, 20)]))
    first = session.attend(1, 0, 0, work.query())
    session.repeat_step(2)
    assert torch.equal(session.attend(2, 0, 0, work.query()).o, first.o)
    with pytest.raises(InvalidRequest, match="step 2 is under way"):
        session.attend(1, 0, 0, work.query())
