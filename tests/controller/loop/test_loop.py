"""The controller's loop over a fake launcher and clock, with a real directory and the real reconciler."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from farshore.benchmarks.cluster.fake import record_of
from farshore.controller.desired import Desired
from farshore.controller.events import Events
from farshore.controller.launch.launcher import Occupant
from farshore.controller.loop.loop import ROUND_S, Loop
from farshore.controller.loop.observer import ANNOUNCE_S, HEARD_S
from farshore.controller.reconcile import MOST_BACKOFF_S, Slot
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import LEASE_S, SETTLE_S
from farshore.kvstore.directory.embedded import EmbeddedDirectory

GRACE_S = 5.0
DRAIN_S = 20.0


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class FakeRay:
    """A launcher whose workers announce themselves, and suffer what the test does to them."""

    def __init__(self):
        self.taken = {}
        self.frozen = set()
        self.told = set()
        self.graces = []
        self.lost_nodes = set()
        self.failing = {}
        """Slot -> why each of its workers fails while it loads."""
        self.starts = Counter()
        self._serial = 0

    def occupants(self):
        return dict(self.taken)

    def start(self, slot):
        if slot not in self.taken:
            self._serial += 1
            self.starts[slot] += 1
            self.taken[slot] = Occupant(actor=f"a{self._serial}", node="10.0.0.1", process_id=self._serial)

    def stop(self, slot, *, grace_s):
        self.graces.append(grace_s)
        if slot not in self.frozen:
            self.die(slot)

    def kill(self, slot):
        if slot not in self.lost_nodes:
            self.die(slot)

    def answering(self, slots):
        return [slot for slot in slots if slot not in self.frozen]

    def end_in_words(self, occupant):
        return f"(process {occupant.process_id}) ended"

    def die(self, slot):
        self.taken.pop(slot, None)
        self.frozen.discard(slot)
        self.told.discard(slot)
        self.lost_nodes.discard(slot)

    def announce(self, directory):
        for slot, occupant in self.taken.items():
            if slot not in self.frozen:
                state = "draining" if slot in self.told else "serving"
                state = "failed" if slot in self.failing else state
                record = replace(record_of(slot, occupant), state=state, failure=self.failing.get(slot, ""))
                directory.renew(record)


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

    def readers(self, engines):
        return self.reading


class Cluster:
    def __init__(self, *, dense=1, attention=3, ray=None):
        self.clock, self.ray = Clock(), ray or FakeRay()
        self.configured = {"dense": dense, "attention": attention}
        self.stored = []
        self.desired = self._desired()
        self.directory = EmbeddedDirectory(clock=self.clock)
        self.probes = FakeProbes(self.clock, self.ray)
        self.events = Events()
        self.loop = self._loop()

    def _desired(self):
        return Desired(
            self.configured,
            load=lambda: json.loads(self.stored[-1]) if self.stored else None,
            store=self._store,
            placement="offload",
            controller="c",
            restarted=bool(self.stored),
            clock=self.clock,
        )

    def _store(self, state):
        self.stored.append(json.dumps(state))

    def _loop(self):
        return Loop(
            desired=self.desired,
            directory=self.directory,
            launcher=self.ray,
            probes=self.probes,
            events=self.events,
            grace_s=GRACE_S,
            drain_timeout_s=DRAIN_S,
            clock=self.clock,
        )

    def restart_controller(self, *, keeps_directory=False):
        """``keeps_directory``: it outlives its controller, as Redis does."""
        if not keeps_directory:
            self.directory = EmbeddedDirectory(restarted=True, clock=self.clock)
        self.events = Events()
        self.desired = self._desired()
        self.loop = self._loop()

    def configure(self, attention):
        """A controller that a driver starts with a changed configuration."""
        self.configured = self.configured | {"attention": attention}
        self.restart_controller()
        self.desired.configure(self.configured)

    def worker(self, slot):
        return WorkerId(f"{slot}-{self.ray.taken[slot].process_id}")

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
    worker = cluster.worker(slot(2))
    cluster.probes.reading = {worker: 1}
    cluster.desired.scale({"attention": 2})
    cluster.run(3)
    listing = cluster.directory.listing()
    assert cluster.slots() == [0, 1, 2] and listing.closed == listing.draining == {worker}
    cluster.probes.reading = {}
    cluster.run(1)
    assert cluster.slots() == [0, 1]
    cluster.run(2)
    assert cluster.kinds()[-3:] == ["draining", "drained", "retired"]


def test_a_drained_worker_is_replaced_in_another_slot_and_its_mark_ends_with_it(cluster):
    worker = cluster.worker(slot(1))
    cluster.probes.reading = {worker: 2}
    cluster.desired.drain(worker, None)
    cluster.run(10 * DRAIN_S)
    assert cluster.slots() == [0, 1, 2, 3] and cluster.directory.listing().draining == {worker}
    # Another controller, which has only the mark, goes on with it.
    cluster.restart_controller()
    cluster.run(2 * SETTLE_S)
    assert cluster.slots() == [0, 1, 2, 3] and cluster.directory.listing().draining == {worker}
    cluster.probes.reading = {}
    cluster.run(LEASE_S + 1)
    assert cluster.slots() == [0, 2, 3] and not cluster.desired.drains()
    cluster.desired.scale({"attention": 4})
    cluster.run(1)
    assert cluster.slots() == [0, 1, 2, 3] and not cluster.directory.listing().draining


def test_readers_count_only_when_all_can_have_heard_of_the_drain(cluster):
    cluster.probes.reading = {}
    cluster.desired.drain(cluster.worker(slot(1)), None)
    cluster.run(HEARD_S - ROUND_S)
    assert 1 in cluster.slots()
    cluster.run(3 * ROUND_S)
    assert 1 not in cluster.slots() and cluster.ray.graces == [DRAIN_S]


@pytest.mark.parametrize(("kind", "limit_s", "ends_s"), [("attention", 7.0, 7.0), ("dense", None, DRAIN_S)])
def test_what_is_left_when_the_drain_has_taken_too_long_is_ended(cluster, kind, limit_s, ends_s):
    drained = Slot(kind, 0)
    worker = cluster.worker(drained)
    cluster.probes.reading = {worker: 3}
    cluster.desired.drain(worker, limit_s)
    cluster.run(ends_s)
    assert 0 in cluster.slots(kind)
    cluster.run(2 * ROUND_S)
    assert 0 not in cluster.slots(kind) and cluster.ray.graces == [0.0]
    (event,) = [event for event in cluster.events.since(0) if event.kind == "drained"]
    assert (event.subject, event.detail) == (worker, "3 sequences were left")


def test_a_worker_whose_process_was_told_to_end_is_replaced_and_did_not_die(cluster):
    cluster.probes.reading = {cluster.worker(slot(0)): 1}
    cluster.ray.told.add(slot(0))
    cluster.run(2)
    assert cluster.slots() == [0, 1, 2, 3]
    assert cluster.directory.listing().draining == {cluster.worker(slot(0))}
    cluster.ray.die(slot(0))
    cluster.run(1)
    assert cluster.slots() == [1, 2, 3]
    assert cluster.kinds()[-1] == "retired" and "lost" not in cluster.kinds()


def test_a_mark_outlives_a_frozen_worker_that_a_new_controller_has_not_heard_of(cluster):
    worker = cluster.worker(slot(1))
    cluster.desired.drain(worker, None)
    cluster.ray.frozen.add(slot(1))
    cluster.restart_controller()
    cluster.run(SETTLE_S + 2)
    assert cluster.desired.drains() == {worker: None}
    cluster.run(ANNOUNCE_S + 2 * GRACE_S)
    assert not cluster.desired.drains() and len(cluster.slots()) == 3


def test_a_worker_that_keeps_dying_waits_longer_each_time(cluster):
    for _ in range(8):
        cluster.ray.die(slot(0))
        cluster.run(2)
    assert cluster.ray.starts[slot(0)] < 6
    cluster.run(MOST_BACKOFF_S)
    assert cluster.slots() == [0, 1, 2]


def test_records_of_another_process_in_a_slot_are_not_taken_for_its_own(cluster):
    stale = record_of(slot(0), replace(cluster.ray.taken[slot(0)], process_id=999))
    cluster.directory.renew(stale)
    cluster.run(1)
    assert "lost" not in cluster.kinds()
