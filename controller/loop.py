"""The controller's loop: observes the cluster, decides by ``reconcile``, and acts through a launcher.

Called by ``controller``. What it remembers is never the only copy: a restarted controller observes the same.
It must not know Ray.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from farshore.controller.events import Events
from farshore.controller.launch import Launcher, Occupant
from farshore.controller.reconcile import (
    HEALTHY_S,
    Close,
    Deaths,
    Kill,
    Kind,
    Observed,
    Open,
    Process,
    Slot,
    Start,
    Stop,
    reconcile,
)
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory, Listing, WorkerRecord

ROUND_S = 0.5
ANNOUNCE_S = 30.0
"""A worker whose process runs announces itself within this time."""

_LOG = logging.getLogger(__name__)


class Probes(Protocol):
    """Asks workers directly."""

    def silent_s(self, suspects: Mapping[WorkerId, str]) -> dict[WorkerId, float]:
        """For how long each of the suspected workers (id to address) has answered no probe and been reported
        alive by no engine; 0.0 if it answers. Never blocks: it reads the newest answers."""

    def alive(self) -> set[WorkerId]:
        """The attention workers that an engine reports alive. Never blocks."""

    def readers(self) -> dict[WorkerId, int] | None:
        """The number of sequences that read from each attention worker or run on each dense one; None while a
        dense worker does not answer. Never blocks."""


@dataclass(slots=True)
class _Seen:
    """What the loop remembers of a slot's occupant."""

    occupant: Occupant
    since_s: float
    record: WorkerRecord | None = None
    stopped: bool = False
    killed_s: float | None = None


class Loop:
    """Call :meth:`round` every ROUND_S, or :meth:`start` to have a thread do it.

    ``desired``: returns the number of workers of each kind. ``grace_s``: how long a worker without a lease
    may be silent before it is killed. ``clock``: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        desired: Callable[[], Mapping[Kind, int]],
        directory: Directory,
        launcher: Launcher,
        probes: Probes,
        events: Events,
        grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desired = desired
        self._directory = directory
        self._launcher = launcher
        self._probes = probes
        self._events = events
        self._grace_s = grace_s
        self._clock = clock
        self._seen: dict[Slot, _Seen] = {}
        self._deaths: dict[Slot, Deaths] = {}
        self._closed: frozenset[WorkerId] = frozenset()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its round. Starts and stops nothing any more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def round(self) -> None:
        """Observes, decides and acts once."""
        now_s = self._clock()
        listing = self._directory.listing()
        self._notice(self._launcher.occupants(), listing, now_s)
        observed = self._observed(listing, now_s=now_s)
        closed = set(self._closed)
        for action in reconcile(self._desired(), observed, now_s):
            match action:
                case Close(_, worker):
                    closed.add(worker)
                case Open(_, worker):
                    closed.discard(worker)
                case Start(slot):
                    self._events.add("started", str(slot))
                    self._launcher.start(slot)
                case Stop(slot):
                    if not self._seen[slot].stopped:
                        self._events.add("retired", str(slot))
                    self._seen[slot].stopped = True
                    self._launcher.stop(slot)
                case Kill(slot):
                    seen = self._seen[slot]
                    if seen.killed_s is None:
                        seen.killed_s = now_s
                        self._events.add("killed", str(slot), "it has answered nothing for too long")
                    self._launcher.kill(slot)
        self._closed = frozenset(closed & {record.worker for record in listing.workers})
        self._directory.close(self._closed)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.round()
            except Exception:
                # Ray's GCS may be away for a while; the next round observes anew.
                _LOG.exception("a round of the controller failed")
            self._ended.wait(ROUND_S)

    def _notice(self, occupants: Mapping[Slot, Occupant], listing: Listing, now_s: float) -> None:
        """Updates what is remembered of the slots, and tells what joined and what was lost."""
        for slot, seen in list(self._seen.items()):
            if occupants.get(slot, seen.occupant).actor == seen.occupant.actor and slot in occupants:
                continue
            del self._seen[slot]
            if not seen.stopped:
                count = self._deaths[slot].count if slot in self._deaths else 0
                healthy = now_s - seen.since_s >= HEALTHY_S
                self._deaths[slot] = Deaths(1 if healthy else count + 1, now_s)
                name = seen.record.worker if seen.record is not None else str(slot)
                self._events.add("lost", name, self._launcher.end_in_words(seen.occupant))
        records = {record.slot: record for record in listing.workers}
        for slot, occupant in occupants.items():
            seen = self._seen.setdefault(slot, _Seen(occupant, now_s))
            seen.occupant = occupant
            record = records.get(str(slot))
            if record is None or record.process_id != occupant.process_id:
                continue
            if (seen.record is None or seen.record.state != "serving") and record.state == "serving":
                kind = "replaced" if slot in self._deaths else "joined"
                self._events.add(kind, record.worker, f"at {record.address}")
            seen.record = record

    def _observed(self, listing: Listing, *, now_s: float) -> Observed:
        listed = {record.worker for record in listing.workers}
        suspects = {
            seen.record.worker: seen.record.address
            for seen in self._seen.values()
            if seen.record is not None and seen.record.worker not in listed
        }
        silent_s = self._probes.silent_s(suspects)
        # Such a worker may be one that this controller has not heard of.
        nameless_may_live = bool(self._probes.alive() - listed)
        readers = self._probes.readers() if self._closed else None
        processes = {}
        for slot, seen in self._seen.items():
            if seen.record is not None:
                frozen = silent_s.get(seen.record.worker, 0.0) >= self._grace_s
            else:
                late = bool(seen.occupant.node) and now_s - seen.since_s >= ANNOUNCE_S + self._grace_s
                frozen = late and not nameless_may_live
            processes[slot] = self._process(slot, seen, readers, frozen=frozen)
        return Observed(processes=processes, deaths=self._deaths, settled=listing.settled)

    def _process(
        self, slot: Slot, seen: _Seen, readers: Mapping[WorkerId, int] | None, *, frozen: bool
    ) -> Process:
        worker = seen.record.worker if seen.record is not None else None
        return Process(
            slot=slot,
            worker=worker,
            closed=worker is not None and worker in self._closed,
            readers=None if readers is None or worker is None else readers.get(worker, 0),
            frozen=frozen,
            killed_s=seen.killed_s,
        )
