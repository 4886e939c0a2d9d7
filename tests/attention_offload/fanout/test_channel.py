"""Tests of all kinds of channels: each gives the same bits in any order of sends and waits, keeps the same
records, and raises errors that name the same shards."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.client.remote import MAX_UNDER_WAY
from farshore.attention_offload.fanout import channel
from farshore.attention_offload.fanout import fanout as fanout_module
from farshore.attention_offload.fanout.channel import channels_to
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.plan.step_plan import StepPlan, split_rows
from farshore.attention_offload.transport.frames import REMOTE, Transport
from farshore.errors import Late, Lost, NotFound, TransportError
from farshore.ids import SequenceId, WorkerId

NAMES = tuple(WorkerId(name) for name in "xyz")
ROWS = 4
SEQUENCES = tuple(SequenceId(f"row {row}") for row in range(ROWS))


class Ground:
    """Three shards, and clients of them for every kind of channel. One shard sees some heads of scattered
    rows."""

    def __init__(self, work, start_shard, reach):
        self.work = work
        self.shards = {name: start_shard(worker=name) for name in NAMES}
        self.clients = {
            transport: {
                name: reach(shard.address, transports=(transport,)) for name, shard in self.shards.items()
            }
            for transport in REMOTE
        }
        self.clients[Transport.IN_PROCESS] = {
            name: InProcessClient(name, shard.store, work.model) for name, shard in self.shards.items()
        }
        # One step may use different kinds of channels.
        kinds = (Transport.IN_PROCESS, Transport.TCP, Transport.GRPC)
        mixed = {
            name: InProcessClient(name, self.shards[name].store, work.model)
            if kind is Transport.IN_PROCESS
            else reach(self.shards[name].address, transports=(kind,))
            for name, kind in zip(NAMES, kinds, strict=True)
        }
        self.clients["mixed"] = mixed
        x, y, z = (shard.store for shard in self.shards.values())
        self.reads = {
            NAMES[0]: (work.sealed_span(x, SEQUENCES[0], 0, 20)._replace(rows=range(ROWS)),),
            NAMES[1]: tuple(
                work.sealed_span(y, SEQUENCES[row], 20, 33, 1, 3)._replace(rows=range(row, row + 1))
                for row in (0, 2, 3)
            ),
            NAMES[2]: (work.sealed_span(z, SEQUENCES[1], 33, 57)._replace(rows=range(1, 2)),),
        }

    def plan(self, step, reads=None):
        epochs = dict.fromkeys(SEQUENCES, self.work.owner)
        return StepPlan(step, 3, SEQUENCES, (60,) * ROWS, epochs, (reads or self.reads,))

    def connect(self, kind):
        for client in self.clients[kind].values():
            client.connect()
        return self.clients[kind]

    def query(self, layer, batch):
        return self.work.query(rows=ROWS, seed=layer)[batch.start : batch.stop]


@pytest.fixture
def ground(work, start_shard, reach):
    return Ground(work, start_shard, reach)


KINDS = [*REMOTE, Transport.IN_PROCESS, "mixed"]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batches=st.integers(1, 4), ahead=st.data())
def test_all_kinds_give_the_same_bits_in_whatever_order_frames_are_sent_and_waited_for(
    ground, batches, ahead
):
    """Frames are waited for in the order of the sends; the lead of the sends over the waits is drawn. A step
    is dropped half way; its outstanding answers must not appear in the next step."""
    cuts = split_rows(ROWS, batches)
    frames = [(layer, index) for layer in range(ground.work.layers) for index in range(len(cuts))]
    leads = [ahead.draw(st.integers(1, len(cuts)), label="lead") for _ in frames]
    dropped = ahead.draw(st.integers(0, min(len(frames), MAX_UNDER_WAY)), label="dropped")
    found = {}
    for kind in KINDS:
        fanout = Fanout(ground.connect(kind), ground.work.model)
        fanout.begin(ground.plan(1), cuts)
        for layer, index in frames[:dropped]:
            fanout.send(layer, index, torch.ones_like(ground.query(layer, cuts[index])))
        if dropped > 1:
            fanout.wait(*frames[0])
        for step in (2, 3):  # the second of them is like the first
            fanout.begin(ground.plan(step), cuts)
            due, states = list(frames), []
            for waited, lead in enumerate(leads):
                # A request has one reply buffer per micro-batch, so a layer is sent after the wait for the
                # layer before.
                while due and frames.index(due[0]) < min(waited + lead, waited + len(cuts)):
                    layer, index = due.pop(0)
                    fanout.send(layer, index, ground.query(layer, cuts[index]))
                states += [(state.o.clone(), state.lse.clone()) for state in fanout.wait(*frames[waited])]
            if step == 2:
                first = states
        assert all(map(_equal, first, states))
        found[kind] = states
        connections = [client.native_connection for client in ground.clients[kind].values()]
        assert not any(connection.under_way for connection in connections if connection)
    for kind in KINDS:
        assert len(found[kind]) == len(found[Transport.IN_PROCESS])
        assert all(map(_equal, found[kind], found[Transport.IN_PROCESS])), kind


def _equal(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_keep_records_alike(ground, kind):
    fanout = Fanout(ground.connect(kind), ground.work.model)
    cuts = split_rows(ROWS, 2)
    for step in range(1, 6):
        fanout.begin(ground.plan(step), cuts)
        for layer in range(ground.work.layers):
            for index, cut in enumerate(cuts):
                fanout.send(layer, index, ground.query(layer, cut))
            for index in range(len(cuts)):
                fanout.wait(layer, index)
    waited_s = fanout.waited_s
    links = {link.worker_id: link for link in fanout.links()}
    # z sees row 1 alone: of the two micro-batches, the first.
    assert {name: link.frames for name, link in links.items()} == dict(zip(NAMES, (20, 20, 10), strict=True))
    assert all(link.p50_ms > 0 and not link.failures for link in links.values())
    assert all(link.deadline_ms == 1000 for link in links.values()), "few frames were seen"
    assert (waited_s > 0) is (kind is not Transport.IN_PROCESS)


@pytest.mark.parametrize("kind", REMOTE)
def test_without_a_connection_all_such_shards_are_late_at_once(ground, kind):
    clients = ground.clients[kind]
    clients[NAMES[1]].connect()
    fanout = Fanout(clients, ground.work.model)
    for _ in range(2):
        with pytest.raises(Late) as late:
            fanout.begin(ground.plan(1), (range(ROWS),))
        assert late.value.shards == {NAMES[0], NAMES[2]} and late.value.retryable
    assert not clients[NAMES[0]].ready and clients[NAMES[1]].ready
    ground.connect(kind)
    fanout.begin(ground.plan(2), (range(ROWS),))
    fanout.send(0, 0, ground.query(0, range(ROWS)))
    assert len(fanout.wait(0, 0)) == 3


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("when", ["between two steps", "in the middle"])
def test_all_lost_shards_are_named_and_the_other_keeps_its_connection(ground, kind, when):
    clients = ground.connect(kind)
    fanout = Fanout(clients, ground.work.model)
    all_rows = range(ROWS)
    fanout.begin(ground.plan(1), (all_rows,))
    fanout.send(0, 0, ground.query(0, all_rows))
    fanout.wait(0, 0)
    for name in NAMES[:2]:
        ground.shards[name].stop()
    connection = clients[NAMES[2]]._newest
    with pytest.raises(Lost) as lost:
        if when == "between two steps":
            fanout.begin(ground.plan(2), (all_rows,))
        fanout.send(1, 0, ground.query(1, all_rows))
        fanout.wait(1, 0)
    assert lost.value.shards == set(NAMES[:2])
    fanout.begin(ground.plan(3, {NAMES[2]: ground.reads[NAMES[2]]}), (all_rows,))
    fanout.send(0, 0, ground.query(0, all_rows))
    (state,) = fanout.wait(0, 0)
    assert state.lse[1].isfinite().all() and state.lse[0].isneginf().all()
    assert clients[NAMES[2]]._newest is connection
    assert {link.worker_id: link.failures for link in fanout.links()} == dict(
        zip(NAMES, (1, 1, 0), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_raised_as_it_is(ground, kind):
    """A refusal does not mean that the shard is lost."""
    fanout = Fanout(ground.connect(kind), ground.work.model)
    name = NAMES[1]
    gone = ground.reads | {name: (ground.reads[name][0]._replace(span="y/99"),)}
    with pytest.raises(NotFound, match="y/99"):
        fanout.begin(ground.plan(1, gone), (range(ROWS),))
        fanout.send(0, 0, ground.query(0, range(ROWS)))
        fanout.wait(0, 0)


def test_a_worker_that_is_unknown_is_lost(ground):
    fanout = Fanout({}, ground.work.model)
    with pytest.raises(Lost) as lost:
        fanout.begin(ground.plan(1), (range(ROWS),))
    assert lost.value.shards <= set(NAMES)


def test_an_error_of_a_client_names_its_shard(ground, monkeypatch):
    clients = ground.connect(Transport.IN_PROCESS)
    fanout = Fanout(clients, ground.work.model)

    def fail(*_, **__):
        raise TransportError("broken")

    for name in NAMES[:2]:
        monkeypatch.setattr(clients[name], "wait", fail)
    fanout.begin(ground.plan(1), (range(ROWS),))
    fanout.send(0, 0, ground.query(0, range(ROWS)))
    with pytest.raises(Lost, match="broken") as lost:
        fanout.wait(0, 0)
    assert lost.value.shards == set(NAMES[:2])


def test_one_deadline_is_paid_once_for_all(ground, monkeypatch):
    """The deadline counts from the beginning of the wait: if the first shard is late, no time is left for the
    others."""
    clients = ground.connect(Transport.IN_PROCESS)
    fanout = Fanout(clients, ground.work.model)
    clock, given = SimpleNamespace(now_s=100.0), []

    def late(_, *, deadline_s, **options):
        given.append(deadline_s)
        clock.now_s += deadline_s
        raise Late("no answer", shards=())

    for client in clients.values():
        monkeypatch.setattr(client, "wait", late)
    fanout.begin(ground.plan(1), (range(ROWS),))
    for module in (channel, fanout_module):
        monkeypatch.setattr(module, "perf_counter", lambda: clock.now_s)
    fanout.send(0, 0, ground.query(0, range(ROWS)))
    clock.now_s += 5  # time between send and wait does not count: the shards may have been stopped too
    with pytest.raises(Late) as failed:
        fanout.wait(0, 0)
    assert failed.value.shards == set(NAMES)
    assert given == [1.0, 0.0, 0.0]


def test_the_order_of_waits_is_in_process_then_native_then_grpc(ground):
    fanout = Fanout(ground.connect("mixed"), ground.work.model)
    fanout.begin(ground.plan(1), (range(ROWS),))
    channels = channels_to(fanout._requests, ground.work.model)
    workers = [[request.worker for request in each.requests] for each in channels]
    assert workers == [[name] for name in NAMES]
