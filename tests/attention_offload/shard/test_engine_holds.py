"""Holds belong to an engine's incarnation: leases, complete lists, pauses, stale calls. The clock is the
test's."""

import threading

import pytest

from farshore.attention_offload.base import Caller
from farshore.attention_offload.shard import engine_holds
from farshore.attention_offload.shard.engine_holds import LEASE_S, MOST_ENGINES, EngineHolds, Ticker
from farshore.errors import Cancelled, InvalidRequest, NotFound, Overloaded
from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.prefix import PrefixBlock
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore

DEADLINE_S = 60.0
A, B, C = (SequenceId(name) for name in "abc")


class Ground:
    """A store, its book of engines, and a clock that the test sets."""

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
        """Time goes by, and the ticker is in time."""
        for _ in range(int(seconds)):
            self.now_s += 1
            self.holds.tick()

    def spans(self):
        return {info.span for info in self.store.announce() if info.holders}

    @property
    def is_whole(self):
        usage = self.store.usage()
        return not self.store.sequences() and usage.available_bytes == usage.budget_bytes


@pytest.fixture
def ground(work):
    it = Ground(work)
    yield it
    it.store.check_integrity()


def test_an_engine_that_falls_silent_loses_its_holds_and_no_other_does(ground):
    lost = ground.create("dies", A)
    kept = ground.create("lives", B)
    ground.pass_s(LEASE_S - 1)
    ground.beat("lives")
    assert ground.spans() == {lost, kept}
    ground.pass_s(1)
    assert ground.spans() == {kept} and ground.holds.engines() == ["lives"]
    ground.pass_s(LEASE_S)
    assert ground.is_whole and ground.holds.engines() == []


@pytest.mark.parametrize("call", ["beat", "create", "renew"])
def test_any_call_renews_the_lease(ground, call):
    span = ground.create("engine", A)
    for _ in range(5):
        ground.pass_s(LEASE_S - 1)
        {
            "beat": lambda: ground.beat("engine"),
            "create": lambda: ground.create("engine", B, tokens=1),
            "renew": lambda: ground.holds.renew("engine"),
        }[call]()
    assert span in ground.spans()
    ground.pass_s(LEASE_S)
    assert ground.is_whole


def test_a_lease_ends_to_the_second_and_not_before(ground):
    ground.create("engine", A)
    ground.pass_s(LEASE_S - 1)
    assert not ground.is_whole
    ground.pass_s(1)
    assert ground.is_whole


def test_a_dead_engines_named_blocks_stay_as_cache_and_unsealed_spans_go(ground):
    named = ground.create("dies", A)
    ground.seal(named, A, blocks=[PrefixBlock(bytes(32), tuple(range(16)), 0)])
    ground.create("dies", A)
    bare = ground.create("dies", B)
    ground.seal(bare, B)
    ground.pass_s(LEASE_S)
    assert [(info.span, info.holders) for info in ground.store.announce()] == [(named, 0)]
    assert ground.is_whole


def test_what_another_engine_holds_of_the_same_span_stays(ground):
    span = ground.create("dies", A)
    with ground.holds.changing(ground.caller("lives"), B, ground.work.owner):
        ground.store.hold([span], sequence=B, epoch=ground.work.owner)
    ground.pass_s(LEASE_S - 1)
    ground.beat("lives")
    ground.pass_s(1)
    assert ground.spans() == {span} and ground.store.sequences() == {B}


def test_a_sequence_that_went_on_elsewhere_under_a_newer_epoch_stays(ground):
    """Its first engine is dead; what its next one holds, the same spans too, is not the first one's any
    more."""
    shared, old = ground.create("dies", A), ground.create("dies", A)
    new = ground.create("lives", A, epoch=ground.work.new)
    with ground.holds.changing(ground.caller("lives"), A, ground.work.new):
        ground.store.hold([shared], sequence=A, epoch=ground.work.new)
    ground.pass_s(LEASE_S - 1)
    ground.beat("lives")
    ground.pass_s(1)
    assert ground.spans() == {shared, new}
    with pytest.raises(NotFound):
        ground.store.look_up(old, holder=A)


def test_what_two_engines_brought_goes_with_the_last_of_them(ground):
    """One sequence in one epoch: a resubmission that its gateway did not count, or a test's."""
    first, second = ground.create("one", A), ground.create("two", A)
    ground.beat("one", {})
    assert ground.spans() == {first, second}
    ground.pass_s(LEASE_S - 1)
    ground.beat("two")
    ground.pass_s(1)
    assert ground.holds.engines() == ["two"] and ground.spans() == {first, second}
    ground.beat("two", {(A, ground.work.owner): [second]})
    assert ground.spans() == {second}
    ground.pass_s(LEASE_S)
    assert ground.is_whole


def test_a_complete_list_gives_back_all_that_it_does_not_name(ground):
    wanted, _, _ = (ground.create("engine", it) for it in (A, A, B))
    others = ground.create("other", C)
    named = {(A, ground.work.owner): [wanted], (C, ground.work.owner): [others]}
    assert not ground.beat("engine", named)
    assert ground.spans() == {wanted, others}
    assert not ground.beat("engine", named), "the same again"
    assert not ground.beat("engine", {})
    assert ground.spans() == {others}, "another engine's hold is not this one's to give back"


def test_an_incomplete_beat_gives_nothing_back(ground):
    span = ground.create("engine", A)
    assert ground.beat("engine"), "it has never said what it wants"
    assert ground.spans() == {span}


def test_a_call_that_was_sent_before_the_list_and_comes_after_it_is_refused(ground):
    """As after a pause: the engine gave the call up, and its list doesn't know what would be granted."""
    stale = [ground.caller("engine") for _ in range(2)]
    ground.beat("engine", {})
    for caller in stale:
        with pytest.raises(Cancelled):
            ground.create("engine", A, caller=caller)
    assert ground.is_whole
    ground.create("engine", A)
    ground.create("other", B, caller=Caller("other", 0))


def test_a_list_that_was_sent_before_a_call_and_comes_after_it_only_renews(ground):
    stale = ground.caller("engine")
    span = ground.create("engine", A)
    assert ground.holds.beat(stale, {})
    assert ground.spans() == {span}
    assert not ground.beat("engine", {})
    assert ground.is_whole


def test_a_paused_shard_drops_nobody_and_asks_everybody(ground):
    spans = {ground.create("one", A), ground.create("two", B)}
    for engine in ("one", "two"):
        ground.beat(engine, {(A, ground.work.owner): spans, (B, ground.work.owner): spans})
        assert not ground.beat(engine)
    ground.now_s += 10 * LEASE_S
    ground.holds.tick()
    assert ground.spans() == spans
    ground.pass_s(LEASE_S - 1)
    assert ground.spans() == spans, "a full new term"
    assert ground.beat("one") and ground.beat("two") and ground.beat("one"), "until it is answered"
    assert not ground.beat("one", {})
    assert not ground.beat("one")
    assert ground.beat("two")


def test_a_call_that_comes_before_the_ticker_notices_the_pause_too(ground):
    span = ground.create("engine", A)
    ground.beat("engine", {(A, ground.work.owner): [span]})
    other = ground.create("other", B)
    ground.now_s += 10 * LEASE_S
    assert ground.beat("engine"), "the very first answer after a pause"
    ground.holds.tick()
    assert ground.spans() == {span, other}


def test_ended_sequences_are_forgotten(ground):
    """Else the book would grow with every request."""
    for i in range(50):
        name = SequenceId(f"s{i}")
        ground.create("engine", name, tokens=1)
        with ground.holds.changing(ground.caller("engine"), name, ground.work.owner):
            ground.store.drop_sequence(name, epoch=ground.work.owner)
    ground.create("engine", A)
    ground.pass_s(1)
    (engine,) = ground.holds._leases.values()
    assert list(engine.epochs) == [A]


def test_engines_are_bounded_and_named(ground):
    for i in range(MOST_ENGINES):
        ground.beat(f"engine {i}")
    with pytest.raises(Overloaded):
        ground.beat("one more")
    ground.beat("engine 0")
    ground.pass_s(LEASE_S)
    ground.beat("one more")
    for name in ("", "x" * 10_000):
        with pytest.raises(InvalidRequest):
            ground.beat(name)


def test_calls_of_one_engine_take_turns_and_wait_for_so_long(ground, monkeypatch):
    monkeypatch.setattr(engine_holds, "CALL_WAIT_S", 0.01)
    with ground.holds.changing(ground.caller("engine"), A, ground.work.owner):
        with pytest.raises(Overloaded):
            ground.beat("engine", {})
        ground.beat("other")
        ground.now_s += 2
        ground.holds.tick()  # passes over it
    ground.beat("engine", {})


def test_a_call_that_waits_while_its_engine_is_given_up_begins_anew(ground):
    """The lease ends in the moment between a call's coming in and its turn."""
    ground.create("engine", A)
    engine = ground.holds._leases["engine"]
    began, results = threading.Event(), []

    def call():
        began.set()
        results.append(ground.create("engine", B))

    with engine.lock:
        thread = threading.Thread(target=call)
        thread.start()
        assert began.wait(DEADLINE_S)
        with ground.holds._lock:
            ground.holds._leases.pop("engine")
        engine.expired = True
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and ground.holds.engines() == ["engine"]
    assert results[0] in ground.spans()
    assert list(ground.holds._leases["engine"].epochs) == [B]


def test_many_engines_and_a_ticker_at_once_keep_the_books(ground):
    wrong = []

    def engine(name):
        try:
            for i in range(30):
                sequence = SequenceId(f"{name}/{i}")
                ground.create(name, sequence, tokens=1, caller=Caller(name, 2 * i))
                ground.holds.beat(Caller(name, 2 * i + 1), {} if i % 3 == 2 else None)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=engine, args=(f"e{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ground.holds.tick()
    assert not wrong
    ground.store.check_integrity()
    ground.pass_s(LEASE_S)
    assert ground.is_whole


def test_a_ticker_goes_on_after_an_error_and_stops(monkeypatch):
    monkeypatch.setattr(engine_holds, "TICK_S", 0.001)
    ticks, enough = [], threading.Event()

    def tick():
        ticks.append(None)
        if len(ticks) == 3:
            enough.set()
        raise RuntimeError("once more")

    ticker = Ticker(tick)
    assert enough.wait(DEADLINE_S)
    for _ in range(2):
        ticker.stop()
    assert not any(thread.name == "leases" for thread in threading.enumerate())
