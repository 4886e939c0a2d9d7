"""Tests of a shard that is lost in the middle of a step: its replicas are read instead, with the same bits,
or the step fails and can run again."""

import pytest
import torch

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.plan.step_plan import Read, Replica, ShardStep, StepPlan
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import Late, Lost, NotFound, TransportError
from farshore.ids import SequenceId, SpanId, WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore

A, B, C = (WorkerId(name) for name in "abc")
ROWS = 3
SPANS = {A: [(0, 20), (60, 80)], B: [(20, 60)]}
"""The position ranges at each worker; every row reads all of them."""
ROUNDING = {"rtol": 0.0, "atol": 2e-6}
"""The tolerance between float32 states that were computed by different workers over different ranges."""


def reads(work, clients, replicas_at):
    """The reads by worker. A's span number i has replicas at the workers ``replicas_at[i]``."""
    by_worker = {}
    for worker, ranges in SPANS.items():
        for index, (first, last) in enumerate(ranges):
            read = work.sealed_span(clients[worker].store, "x", first, last)._replace(rows=range(ROWS))
            if worker == A:
                replicas = [
                    Replica(at, work.sealed_span(clients[at].store, "x", first, last).span)
                    for at in replicas_at[index]
                ]
                read = read._replace(replicas=tuple(replicas))
            by_worker.setdefault(worker, []).append(read)
    return {worker: tuple(worker_reads) for worker, worker_reads in by_worker.items()}


def run(work, fanout, all_reads, *, step, batches=(range(0, 2), range(2, ROWS)), during=lambda frame: None):
    """Runs a step, all micro-batches of a layer at a time. Returns the states of each frame. Calls
    ``during(frames)`` after each send, with the number of frames sent."""
    sequence = SequenceId("x")
    plan = StepPlan(
        step=step,
        groups=3,
        sequences=(sequence,) * ROWS,
        positions=(80, 81, 82),
        epochs={sequence: work.owner},
        reads=(all_reads,),
    )
    fanout.begin(plan, batches)
    states, sent = [], 0
    for layer in range(work.layers):
        for index, batch in enumerate(batches):
            fanout.send(layer, index, work.query(rows=len(batch), seed=layer))
            sent += 1
            during(sent)
        for index in range(len(batches)):
            states.append([tuple(field.clone() for field in state) for state in fanout.wait(layer, index)])
    return states


def assert_same(states, expected):
    for found, due in zip(states, expected, strict=True):
        for (o, lse), (due_o, due_lse) in zip(found, due, strict=True):
            assert torch.equal(o, due_o) and torch.equal(lse, due_lse)


@pytest.fixture(scope="module")
def holder(worker_process):
    """A process that holds replicas and stays alive."""
    process = worker_process(worker=B)
    yield process
    process.kill()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("transport", "what", "sent"),
    [
        (Transport.SHARED_MEMORY, "kill", 3),
        (Transport.SHARED_MEMORY, "freeze", 0),
        (Transport.TCP, "kill", 1),
        (Transport.TCP, "freeze", 3),
        (Transport.TCP, "restart", 0),
        (Transport.GRPC, "kill", 3),
        (Transport.GRPC, "freeze", 1),
    ],
)
def test_a_process_that_is_lost(holder, start_process, connect, work, transport, what, sent):
    """The process is lost after ``sent`` frames of the step. The holder of the replicas also serves its own
    share of the step."""
    shards = {A: start_process(worker=A), B: holder}
    clients = {worker: connect(shard.address, transports=(transport,)) for worker, shard in shards.items()}
    clients[B].second_connection()
    for client in clients.values():
        client.connect()
    fanout = Fanout(clients, work.model)
    all_reads = reads(work, clients, [(B,), (B,)])
    expected = run(work, fanout, all_reads, step=1)

    def during(frame):
        if frame == sent:
            getattr(shards[A], what)()

    during(0)
    assert_same(run(work, fanout, all_reads, step=2, during=during), expected)
    # The lost shard is not asked again for a while: a frozen one would cost a deadline each time.
    assert_same(run(work, fanout, all_reads, step=3), expected)
    assert {link.worker_id: link.failures for link in fanout.links()} == {A: 1, B: 0}


@pytest.mark.parametrize("transport", [Transport.TCP])
def test_without_replicas_the_step_fails_and_runs_again_when_the_spans_are_back(
    holder, start_process, connect, work
):
    shards = {A: start_process(worker=A), B: holder}
    clients = {worker: connect(shard.address) for worker, shard in shards.items()}
    for client in clients.values():
        client.connect()
    fanout = Fanout(clients, work.model)
    all_reads = reads(work, clients, [(B,), ()])
    expected = run(work, fanout, all_reads, step=1)
    shards[A].restart()
    with pytest.raises(Lost) as lost:
        run(work, fanout, all_reads, step=2)
    with pytest.raises(Late) as late:
        run(work, fanout, all_reads, step=3)
    assert lost.value.shards == late.value.shards == {A}
    clients[A].connect()
    with pytest.raises(NotFound):  # the restarted process has none of the spans
        run(work, fanout, all_reads, step=3)
    clients[A] = connect(shards[A].address)
    clients[A].connect()
    fanout = Fanout(clients, work.model)
    all_reads = reads(work, clients, [(), ()])
    assert_same(run(work, fanout, all_reads, step=4), expected)


class LocalShards:
    """Three shards in this process, with clients that can be made to fail."""

    def __init__(self, work):
        self.stores = {worker: LocalStore(worker=worker, arena=Arena(8 << 20)) for worker in (A, B, C)}
        self.clients = {
            worker: BreakingClient(worker, store, work.model) for worker, store in self.stores.items()
        }


class BreakingClient(InProcessClient):
    """Raises TransportError in the calls named in ``broken``."""

    transport = bulk_transport = Transport.TCP
    broken = frozenset()

    def _check(self, call):
        if call in self.broken:
            raise TransportError(f"broken in {call}")

    def begin(self, step, **options):
        self._check("begin")
        super().begin(step, **options)

    def send(self, *args):
        self._check("send")
        return super().send(*args)

    def wait(self, *args, **options):
        self._check("wait")
        return super().wait(*args, **options)

    def second_connection(self):
        second_connection = BreakingClient(self._worker, self.store, self._model)
        second_connection.broken = self.broken
        return second_connection


@pytest.mark.parametrize("call", ["begin", "send", "wait"])
@pytest.mark.parametrize("replicas_at", [[(B,), (B,)], [(C,), (C,)], [(B, C), (C,)], [(B,), (C,)]])
def test_replicas_at_one_worker_or_at_several(work, call, replicas_at):
    local = LocalShards(work)
    fanout = Fanout(local.clients, work.model)
    all_reads = reads(work, local.clients, replicas_at)
    expected = merged(run(work, fanout, all_reads, step=1))
    local.clients[A].broken = {call}
    found = run(work, fanout, all_reads, step=2)
    torch.testing.assert_close(merged(found), expected, **ROUNDING)


def test_a_replica_may_break_too(work):
    local = LocalShards(work)
    all_reads = reads(work, local.clients, [(C, B), (C, B)])
    expected = merged(run(work, Fanout(local.clients, work.model), all_reads, step=1))
    local.clients[A].broken = {"wait"}
    for call in ("begin", "send", "wait"):
        local.clients[C].broken = {call}
        found = run(work, Fanout(local.clients, work.model), all_reads, step=2)
        torch.testing.assert_close(merged(found), expected, **ROUNDING)


def test_when_every_copy_is_gone_the_step_fails(work):
    local = LocalShards(work)
    fanout = Fanout(local.clients, work.model)
    all_reads = reads(work, local.clients, [(C,), (C,)])
    for worker in (A, C):
        local.clients[worker].broken = {"wait"}
    with pytest.raises(Lost) as lost:
        run(work, fanout, all_reads, step=1)
    assert lost.value.shards == {C}, "C had taken over A's reads"


def test_a_second_connection_that_is_missing_is_late_and_no_reason_to_avoid_the_shard(
    start_shard, connect, work
):
    shards = {worker: start_shard(worker=worker) for worker in (A, B)}
    clients = {worker: connect(shard.address) for worker, shard in shards.items()}
    for client in clients.values():
        client.connect()
    fanout = Fanout(clients, work.model)
    all_reads = reads(work, clients, [(B,), (B,)])
    expected = run(work, fanout, all_reads, step=1)
    shards[A].stop()
    with pytest.raises(Late) as late:
        run(work, fanout, all_reads, step=2)
    assert late.value.shards == {B}
    assert not clients[B].ready
    clients[B].connect()
    assert clients[B].ready
    assert_same(run(work, fanout, all_reads, step=3), expected)


def merged(states):
    """o of each frame, merged over all shards in float64. The result does not depend on which shard read
    what."""
    outs = []
    for shards in states:
        lse = torch.stack([lse.double() for _, lse in shards])
        weights = (lse - lse.logsumexp(0)).exp().unsqueeze(-1)
        outs.append((weights * torch.stack([o.double() for o, _ in shards])).sum(0))
    return torch.cat(outs)


def test_reads_go_to_one_replica_where_one_has_all():
    first, second = (
        Read(SpanId(name), 0, at, at + 10, 0, 3, range(1), SequenceId("a"), replicas)
        for name, at, replicas in (
            ("p", 0, (Replica(B, SpanId("p-b")), Replica(C, SpanId("p-c")))),
            ("q", 10, (Replica(C, SpanId("q-c")),)),
        )
    )
    step = ShardStep(1, (0,), (20,), 0, 3, ((first, second),), (range(1),))
    (at_c,) = step.on_replicas({B, C}).values()
    assert [read.span for read in at_c.reads[0]] == ["p-c", "q-c"]
    assert step.on_replicas({B}) is None and step.on_replicas(set()) is None
    alone = ShardStep(1, (0,), (20,), 0, 3, ((first,),), (range(1),))
    assert list(alone.on_replicas({B, C})) == [B] and list(alone.on_replicas({C})) == [C]
    assert alone.work == 10 * 3
