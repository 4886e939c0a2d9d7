"""Workers that the controller's loop does not hear of, and hears of again: they may be at work meanwhile."""

import itertools
from dataclasses import replace

import pytest

from farshore.benchmarks.cluster.fake import record_of
from farshore.controller.loop.loop import ROUND_S
from farshore.controller.loop.observer import ANNOUNCE_S, HEARD_S
from farshore.controller.reconcile import KILL_GRACE_S, Slot
from farshore.kvstore.directory.base import LEASE_S, SETTLE_S

from .test_loop import DRAIN_S, GRACE_S, Cluster, FakeProbes, slot


@pytest.fixture
def cluster():
    made = Cluster()
    made.run(2)
    return made


class DeafProbes(FakeProbes):
    """Engines that answer nothing."""

    def readers(self, engines):
        self.asked = dict(engines)
        return None if engines else self.reading


def test_nothing_ends_while_an_engine_that_is_not_listed_may_read_from_it():
    cluster = Cluster()
    cluster.probes = DeafProbes(cluster.clock, cluster.ray)
    cluster.loop = cluster._loop()
    cluster.run(2)
    dense = Slot("dense", 0)
    cluster.ray.frozen.add(dense)
    cluster.run(LEASE_S + ROUND_S)
    assert cluster.worker(dense) not in {record.worker for record in cluster.directory.listing().workers}
    cluster.desired.scale({"attention": 2})
    cluster.run(HEARD_S + 2 * ROUND_S)
    occupant = cluster.ray.taken[dense]
    assert cluster.probes.asked == {cluster.worker(dense): record_of(dense, occupant).address}
    assert cluster.slots() == [0, 1, 2]


def test_nothing_ends_while_an_engine_runs_that_a_new_controller_has_not_heard_of(cluster):
    cluster.ray.frozen.add(Slot("dense", 0))
    cluster.restart_controller()
    cluster.run(SETTLE_S + 1)
    cluster.desired.scale({"attention": 2})
    cluster.run(HEARD_S + 2 * ROUND_S)
    assert cluster.slots() == [0, 1, 2]
    cluster.ray.frozen.clear()
    cluster.run(HEARD_S)
    assert cluster.slots() == [0, 1]


class AliveProbes(FakeProbes):
    """Engines that report the workers ``reported`` alive."""

    reported = frozenset()

    def alive(self):
        return set(self.reported)


def test_a_surplus_worker_that_a_new_controller_has_not_heard_of_goes_on_while_an_engine_uses_it(cluster):
    cluster.probes = AliveProbes(cluster.clock, cluster.ray)
    cluster.probes.reported = {cluster.worker(slot(2))}
    # Only its link to the directory is cut.
    cluster.ray.frozen.add(slot(2))
    cluster.restart_controller()
    cluster.run(SETTLE_S + 1)
    cluster.desired.scale({"attention": 2})
    cluster.run(ANNOUNCE_S + 2 * GRACE_S)
    assert cluster.slots() == [0, 1, 2] and not cluster.ray.graces
    cluster.ray.frozen.clear()
    cluster.probes.reading = {}
    cluster.run(HEARD_S + 2)
    assert cluster.slots() == [0, 1] and cluster.ray.graces == [DRAIN_S]


def test_a_new_controller_kills_no_worker_that_answers_though_none_finds_its_directory(cluster):
    """As after the loss of the controller's node, without Redis."""
    cluster.restart_controller()
    before = dict(cluster.ray.taken)
    for _ in range(int(3 * (ANNOUNCE_S + GRACE_S) / ROUND_S)):
        cluster.loop.round()
        cluster.clock.now_s += ROUND_S
    assert cluster.ray.taken == before
    events = cluster.events.since(0)
    assert {(event.kind, event.subject) for event in events} == {
        ("unreachable", str(slot)) for slot in before
    }
    assert len(events) == len(before) and "--redis-url" in events[0].detail
    # One of them freezes.
    cluster.ray.frozen.add(slot(1))
    for _ in range(int((ANNOUNCE_S + 2 * GRACE_S) / ROUND_S)):
        cluster.loop.round()
        cluster.clock.now_s += ROUND_S
    assert cluster.ray.starts == {each: 2 if each == slot(1) else 1 for each in before}


def test_a_worker_on_a_lost_node_is_not_killed_again_in_every_round(cluster):
    kills, kill = [], cluster.ray.kill
    cluster.ray.kill = lambda slot: (kills.append(cluster.clock.now_s), kill(slot))
    cluster.ray.frozen.add(slot(0))
    cluster.ray.lost_nodes.add(slot(0))
    cluster.run(LEASE_S + GRACE_S + 5 * KILL_GRACE_S)
    assert len(kills) > 2
    assert min(later - first for first, later in itertools.pairwise(kills)) >= KILL_GRACE_S


def test_a_worker_that_answered_again_is_killed_as_if_for_the_first_time(cluster):
    for times in (1, 2):
        cluster.ray.frozen.add(slot(0))
        cluster.ray.lost_nodes.add(slot(0))
        cluster.run(LEASE_S + GRACE_S + 2 * ROUND_S)
        assert cluster.kinds().count("killed") == times
        cluster.run(KILL_GRACE_S)
        cluster.ray.frozen.clear()
        cluster.ray.lost_nodes.clear()
        cluster.run(LEASE_S)
    assert "lost" not in cluster.kinds()


def test_a_workers_lease_counts_beside_that_of_another_process_in_its_slot(cluster):
    cluster.restart_controller()
    stale = record_of(slot(0), replace(cluster.ray.taken[slot(0)], process_id=999))
    for _ in range(4):
        cluster.directory.renew(stale)
        cluster.run(ROUND_S)
    joined = {event.subject for event in cluster.events.since(0) if event.kind == "joined"}
    assert joined == {cluster.worker(each) for each in cluster.ray.taken}


def test_a_drain_that_takes_too_long_ends_though_the_controller_was_restarted(cluster):
    worker = cluster.worker(slot(1))
    cluster.probes.reading = {worker: 3}
    cluster.desired.drain(worker, 3 * SETTLE_S)
    for _ in range(3):
        cluster.run(SETTLE_S - 1)
        assert 1 in cluster.slots()
        cluster.restart_controller()
    cluster.run(SETTLE_S + 2)
    assert 1 not in cluster.slots() and cluster.ray.graces == [0.0]


def test_a_drain_by_scale_takes_no_longer_though_the_controller_was_restarted():
    cluster = Cluster(dense=2)
    cluster.run(2)
    cluster.probes.reading = {cluster.worker(Slot("dense", 1)): 3}
    cluster.desired.scale({"dense": 1})
    for _ in range(2):
        cluster.run(SETTLE_S + 1)
        cluster.restart_controller()
    assert cluster.slots("dense") == [0, 1]
    cluster.run(SETTLE_S + 2)
    assert cluster.slots("dense") == [0] and cluster.ray.graces == [0.0]
    cluster.run(1)
    assert not cluster.desired.drained_s()


def test_a_drain_that_is_called_off_takes_its_whole_time_when_it_begins_again():
    cluster = Cluster(dense=2)
    cluster.run(2)
    cluster.probes.reading = {cluster.worker(Slot("dense", 1)): 3}
    for count in (1, 2, 1):
        cluster.desired.scale({"dense": count})
        cluster.run(DRAIN_S - 1)
    assert cluster.slots("dense") == [0, 1]


def test_a_new_controller_lets_a_worker_drain_on_before_its_list_is_settled(cluster):
    worker = cluster.worker(slot(2))
    cluster.probes.reading = {worker: 1}
    cluster.desired.scale({"attention": 2})
    cluster.run(1)
    cluster.pause(LEASE_S)
    cluster.restart_controller(keeps_directory=True)
    cluster.run()
    listing = cluster.directory.listing()
    assert listing.draining == {worker} and not listing.settled
    cluster.desired.scale({"attention": 3})
    cluster.run(SETTLE_S + 1)
    assert not cluster.directory.listing().draining


def test_a_new_controller_ends_no_worker_that_serves_for_one_that_it_has_not_heard_of(cluster):
    cluster.ray.frozen.add(slot(0))
    cluster.restart_controller()
    cluster.run(SETTLE_S + 1)
    cluster.desired.scale({"attention": 2})
    cluster.run(ANNOUNCE_S + 2 * GRACE_S)
    assert cluster.slots() == [1, 2] and set(cluster.ray.starts.values()) == {1}


def test_a_surplus_worker_that_a_new_controller_has_not_heard_of_may_end_what_it_has():
    cluster = Cluster(dense=2)
    cluster.run(2)
    # Only its link to the directory is cut.
    cluster.ray.frozen.add(Slot("dense", 1))
    cluster.restart_controller()
    cluster.run(SETTLE_S + 1)
    cluster.desired.scale({"dense": 1})
    cluster.run(ROUND_S)
    assert cluster.ray.graces == [DRAIN_S]
