"""The controller's loop over a fake launcher and clock, with a real directory and the real reconciler."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.controller.events import Events
from farshore.controller.launch import Occupant
from farshore.controller.loop import ANNOUNCE_S, ROUND_S, Loop
from farshore.controller.reconcile import MOST_BACKOFF_S, Slot
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import LEASE_S, SETTLE_S, WorkerRecord
from farshore.kvstore.directory.embedded import EmbeddedDirectory

GRACE_S = 5.0


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class FakeRay:
    """A launcher whose workers announce themselves, and suffer what the test does to them."""

    def __init__(self):
        self.taken = {}
        self.frozen = set()
        self.lost_nodes = set()
        self.starts = Counter()
        self._serial = 0

    def occupants(self):
        return dict(self.taken)

    def start(self, slot):
        if slot not in self.taken:
            self._serial += 1
            self.starts[slot] += 1
            self.taken[slot] = Occupant(actor=f"a{self._serial}", node="10.0.0.1", process_id=self._serial)

    def stop(self, slot):
        if slot not in self.frozen:
            self.die(slot)

    def kill(self, slot):
        if slot not in self.lost_nodes:
            self.die(slot)

    def end_in_words(self, occupant):
        return f"(process {occupant.process_id}) ended"

    def die(self, slot):
        self.taken.pop(slot, None)
        self.frozen.discard(slot)
        self.lost_nodes.discard(slot)

    def announce(self, directory):
        for slot, occupant in self.taken.items():
            if slot not in self.frozen:
                directory.renew(record_of(slot, occupant))


def record_of(slot, occupant):
    return WorkerRecord(
        worker=WorkerId(f"{slot}-{occupant.process_id}"),
        kind=slot.kind,
        slot=str(slot),
        address=f"10.0.0.1:{occupant.process_id}",
        host="10.0.0.1",
        process_id=occupant.process_id,
        state="serving",
    )


class FakeProbes:
    """Workers that are frozen have been silent since they were first suspected."""

    def __init__(self, clock, ray):
        self._clock, self._ray = clock, ray
        self._since_s = {}
        self.reading = {}

    def silent_s(self, suspects):
        frozen = {f"{slot}-{self._ray.taken[slot].process_id}" for slot in self._ray.frozen}
        self._since_s = {
            worker: self._since_s.get(worker, self._clock()) for worker in suspects if worker in frozen
        }
        return {worker: self._clock() - since_s for worker, since_s in self._since_s.items()}

    def alive(self):
        return set()

    def readers(self):
        return self.reading


class Cluster:
    def __init__(self, *, dense=1, attention=3):
        self.clock, self.ray = Clock(), FakeRay()
        self.desired = {"dense": dense, "attention": attention}
        self.directory = EmbeddedDirectory(clock=self.clock)
        self.probes = FakeProbes(self.clock, self.ray)
        self.events = Events()
        self.loop = self._loop()

    def _loop(self):
        return Loop(
            desired=lambda: self.desired,
            directory=self.directory,
            launcher=self.ray,
            probes=self.probes,
            events=self.events,
            grace_s=GRACE_S,
            clock=self.clock,
        )

    def restart_controller(self):
        self.directory = EmbeddedDirectory(restarted=True, clock=self.clock)
        self.events = Events()
        self.loop = self._loop()

    def run(self, seconds=0.0):
        for _ in range(max(1, round(seconds / ROUND_S))):
            self.ray.announce(self.directory)
            self.loop.round()
            self.clock.now_s += ROUND_S

    def pause(self, seconds):
        self.clock.now_s += seconds

    def slots(self, kind="attention"):
        return sorted(slot.index for slot in self.ray.taken if slot.kind == kind)

    def kinds(self):
        return [event.kind for event in self.events.since(0)]


@pytest.fixture
def cluster():
    made = Cluster()
    made.run(2)
    return made


def slot(index):
    return Slot("attention", index)


def test_it_starts_what_is_desired_and_tells_who_joined(cluster):
    assert cluster.slots() == [0, 1, 2] and cluster.slots("dense") == [0]
    assert Counter(cluster.kinds()) == {"started": 4, "joined": 4}


def test_a_dead_worker_is_replaced_in_its_slot_in_the_next_round(cluster):
    cluster.ray.die(slot(1))
    cluster.run(2 * ROUND_S)
    assert cluster.slots() == [0, 1, 2]
    assert cluster.kinds()[-3:] == ["lost", "started", "replaced"]


def test_a_frozen_worker_is_killed_after_the_grace_and_replaced(cluster):
    cluster.ray.frozen.add(slot(1))
    cluster.run(LEASE_S + GRACE_S - ROUND_S)
    assert cluster.ray.starts[slot(1)] == 1
    cluster.run(3 * ROUND_S)
    assert cluster.ray.starts[slot(1)] == 2 and cluster.slots() == [0, 1, 2]
    assert {"killed", "lost", "replaced"} <= set(cluster.kinds())


def test_on_a_lost_node_another_slot_is_used_until_the_verdict(cluster):
    for index in (0, 1):
        cluster.ray.frozen.add(slot(index))
        cluster.ray.lost_nodes.add(slot(index))
    cluster.run(LEASE_S + GRACE_S + 4.0)
    assert cluster.slots() == [0, 1, 2, 3, 4]
    for index in (0, 1):
        cluster.ray.die(slot(index))
    cluster.run(2)
    assert cluster.slots() == [2, 3, 4]


def test_a_restarted_controller_starts_nothing_twice(cluster):
    cluster.restart_controller()
    cluster.run(SETTLE_S + 2)
    assert set(cluster.ray.starts.values()) == {1}
    cluster.ray.die(slot(2))
    cluster.run(2)
    assert cluster.slots() == [0, 1, 2]


def test_a_controller_that_was_paused_loses_and_replaces_nobody(cluster):
    cluster.pause(30)
    cluster.run(2 * SETTLE_S)
    assert set(cluster.ray.starts.values()) == {1}
    assert "lost" not in cluster.kinds() and "killed" not in cluster.kinds()


def test_a_surplus_worker_retires_when_nothing_reads_from_it(cluster):
    (worker,) = (
        record.worker for record in cluster.directory.listing().workers if record.slot == str(slot(2))
    )
    cluster.probes.reading = {worker: 1}
    cluster.desired["attention"] = 2
    cluster.run(3)
    assert cluster.slots() == [0, 1, 2] and cluster.directory.listing().closed == {worker}
    cluster.probes.reading = {}
    cluster.run(1)
    assert cluster.slots() == [0, 1]
    assert cluster.kinds()[-1] == "retired"
    cluster.run(2)
    assert "lost" not in cluster.kinds()


def test_a_worker_that_keeps_dying_waits_longer_each_time(cluster):
    for _ in range(8):
        cluster.ray.die(slot(0))
        cluster.run(2)
    assert cluster.ray.starts[slot(0)] < 6
    cluster.run(MOST_BACKOFF_S)
    assert cluster.slots() == [0, 1, 2]


faults = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["die", "freeze", "thaw", "lose node", "verdict"]), st.integers(0, 20)),
        st.tuples(st.sampled_from(["restart", "pause", "wait"]), st.integers(1, 12)),
        st.tuples(st.just("scale"), st.integers(1, 5)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(faults)
def test_any_history_ends_in_the_desired_cluster(history):
    cluster = Cluster()
    cluster.run(1)
    for fault, number in history:
        taken = sorted(cluster.ray.taken)
        chosen = taken[number % len(taken)] if taken else None
        match fault:
            case "die" if chosen:
                cluster.ray.die(chosen)
            case "freeze" if chosen:
                cluster.ray.frozen.add(chosen)
            case "thaw":
                cluster.ray.frozen -= {s for s in cluster.ray.frozen if s not in cluster.ray.lost_nodes}
            case "lose node" if chosen:
                cluster.ray.frozen.add(chosen)
                cluster.ray.lost_nodes.add(chosen)
            case "verdict":
                for lost in list(cluster.ray.lost_nodes):
                    cluster.ray.die(lost)
            case "restart":
                cluster.restart_controller()
            case "pause":
                cluster.pause(float(number))
            case "scale":
                cluster.desired["attention"] = number
        cluster.run(number * ROUND_S if fault == "wait" else 0)
    for lost in list(cluster.ray.lost_nodes):
        cluster.ray.die(lost)
    cluster.run(2 * SETTLE_S + 2 * GRACE_S + ANNOUNCE_S + MOST_BACKOFF_S + 10)
    for kind, count in cluster.desired.items():
        assert len(cluster.slots(kind)) == count
    assert not cluster.ray.frozen
    assert not cluster.directory.listing().closed
    starts = cluster.ray.starts.total()
    cluster.run(5)
    assert cluster.ray.starts.total() == starts


def test_records_of_another_process_in_a_slot_are_not_taken_for_its_own(cluster):
    stale = record_of(slot(0), replace(cluster.ray.taken[slot(0)], process_id=999))
    cluster.directory.renew(stale)
    cluster.run(1)
    assert "lost" not in cluster.kinds()
