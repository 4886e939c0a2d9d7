"""Shard queues and the pool: calls run in order and off the token loop, and holds survive a silent shard."""

import threading
from concurrent.futures import CancelledError

import pytest

from farshore.attention_offload.base import ShardBeat
from farshore.errors import Full, Late, Lost, TransportError
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kernels.formats import KVFormat
from farshore.kvstore.base import PrefixFound, SpanKey
from farshore.workers.engine.kv.pool import ShardPool, first_error
from farshore.workers.engine.kv.shard_queue import STALLED_S, ShardQueue
from farshore.workers.engine.sequence import Holder

A, B = WorkerId("a"), WorkerId("b")
LAYOUT = KVLayout(1, 1, 1, 1, 8, 8, KVFormat.FLOAT32)
S, T = SequenceId("s"), SequenceId("t")
KEY = SpanKey(sequence=S, layer_class=0, first=0, group0=0, group1=1)
DEADLINE_S = 60.0


class Shard:
    """A shard as its queue sees it: store calls, and answers to beats."""

    def __init__(self, worker=A):
        self.worker = worker
        self.incarnation = "first"
        self.store = self
        self.error = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.held = {}
        self.calls = []
        self.wanted = []
        self.connections = 0
        self.must_reconcile = False

    def _answer(self, name):
        self.calls.append(name)
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error

    def create(self, key, *, capacity_tokens, layout, epoch):
        span = SpanId(f"{self.worker}/{len(self.calls)}")
        self._answer("create")
        self.held.setdefault(key.sequence, set()).add(span)
        return span

    def find_prefix(self, names, *, layer_class):
        self._answer("find")
        return PrefixFound([], available_bytes=60)

    def drop(self, spans, *, sequence, epoch):
        self._answer("drop")
        self.held[sequence] -= set(spans)

    def beat(self, wanted):
        if self.error is not None:
            raise self.error
        if wanted is not None:
            self.wanted.append(wanted)
            kept = {sequence: set(spans) for (sequence, _), spans in wanted.items()}
            self.held = {sequence: spans & kept.get(sequence, set()) for sequence, spans in self.held.items()}
        must, self.must_reconcile = self.must_reconcile and wanted is None, False
        return ShardBeat(self.worker, self.incarnation, 100, 50, 0, must_reconcile=must)

    def connect(self):
        self.connections += 1


@pytest.fixture
def queue_of():
    made = []

    def build(shard, **options):
        news = threading.Event()
        queue = ShardQueue(shard.worker, shard, changed=news.set, **options)
        queue.news = news
        queue.await_first_beat(DEADLINE_S)
        made.append((shard, queue))
        return queue

    yield build
    for shard, queue in made:
        shard.gate.set()
        queue.close()


def until(queue, condition):
    while not condition():
        assert queue.news.wait(DEADLINE_S)
        queue.news.clear()


def create(queue, holder):
    return queue.create(holder, KEY, capacity_tokens=8, layout=LAYOUT)


def test_calls_run_in_order_and_do_not_block_their_callers(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    shard.gate.clear()
    holder = Holder(S, Epoch(1))
    first, order = create(queue, holder), []
    others = [queue.submit(lambda _, n=n: order.append(n)) for n in range(5)]
    assert shard.entered.wait(DEADLINE_S) and not first.done() and not queue.is_idle
    shard.gate.set()
    for call in (first, *others):
        call.result(DEADLINE_S)
    assert order == [0, 1, 2, 3, 4]


def test_a_stall_is_over_when_its_call_has_its_result(queue_of, clock):
    """A caller that looks at the shard as soon as the future is done finds it idle, and places on it."""
    shard = Shard()
    queue = queue_of(shard, clock=clock)
    for error in (None, Full("no room", free_bytes=0)):
        shard.entered.clear()
        shard.gate.clear()
        shard.error = error
        call, found = queue.submit(lambda _: shard._answer("call")), []
        call.add_done_callback(lambda _, found=found: found.append((queue.is_idle, queue.is_placeable)))
        assert shard.entered.wait(DEADLINE_S)
        clock.now_s += STALLED_S + 0.1
        assert not queue.is_placeable
        shard.gate.set()
        call.exception(DEADLINE_S)
        queue.submit(lambda _: shard.gate.wait(DEADLINE_S)).exception(DEADLINE_S)
        assert found == [(True, True)]


def test_a_span_is_dropped_when_the_last_choice_of_its_sequence_releases_it(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    parent, fork = Holder(S, Epoch(1)), Holder(S, Epoch(1))
    span = create(queue, parent).result(DEADLINE_S)
    queue.retain(fork, [span])
    parent.closed = True
    queue.release(parent)
    assert queue.submit(lambda _: dict(shard.held)).result(DEADLINE_S) == {S: {span}}
    assert "drop" not in shard.calls and "hold" not in shard.calls
    fork.closed = True
    queue.release(fork)
    assert queue.submit(lambda _: dict(shard.held)).result(DEADLINE_S) == {S: set()}


def test_a_span_granted_to_a_holder_that_was_closed_meanwhile_is_dropped(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    shard.gate.clear()
    holder = Holder(S, Epoch(1))
    call = create(queue, holder)
    assert shard.entered.wait(DEADLINE_S)
    holder.closed = True
    queue.release(holder)
    shard.gate.set()
    call.result(DEADLINE_S)
    assert queue.submit(lambda _: dict(shard.held)).result(DEADLINE_S) == {S: set()}


def test_a_cancelled_call_is_not_made(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    shard.gate.clear()
    blocking = create(queue, Holder(S, Epoch(1)))
    assert shard.entered.wait(DEADLINE_S)
    made = []
    call = queue.submit(lambda _: made.append(1))
    assert call.cancel()
    shard.gate.set()
    blocking.result(DEADLINE_S)
    queue.submit(lambda _: None).result(DEADLINE_S)
    assert not made
    with pytest.raises(CancelledError):
        call.result()
    assert isinstance(first_error([call]), TransportError)


def test_a_silent_shard_learns_of_drops_when_it_answers(queue_of):
    """A lost reply leaves a span that the engine does not know; it is dropped, too."""
    shard = Shard()
    queue = queue_of(shard)
    kept, released = Holder(S, Epoch(1)), Holder(T, Epoch(2))
    span = create(queue, kept).result(DEADLINE_S)
    queue.create(released, KEY, capacity_tokens=8, layout=LAYOUT).result(DEADLINE_S)
    shard.held.setdefault(S, set()).add(SpanId("a/unknown"))
    shard.error = TransportError("no answer")
    assert isinstance(create(queue, kept).exception(DEADLINE_S), TransportError)
    until(queue, lambda: not queue.is_placeable)
    assert isinstance(create(queue, kept).exception(DEADLINE_S), Late)
    released.closed = True
    queue.release(released)
    until(queue, lambda: queue.is_idle)
    shard.error = None
    until(queue, lambda: queue.is_placeable)
    assert shard.wanted[-1] == {(S, Epoch(1)): [span]}
    assert shard.held[S] == {span}


def test_a_shard_that_must_reconcile_gets_the_wanted_spans(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    holder = Holder(S, Epoch(1))
    span = create(queue, holder).result(DEADLINE_S)
    shard.must_reconcile = True
    until(queue, lambda: bool(shard.wanted))
    assert shard.wanted == [{(S, Epoch(1)): [span]}]


def test_late_frames_make_a_shard_unreadable_until_it_is_connected_again(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    before = shard.connections
    shard.error = TransportError("frozen")
    queue.suspect(TransportError("late"))
    assert not queue.is_readable and not queue.is_placeable and not queue.lost_reason
    shard.error = None
    until(queue, lambda: queue.is_readable)
    assert shard.connections > before


def test_a_shard_is_lost_after_its_grace_and_may_come_back(queue_of, clock):
    shard = Shard()
    queue = queue_of(shard, clock=clock, grace_s=10.0)
    shard.error = TransportError("frozen")
    queue.suspect(TransportError("late"))
    clock.now_s = 9.9
    assert not queue.lost_reason
    clock.now_s = 10.1
    assert "has not answered for 10 s" in queue.lost_reason
    assert isinstance(create(queue, Holder(S, Epoch(1))).exception(DEADLINE_S), Lost)
    shard.error = None
    while not queue.is_readable:
        clock.now_s += 0.2
        queue.news.wait(0.05)
    assert not queue.lost_reason


@pytest.mark.parametrize("changed", [{"worker": B}, {"incarnation": "second"}])
def test_a_shard_is_lost_if_another_process_answers_at_its_address(queue_of, changed):
    shard = Shard()
    queue = queue_of(shard)
    vars(shard).update(changed)
    queue.suspect(TransportError("the connection broke"))
    until(queue, lambda: queue.lost_reason)
    assert "was restarted" in queue.lost_reason and not queue.is_readable


def test_a_shard_that_refuses_connections_is_lost(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    refused = TransportError("connection refused")
    refused.__cause__ = ConnectionRefusedError()
    shard.error = refused
    queue.suspect(TransportError("the connection broke"))
    until(queue, lambda: queue.lost_reason)
    assert "is gone" in queue.lost_reason


def test_a_shard_that_refuses_a_call_is_not_silent(queue_of):
    shard = Shard()
    queue = queue_of(shard)
    shard.error = Full("no room", free_bytes=0)
    call = create(queue, Holder(S, Epoch(1)))
    assert isinstance(call.exception(DEADLINE_S), Full)
    shard.error = None
    assert queue.is_placeable


def test_gather_gives_up_a_stalled_call_and_keeps_the_others():
    clients = {A: Shard(A), B: Shard(B)}
    pool = ShardPool(clients, [A, B])
    pool.await_beats(DEADLINE_S)
    assert pool.budgets() == {A: 100, B: 100} and pool.placeable() == [A, B]
    clients[B].gate.clear()
    calls = {worker: pool[worker].find([bytes(32)], layer_class=0) for worker in clients}
    results, failures = pool.gather(calls)
    assert list(results) == [A] and isinstance(failures[B], Late)
    assert pool.silent() == [B] and pool.may_answer() and not pool.lost()
    clients[B].gate.set()
    calls[B].result(DEADLINE_S)
    assert pool.placeable() == [A, B]
    pool.close()
