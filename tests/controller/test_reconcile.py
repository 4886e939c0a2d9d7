"""The reconciler: single decisions, and convergence after any sequence of faults and changes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.controller.reconcile import (
    KILL_GRACE_S,
    KINDS,
    MOST_BACKOFF_S,
    Deaths,
    Drain,
    Kill,
    Observed,
    Open,
    Process,
    Slot,
    Start,
    Stop,
    backoff_s,
    reconcile,
)
from farshore.ids import WorkerId

ROUND_S = 0.5


def attention(index, **fields):
    slot = Slot("attention", index)
    return Process(slot=slot, **{"worker": WorkerId(f"{slot}-a")} | fields)


def decide(count, *processes, now_s=100.0, **observed):
    found = Observed(processes={process.slot: process for process in processes}, **observed)
    return reconcile({"attention": count}, found, now_s)


def test_missing_workers_start_in_the_lowest_free_slots():
    assert decide(4, attention(1), attention(3)) == (
        Start(Slot("attention", 0)),
        Start(Slot("attention", 2)),
    )


def test_a_complete_cluster_needs_nothing():
    assert decide(2, attention(0), attention(1, worker=None)) == ()


def test_what_is_too_much_drains_first_and_stops_when_nothing_reads_it():
    assert decide(1, attention(0), attention(2)) == (Drain(Slot("attention", 2), WorkerId("attention-2-a")),)
    for readers in (3, None):
        assert decide(1, attention(0), attention(2, closed=True, readers=readers)) == ()
    assert decide(1, attention(0), attention(2, closed=True)) == (Stop(Slot("attention", 2)),)
    assert decide(1, attention(0), attention(2, worker=None)) == (Stop(Slot("attention", 2)),)
    assert decide(1, attention(0), attention(2, worker=None, may_serve=True)) == ()
    assert decide(1, attention(0), attention(2, closed=True, readers=3, overdue=True)) == (
        Stop(Slot("attention", 2)),
    )


def test_a_worker_that_leaves_drains_and_is_replaced_in_another_slot_at_once():
    drain, start = Drain(Slot("attention", 1), WorkerId("attention-1-a")), Start(Slot("attention", 2))
    leaving = attention(1, leaving=True)
    assert decide(2, attention(0), leaving) == (drain, start)
    closed = replace(leaving, closed=True, readers=3)
    assert decide(2, attention(0), closed) == (start,)
    assert decide(2, attention(0), closed, attention(2)) == ()
    assert decide(2, attention(0), replace(closed, readers=0), attention(2)) == (Stop(leaving.slot),)
    # Needed less, it leaves all the same; needed more, it stays closed.
    assert decide(1, attention(0), replace(closed, readers=0)) == (Stop(leaving.slot),)
    assert decide(3, attention(0), closed, attention(2)) == (Start(Slot("attention", 3)),)


def test_a_frozen_worker_that_leaves_is_killed_and_holds_no_replacement_back():
    kill = Kill(Slot("attention", 0))
    assert decide(1, attention(0, leaving=True, frozen=True)) == (kill, Start(Slot("attention", 1)))


def test_a_closed_worker_that_is_needed_again_opens():
    assert decide(2, attention(0), attention(1, closed=True)) == (
        Open(Slot("attention", 1), WorkerId("attention-1-a")),
    )


def test_a_frozen_worker_is_killed_and_replaced_elsewhere_only_if_its_slot_stays_taken():
    kill = Kill(Slot("attention", 0))
    frozen = attention(0, frozen=True)
    assert decide(2, frozen, attention(1)) == (kill,)
    killed = replace(frozen, killed_s=100.0)
    assert decide(2, killed, attention(1), now_s=100.0 + KILL_GRACE_S / 2) == (kill,)
    assert decide(2, killed, attention(1), now_s=100.0 + KILL_GRACE_S) == (kill, Start(Slot("attention", 2)))


def test_a_slot_that_keeps_dying_waits_and_no_other_takes_its_turn():
    slot = Slot("attention", 0)
    assert decide(1, deaths={slot: Deaths(1, 100.0)}) == (Start(slot),)
    assert decide(1, deaths={slot: Deaths(4, 100.0)}, now_s=103.9) == ()
    assert decide(1, deaths={slot: Deaths(4, 100.0)}, now_s=104.0) == (Start(slot),)
    assert backoff_s(1000) == MOST_BACKOFF_S


def test_nothing_is_done_while_silence_proves_nothing():
    assert decide(3, attention(0, frozen=True), settled=False) == ()


class World:
    """Slots and processes that obey actions, and suffer what the test draws."""

    def __init__(self):
        self.now_s = 0.0
        self.processes: dict[Slot, Process] = {}
        self.unreachable: set[Slot] = set()
        self.deaths: dict[Slot, Deaths] = {}
        self.started = 0

    def round(self, desired, *, settled=True):
        found = Observed(processes=dict(self.processes), deaths=dict(self.deaths), settled=settled)
        actions = reconcile(desired, found, self.now_s)
        for action in actions:
            self.act(action)
        self.now_s += ROUND_S
        return actions

    def act(self, action):
        slot = action.slot
        match action:
            case Start():
                assert slot not in self.processes, f"{slot} was started twice"
                self.started += 1
                worker = WorkerId(f"{slot}-{self.started}")
                self.processes[slot] = Process(slot=slot, worker=worker)
            case Stop():
                process = self.processes.pop(slot)
                assert process.readers == 0 or process.overdue, f"{slot} was stopped while it was read from"
            case Kill():
                process = self.processes[slot]
                assert process.frozen
                if slot in self.unreachable:
                    self.processes[slot] = replace(process, killed_s=process.killed_s or self.now_s)
                else:
                    self.die(slot)
            case Drain():
                self.processes[slot] = replace(self.processes[slot], closed=True)
            case Open():
                self.processes[slot] = replace(self.processes[slot], closed=False)

    def die(self, slot):
        self.processes.pop(slot, None)
        self.unreachable.discard(slot)
        count = self.deaths[slot].count + 1 if slot in self.deaths else 1
        self.deaths[slot] = Deaths(count, self.now_s)

    def suffer(self, event, index):
        if not self.processes:
            return
        slot = sorted(self.processes)[index % len(self.processes)]
        process = self.processes[slot]
        match event:
            case "crash":
                self.die(slot)
            case "freeze":
                self.processes[slot] = replace(process, frozen=True)
            case "lose node":
                self.processes[slot] = replace(process, frozen=True)
                self.unreachable.add(slot)
            case "verdict":
                if slot in self.unreachable:
                    self.die(slot)
            case "return":
                if slot in self.unreachable:
                    self.unreachable.discard(slot)
                    self.processes[slot] = replace(process, frozen=False, killed_s=None)
            case "drain":
                self.processes[slot] = replace(process, leaving=True)
            case "overdue" if process.closed:
                self.processes[slot] = replace(process, overdue=True)
            case "read":
                self.processes[slot] = replace(process, readers=1)
            case "finish":
                self.processes[slot] = replace(process, readers=0)

    def serving(self, kind):
        return sum(
            p.slot.kind == kind and not (p.frozen or p.closed or p.leaving) and p.worker is not None
            for p in self.processes.values()
        )


EVENTS = ("crash", "freeze", "lose node", "verdict", "return", "read", "finish", "drain", "overdue")
changes = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(EVENTS), st.integers(0, 30)),
        st.tuples(st.just("scale"), st.sampled_from(KINDS), st.integers(0, 6)),
        st.tuples(st.just("pause"), st.integers(1, 5)),
        st.tuples(st.just("rounds"), st.integers(1, 5)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(changes)
def test_any_history_ends_in_the_desired_state_and_then_rests(history):
    world, desired = World(), {"dense": 1, "attention": 3}
    for change, *arguments in history:
        if change == "scale":
            desired[arguments[0]] = arguments[1]
        elif change in ("pause", "rounds"):
            for _ in range(arguments[0]):
                world.round(desired, settled=change == "rounds")
        else:
            world.suffer(change, *arguments)
            world.round(desired)
    for slot, process in world.processes.items():
        world.processes[slot] = replace(process, readers=0)
    # The longest wait is a back-off; a death of a slot doubles it.
    for _ in range(int((KILL_GRACE_S + MOST_BACKOFF_S) / ROUND_S) + 5):
        world.round(desired)
    for kind in KINDS:
        assert world.serving(kind) == desired[kind]
    assert all(isinstance(action, Kill) for action in world.round(desired))
    assert len(world.processes) - len(world.unreachable) == sum(desired.values())


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_observation_does_not_matter(order):
    processes = [attention(0), attention(1, frozen=True), attention(4), attention(5, closed=True)]
    assert decide(2, *processes[::order]) == decide(2, *processes)
