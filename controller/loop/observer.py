"""What the controller's loop observes of the slots' processes, by Ray, the directory and the probes.

Called by ``loop``, once a round. It tells what joined and what was lost, and changes nothing else. What it
remembers is never the only copy: a restarted controller observes the same. It must not know Ray.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from farshore.controller.events import Events
from farshore.controller.launch.launcher import Launcher, Occupant
from farshore.controller.reconcile import HEALTHY_S, Deaths, Observed, Process, Slot
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Listing, WorkerRecord

ANNOUNCE_S = 30.0
"""A worker whose process runs announces itself within this time."""

HEARD_S = 2.0
"""After this time every engine and gateway that can has heard that a worker drains, and the probes have asked
again: only then does the number of its readers tell whether it can end."""

LEFT_ALONE = (
    "its process runs but announces nothing, and is left alone: if the controller's node was lost, run "
    "`farshore down` and `farshore serve` again (--redis-url avoids this)"
)


class Probes(Protocol):
    """Asks workers directly."""

    def silent_s(self, suspects: Mapping[WorkerId, str]) -> dict[WorkerId, float]:
        """For how long each of the suspected workers (id to address) has answered no probe and been reported
        alive by no engine; 0.0 if it answers. Never blocks: it reads the newest answers."""

    def alive(self) -> set[WorkerId]:
        """The attention workers that an engine reports alive. Never blocks."""

    def readers(self, engines: Mapping[WorkerId, str]) -> Mapping[WorkerId, int] | None:
        """The number of sequences that read from each attention worker or run on each dense one; None while a
        dense worker does not answer: one that is listed, or one of ``engines`` (id to address). Never
        blocks."""


@dataclass(slots=True)
class Seen:
    """What is remembered of a slot's occupant."""

    occupant: Occupant
    since_s: float
    record: WorkerRecord | None = None
    served: bool = False
    """Whether it ever served: one that never did was never healthy."""
    drained_s: float | None = None
    """Since when it drains."""
    stopped: bool = False
    killed_s: float | None = None
    """When it was first killed, of the times since it last answered."""
    kill_told_s: float = 0.0
    """When its node was last told to kill it: one that is cut off is told again."""
    answered_s: float | None = None
    """When its actor last answered Ray, while it has announced nothing."""


class Observer:
    """Call :meth:`notice`, then :meth:`observed`, once a round. ``seen``: the slots that are taken; the loop
    notes there what it did to their processes. ``grace_s``, ``drain_timeout_s``: see ``Loop``."""

    def __init__(
        self,
        *,
        launcher: Launcher,
        probes: Probes,
        events: Events,
        grace_s: float,
        drain_timeout_s: float,
    ) -> None:
        self._launcher = launcher
        self._probes = probes
        self._events = events
        self._grace_s = grace_s
        self._drain_timeout_s = drain_timeout_s
        self.seen: dict[Slot, Seen] = {}
        self._deaths: dict[Slot, Deaths] = {}

    def notice(self, listing: Listing, now_s: float) -> None:
        """Updates what is remembered of the slots, and tells what joined and what was lost."""
        occupants = self._launcher.occupants()
        for slot, seen in list(self.seen.items()):
            if occupants.get(slot, seen.occupant).actor == seen.occupant.actor and slot in occupants:
                continue
            del self.seen[slot]
            name = seen.record.worker if seen.record is not None else str(slot)
            if seen.stopped or (seen.record is not None and seen.record.state == "draining"):
                self._events.add("retired", name)
            else:
                count = self._deaths[slot].count if slot in self._deaths else 0
                healthy = seen.served and now_s - seen.since_s >= HEALTHY_S
                self._deaths[slot] = Deaths(1 if healthy else count + 1, now_s)
                failure = seen.record.failure if seen.record is not None else ""
                self._events.add("lost", name, failure or self._launcher.end_in_words(seen.occupant))
        records = {(record.slot, record.process_id): record for record in listing.workers}
        for slot, occupant in occupants.items():
            seen = self.seen.setdefault(slot, Seen(occupant, now_s))
            seen.occupant = occupant
            record = records.get((str(slot), occupant.process_id))
            if record is None:
                continue
            if seen.record is None and record.worker in listing.draining:
                # The controller before told so, and has not been contradicted.
                seen.drained_s = now_s
            if (seen.record is None or seen.record.state != "serving") and record.state == "serving":
                kind = "replaced" if slot in self._deaths else "joined"
                self._events.add(kind, record.worker, f"at {record.address}")
            seen.record = record
            seen.served |= record.state == "serving"

    def draining(self) -> frozenset[WorkerId]:
        """The workers that drain."""
        return frozenset(
            seen.record.worker
            for seen in self.seen.values()
            if seen.record is not None and seen.drained_s is not None
        )

    def unheard_of(self, workers: Collection[WorkerId]) -> set[WorkerId]:
        """Those that may run and have not registered: such a process may be any worker of its slot."""
        unheard = tuple(f"{slot}-" for slot, seen in self.seen.items() if seen.record is None)
        return {worker for worker in workers if worker.startswith(unheard)}

    def observed(
        self,
        listing: Listing,
        drains: Mapping[WorkerId, float | None],
        drained_s: Mapping[WorkerId, float],
        *,
        now_s: float,
    ) -> Observed:
        """What there is. ``drains``, ``drained_s``: see ``DesiredState``."""
        listed = {record.worker for record in listing.workers}
        suspects = {
            seen.record.worker: seen.record.address
            for seen in self.seen.values()
            if seen.record is not None and seen.record.worker not in listed
        }
        silent_s = self._probes.silent_s(suspects)
        # Such a worker may be one that this controller has not heard of.
        nameless_may_live = bool(self._probes.alive() - listed - suspects.keys())
        readers = self._readers()
        self._ping(now_s)
        processes = {}
        for slot, seen in self.seen.items():
            if seen.record is not None:
                frozen = silent_s.get(seen.record.worker, 0.0) >= self._grace_s
            else:
                late = bool(seen.occupant.node) and _unheard_s(seen, now_s) >= ANNOUNCE_S + self._grace_s
                frozen = late and not nameless_may_live
            if not frozen:
                seen.killed_s = None
            may_serve = nameless_may_live and bool(seen.occupant.node)
            process = Process(slot=slot, may_serve=may_serve, frozen=frozen, killed_s=seen.killed_s)
            if seen.record is not None:
                for_s = 0.0 if seen.drained_s is None else now_s - seen.drained_s
                whole_s = max(for_s, drained_s.get(seen.record.worker, 0.0))
                process = self._drain_of(process, seen, drains, readers, for_s=for_s, whole_s=whole_s)
            processes[slot] = process
        return Observed(processes=processes, deaths=self._deaths, settled=listing.settled)

    def _ping(self, now_s: float) -> None:
        """Asks, through Ray, the processes that should have announced themselves. One that answers may be at
        work, with a directory that is lost."""
        unheard = {
            slot: seen
            for slot, seen in self.seen.items()
            if seen.record is None and seen.occupant.node and _unheard_s(seen, now_s) >= ANNOUNCE_S
        }
        for slot in self._launcher.answering(unheard.keys()):
            if unheard[slot].answered_s is None:
                self._events.add("unreachable", str(slot), LEFT_ALONE)
            unheard[slot].answered_s = now_s

    def _readers(self) -> Mapping[WorkerId, int] | None:
        """See :meth:`Probes.readers`: of all dense workers that run, also those that are not listed."""
        dense = [seen for slot, seen in self.seen.items() if slot.kind == "dense"]
        records = [seen.record for seen in dense if seen.record is not None]
        readers = self._probes.readers({each.worker: each.address for each in records if each.address})
        # One that this controller has not heard of may read from any worker.
        is_complete = all(seen.record is not None or not seen.occupant.node for seen in dense)
        return readers if is_complete else None

    def _drain_of(
        self,
        process: Process,
        seen: Seen,
        drains: Mapping[WorkerId, float | None],
        readers: Mapping[WorkerId, int] | None,
        *,
        for_s: float,
        whole_s: float,
    ) -> Process:
        """Adds to a registered worker's process how far its drain is. ``for_s``: since this controller told
        the others; ``whole_s``: since it began, also under another controller."""
        assert seen.record is not None
        worker = seen.record.worker
        limit_s = drains.get(worker)
        if limit_s is None and seen.record.kind == "dense":
            limit_s = self._drain_timeout_s
        return replace(
            process,
            worker=worker,
            leaving=worker in drains or seen.record.state == "draining",
            closed=seen.drained_s is not None,
            readers=None if readers is None or for_s < HEARD_S else readers.get(worker, 0),
            overdue=limit_s is not None and seen.drained_s is not None and whole_s >= limit_s,
        )


def _unheard_s(seen: Seen, now_s: float) -> float:
    """For how long nothing was heard of a process that has not announced itself."""
    return now_s - (seen.since_s if seen.answered_s is None else seen.answered_s)
