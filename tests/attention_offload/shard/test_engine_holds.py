"""Holds are leased to an engine's incarnation: expiry, complete lists, pauses, stale calls. The test sets the
clock."""

import threading

import pytest

from farshore.attention_offload.base import Caller
from farshore.attention_offload.shard import engine_holds
from farshore.attention_offload.shard.engine_holds import LEASE_S, MOST_ENGINES, EngineHolds
from farshore.errors import Cancelled, InvalidRequest, NotFound, Overloaded
from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore

DEADLINE_S = 60.0
A, B, C = (SequenceId(name) for name in "abc")


class LeasedStore:
    """A store, the leases on its holds, and a clock that the test sets."""

    def __init__(self, work):
        self.work = work
        self.now_s = 1000.0
        self.store = LocalStore(worker=WorkerId("shard"), arena=Arena(1 << 20))
        self.holds = EngineHolds(self.store, clock=lambda: self.now_s)
        self.sent_ns = 0

    def caller(self, engine):
        self.sent_ns += 1
        return Caller(engine, self.sent_ns)

    def create(self, engine, sequence, *, epoch=None, caller=None, tokens=20):
        epoch = epoch or self.work.owner
        with self.holds.changing(caller or self.caller(engine), sequence, epoch):
            return self.store.create(
                self.work.key(sequence), capacity_tokens=tokens, layout=self.work.layout, epoch=epoch
            )

    def seal(self, span, sequence, *, blocks=()):
        for layer in range(self.work.layers):
            self.store.write(span, layer, 0, *self.work.tokens(20), sequence=sequence, epoch=self.work.owner)
        self.store.seal(span, 20, sequence=sequence, epoch=self.work.owner, blocks=blocks)

    def beat(self, engine, wanted=None):
        return self.holds.beat(self.caller(engine), wanted)

    def pass_s(self, seconds):
        """Advances the clock second by second, with a tick each."""
        for _ in range(int(seconds)):
            self.now_s += 1
            self.holds.tick()

    def spans(self):
        return {info.span for info in self.store.announce() if info.holders}

    @property
    def is_empty(self):
        usage = self.store.usage()
        return not self.store.sequences() and usage.available_bytes == usage.budget_bytes


@pytest.fixture
def leased(work):
    leased = LeasedStore(work)
    yield leased
    leased.store.check_integrity()


def test_an_engine_that_falls_silent_loses_its_holds_and_no_other_does(leased):
    lost = leased.create("dies", A)
    kept = leased.create("lives", B)
    leased.pass_s(LEASE_S - 1)
    leased.beat("lives")
    assert leased.spans() == {lost, kept}
    leased.pass_s(1)
    assert leased.spans() == {kept} and leased.holds.engines() == ["lives"]
    leased.pass_s(LEASE_S)
    assert leased.is_empty and leased.holds.engines() == []


@pytest.mark.parametrize("call", ["beat", "create", "renew"])
def test_any_call_renews_the_lease(leased, call):
    span = leased.create("engine", A)
    for _ in range(5):
        leased.pass_s(LEASE_S - 1)
        {
            "beat": lambda: leased.beat("engine"),
            "create": lambda: leased.create("engine", B, tokens=1),
            "renew": lambda: leased.holds.renew("engine"),
        }[call]()
    assert span in leased.spans()
    leased.pass_s(LEASE_S)
    assert leased.is_empty


def test_a_lease_ends_to_the_second_and_not_before(leased):
    leased.create("engine", A)
    leased.pass_s(LEASE_S - 1)
    assert not leased.is_empty
    leased.pass_s(1)
    assert leased.is_empty


def test_a_dead_engines_named_blocks_stay_as_cache_and_unsealed_spans_go(leased):
    named = leased.create("dies", A)
    leased.seal(named, A, blocks=[PrefixBlock(bytes(32), tuple(range(16)), 0)])
    leased.create("dies", A)
    bare = leased.create("dies", B)
    leased.seal(bare, B)
    leased.pass_s(LEASE_S)
    assert [(info.span, info.holders) for info in leased.store.announce()] == [(named, 0)]
    assert leased.is_empty


def test_what_another_engine_holds_of_the_same_span_stays(leased):
    span = leased.create("dies", A)
    with leased.holds.changing(leased.caller("lives"), B, leased.work.owner):
        leased.store.hold([span], sequence=B, epoch=leased.work.owner)
    leased.pass_s(LEASE_S - 1)
    leased.beat("lives")
    leased.pass_s(1)
    assert leased.spans() == {span} and leased.store.sequences() == {B}


def test_a_sequence_that_went_on_elsewhere_under_a_newer_epoch_stays(leased):
    """Its first engine is dead. Holds of its next engine stay, also on spans that the first one held."""
    shared, old = leased.create("dies", A), leased.create("dies", A)
    new = leased.create("lives", A, epoch=leased.work.new)
    with leased.holds.changing(leased.caller("lives"), A, leased.work.new):
        leased.store.hold([shared], sequence=A, epoch=leased.work.new)
    leased.pass_s(LEASE_S - 1)
    leased.beat("lives")
    leased.pass_s(1)
    assert leased.spans() == {shared, new}
    with pytest.raises(NotFound):
        leased.store.look_up(old, holder=A)


def test_holds_of_two_engines_are_dropped_with_the_last_of_them(leased):
    """Both engines use one sequence in one epoch, as after a resubmission without a new epoch."""
    first, second = leased.create("one", A), leased.create("two", A)
    leased.beat("one", {})
    assert leased.spans() == {first, second}
    leased.pass_s(LEASE_S - 1)
    leased.beat("two")
    leased.pass_s(1)
    assert leased.holds.engines() == ["two"] and leased.spans() == {first, second}
    leased.beat("two", {(A, leased.work.owner): [second]})
    assert leased.spans() == {second}
    leased.pass_s(LEASE_S)
    assert leased.is_empty


def test_a_complete_list_drops_the_holds_that_it_does_not_name(leased):
    wanted, _, _ = (leased.create("engine", sequence) for sequence in (A, A, B))
    others = leased.create("other", C)
    named = {(A, leased.work.owner): [wanted], (C, leased.work.owner): [others]}
    assert not leased.beat("engine", named)
    assert leased.spans() == {wanted, others}
    assert not leased.beat("engine", named), "the same again"
    assert not leased.beat("engine", {})
    assert leased.spans() == {others}, "a list cannot drop another engine's holds"


def test_an_incomplete_beat_drops_nothing(leased):
    span = leased.create("engine", A)
    assert leased.beat("engine"), "it has never sent a list"
    assert leased.spans() == {span}


def test_a_call_that_was_sent_before_the_list_and_comes_after_it_is_refused(leased):
    """As after a pause: the engine gave the call up, so its list does not name what the call creates."""
    stale = [leased.caller("engine") for _ in range(2)]
    leased.beat("engine", {})
    for caller in stale:
        with pytest.raises(Cancelled):
            leased.create("engine", A, caller=caller)
    assert leased.is_empty
    leased.create("engine", A)
    leased.create("other", B, caller=Caller("other", 0))


def test_a_list_that_was_sent_before_a_call_and_comes_after_it_only_renews(leased):
    stale = leased.caller("engine")
    span = leased.create("engine", A)
    assert leased.holds.beat(stale, {})
    assert leased.spans() == {span}
    assert not leased.beat("engine", {})
    assert leased.is_empty


def test_a_paused_shard_drops_no_hold_and_asks_every_engine_for_a_list(leased):
    spans = {leased.create("one", A), leased.create("two", B)}
    for engine in ("one", "two"):
        leased.beat(engine, {(A, leased.work.owner): spans, (B, leased.work.owner): spans})
        assert not leased.beat(engine)
    leased.now_s += 10 * LEASE_S
    leased.holds.tick()
    assert leased.spans() == spans
    leased.pass_s(LEASE_S - 1)
    assert leased.spans() == spans, "a full new term"
    assert leased.beat("one") and leased.beat("two") and leased.beat("one"), "until it is answered"
    assert not leased.beat("one", {})
    assert not leased.beat("one")
    assert leased.beat("two")


def test_a_call_that_comes_before_the_ticker_notices_the_pause_too(leased):
    span = leased.create("engine", A)
    leased.beat("engine", {(A, leased.work.owner): [span]})
    other = leased.create("other", B)
    leased.now_s += 10 * LEASE_S
    assert leased.beat("engine"), "the very first answer after a pause"
    leased.holds.tick()
    assert leased.spans() == {span, other}


def test_ended_sequences_are_forgotten(leased):
    """A lease must not grow with every request."""
    for i in range(50):
        name = SequenceId(f"s{i}")
        leased.create("engine", name, tokens=1)
        with leased.holds.changing(leased.caller("engine"), name, leased.work.owner):
            leased.store.drop_sequence(name, epoch=leased.work.owner)
    leased.create("engine", A)
    leased.pass_s(1)
    (lease,) = leased.holds._leases.values()
    assert list(lease.epochs) == [A]


def test_engines_are_bounded_and_named(leased):
    for i in range(MOST_ENGINES):
        leased.beat(f"engine {i}")
    with pytest.raises(Overloaded):
        leased.beat("one more")
    leased.beat("engine 0")
    leased.pass_s(LEASE_S)
    leased.beat("one more")
    for name in ("", "x" * 10_000):
        with pytest.raises(InvalidRequest):
            leased.beat(name)


def test_calls_of_one_engine_exclude_each_other_within_a_deadline(leased, monkeypatch):
    monkeypatch.setattr(engine_holds, "CALL_WAIT_S", 0.01)
    with leased.holds.changing(leased.caller("engine"), A, leased.work.owner):
        with pytest.raises(Overloaded):
            leased.beat("engine", {})
        leased.beat("other")
        leased.now_s += 2
        leased.holds.tick()  # Skips the locked lease.
    leased.beat("engine", {})


def test_a_call_that_waits_while_the_lease_expires_gets_a_new_lease(leased):
    """The lease expires after the call has found it and before the call has its lock."""
    leased.create("engine", A)
    lease = leased.holds._leases["engine"]
    began, results = threading.Event(), []

    def call():
        began.set()
        results.append(leased.create("engine", B))

    with lease.lock:
        thread = threading.Thread(target=call)
        thread.start()
        assert began.wait(DEADLINE_S)
        with leased.holds._lock:
            leased.holds._leases.pop("engine")
        lease.expired = True
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and leased.holds.engines() == ["engine"]
    assert results[0] in leased.spans()
    assert list(leased.holds._leases["engine"].epochs) == [B]


def test_many_engines_and_a_ticker_run_concurrently(leased):
    wrong = []

    def engine(name):
        try:
            for i in range(30):
                sequence = SequenceId(f"{name}/{i}")
                leased.create(name, sequence, tokens=1, caller=Caller(name, 2 * i))
                leased.holds.beat(Caller(name, 2 * i + 1), {} if i % 3 == 2 else None)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=engine, args=(f"e{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        leased.holds.tick()
    assert not wrong
    leased.store.check_integrity()
    leased.pass_s(LEASE_S)
    assert leased.is_empty
