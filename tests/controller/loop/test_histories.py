"""Any history of a cluster ends in the desired one, also if its controller is killed amid an action.

A kill comes before or after the effect of a call of the launcher, or of a change of the stored state. Another
controller starts from what there is then.
"""

import contextlib
import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.controller.loop.loop import ROUND_S
from farshore.controller.loop.observer import ANNOUNCE_S
from farshore.controller.reconcile import MOST_BACKOFF_S
from farshore.kvstore.directory.base import LEASE_S, SETTLE_S

from .test_loop import DRAIN_S, GRACE_S, Cluster, FakeRay

ENDS_S = 2 * SETTLE_S + 2 * GRACE_S + ANNOUNCE_S + MOST_BACKOFF_S + DRAIN_S + 10

ENDING_ROUNDS = 8
WITHDRAWN_ROUNDS = 5


class Killed(BaseException):
    """The controller's process ends here. No handler of the controller runs."""


class Fuses:
    """Kill the controller at one action of each kind. ``fuses``: kind -> (the action's number, 0 for none;
    whether it has its effect)."""

    def __init__(self, fuses):
        self._fuses, self._counts = fuses, Counter()

    @contextlib.contextmanager
    def action(self, kind):
        self._counts[kind] += 1
        number, has_effect = self._fuses[kind]
        burns = self._counts[kind] == number
        if burns and not has_effect:
            raise Killed
        yield
        if burns:
            raise Killed


class MortalCluster(Cluster):
    """``keeps``: see :meth:`Cluster.restart_controller`."""

    def __init__(self, fuses, *, keeps):
        self.fuses, self.kills, self._keeps = Fuses(fuses), 0, keeps
        super().__init__(ray=CheckedRay(self))

    def restart_controller(self):
        super().restart_controller(keeps_directory=self._keeps)
        self.ray.heard = set()

    def survives(self, call):
        """Lets the controller do something; another one follows if it is killed meanwhile."""
        try:
            call()
        except Killed:
            self.kills += 1
            self.restart_controller()

    def run(self, seconds=0.0):
        for _ in range(max(1, round(seconds / ROUND_S))):
            self.ray.announce(self.directory)
            self.survives(self.loop.round)
            self.clock.now_s += ROUND_S

    def end(self):
        """Runs until all that was begun is over, with no kill."""
        kills = None
        while kills != self.kills:
            kills = self.kills
            self.run(ENDS_S)

    def marked(self):
        """All workers that ever had a mark."""
        return {worker for state in self.stored for worker in json.loads(state)["drains"]}

    def _desired(self):
        try:
            return super()._desired()
        except Killed:
            return super()._desired()

    def _store(self, state):
        with self.fuses.action("store"):
            super()._store(state)


class CheckedRay(FakeRay):
    """Asserts of each action that it is right, by what the workers themselves know. A worker that is stopped
    needs a few rounds to end, and withdraws before."""

    def __init__(self, cluster):
        super().__init__()
        self._cluster = cluster
        self._ending = {}
        self.heard = set()
        """The workers that the controller has heard of."""

    def start(self, slot):
        assert slot not in self.taken, "a slot is started twice"
        kept = [each for each in self._taken(slot.kind) if each not in self.frozen and not self._leaves(each)]
        assert len(kept) < self._count(slot), "too many are started"
        with self._cluster.fuses.action("start"):
            super().start(slot)

    def stop(self, slot, *, grace_s):
        if self._is_heard(slot):
            self._check_stop(slot)
        else:
            assert len(self._taken(slot.kind)) > self._count(slot), "a worker is stopped that may serve"
        with self._cluster.fuses.action("stop"):
            self.told.add(slot)
            self._ending.setdefault(slot, ENDING_ROUNDS)

    def _check_stop(self, slot):
        desired, worker = self._cluster.desired, self._cluster.worker(slot)
        heard = [each for each in self._taken(slot.kind) if self._is_heard(each)]
        # A worker that was told to end, and froze, may not have said so.
        kept = [each for each in heard if not self._leaves(each) or self._may_seem_kept(each)]
        assert self._leaves(slot) or kept.index(slot) >= self._count(slot), "a worker is stopped that is kept"
        if slot not in self.frozen and slot not in self._ending:
            assert worker in self._cluster.directory.listing().draining, "an engine may need it"
            if self._cluster.probes.reading.get(worker):
                limit_s = desired.drains().get(worker) or (DRAIN_S if slot.kind == "dense" else None)
                assert limit_s is not None and desired.drained_s()[worker] >= limit_s, "a reader is cut off"

    def kill(self, slot):
        assert slot in self.frozen, "a worker is killed that answers"
        with self._cluster.fuses.action("kill"):
            super().kill(slot)

    def die(self, slot):
        super().die(slot)
        self._ending.pop(slot, None)

    def announce(self, directory):
        for slot in self._ending.keys() - self.frozen:
            self._ending[slot] -= 1
            if self._ending[slot] == 0:
                self.die(slot)
        super().announce(directory)
        for slot in self._ending.keys() - self.frozen:
            if self._ending[slot] <= WITHDRAWN_ROUNDS:
                directory.withdraw(self._cluster.worker(slot))
        self.heard |= {record.worker for record in directory.listing().workers}

    def _taken(self, kind):
        return sorted(slot for slot in self.taken if slot.kind == kind)

    def _count(self, slot):
        return self._cluster.desired.counts()[slot.kind]

    def _is_heard(self, slot):
        return self._cluster.worker(slot) in self.heard

    def _is_marked(self, slot):
        return self._cluster.worker(slot) in self._cluster.desired.drains()

    def _leaves(self, slot):
        return slot in self.told or self._is_marked(slot)

    def _may_seem_kept(self, slot):
        return slot in self.frozen and not self._is_marked(slot)


faults = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["die", "freeze", "lose node", "told"]), st.integers(0, 5)),
        st.tuples(st.sampled_from(["drain", "drain soon", "read"]), st.integers(0, 5)),
        st.tuples(st.sampled_from(["restart", "thaw", "verdict"]), st.just(0)),
        st.tuples(st.sampled_from(["wait", "pause"]), st.integers(1, 12)),
        st.tuples(st.sampled_from(["scale", "scale dense", "configure"]), st.integers(1, 4)),
    ),
    min_size=4,
    max_size=25,
)

kills = st.fixed_dictionaries(
    {
        kind: st.tuples(st.integers(0, most), st.booleans())
        for kind, most in {"start": 8, "stop": 2, "kill": 2, "store": 4}.items()
    }
)


@settings(max_examples=50, deadline=None)
@given(faults, kills, st.booleans())
def test_any_history_ends_in_the_desired_cluster(history, kills, keeps):
    cluster = MortalCluster(kills, keeps=keeps)
    for fault, number in history:
        _happen(cluster, fault, number)
        cluster.run(number if fault == "wait" else 0)
    cluster.run(SETTLE_S + LEASE_S + GRACE_S)
    for lost in list(cluster.ray.lost_nodes):
        cluster.ray.die(lost)
    cluster.probes.reading = {}
    cluster.end()
    for kind, count in cluster.desired.counts().items():
        assert len(cluster.slots(kind)) == count
    assert not cluster.ray.frozen and not cluster.ray.told
    assert not cluster.marked() & {cluster.worker(slot) for slot in cluster.ray.taken}
    assert not cluster.directory.listing().closed and not cluster.desired.drained_s()
    starts = cluster.ray.starts.total()
    cluster.run(5)
    assert cluster.ray.starts.total() == starts


def _happen(cluster, fault, number):
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
        case "drain" | "drain soon" if chosen:
            limit_s = 3.0 if fault == "drain soon" else None
            cluster.survives(lambda: cluster.desired.drain(cluster.worker(chosen), limit_s))
        case "told" if chosen:
            cluster.ray.told.add(chosen)
        case "read" if chosen:
            cluster.probes.reading = {cluster.worker(chosen): 1}
        case "restart":
            cluster.restart_controller()
        case "pause":
            cluster.pause(float(number))
        case "scale":
            cluster.survives(lambda: cluster.desired.scale({"attention": number}))
        case "scale dense":
            cluster.survives(lambda: cluster.desired.scale({"dense": number}))
        case "configure":
            cluster.survives(lambda: cluster.configure(number))
