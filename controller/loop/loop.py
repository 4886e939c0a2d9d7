"""The controller's loop: observes the cluster, decides by ``reconcile``, and acts through a launcher.

Called by ``controller``. It must not know Ray.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from farshore.controller.events import Events
from farshore.controller.launch.launcher import Launcher
from farshore.controller.loop.observer import Observer, Probes, Seen
from farshore.controller.reconcile import (
    KILL_GRACE_S,
    Drain,
    Kill,
    Kind,
    Open,
    Process,
    Slot,
    Start,
    Stop,
    reconcile,
)
from farshore.errors import TransportError
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory, Listing
from farshore.periodic import PeriodicThread

ROUND_S = 0.5

_LOG = logging.getLogger(__name__)


class DesiredState(Protocol):
    """What the cluster is to be. Thread-safe."""

    def counts(self) -> Mapping[Kind, int]:
        """The number of workers of each kind."""

    def drains(self) -> Mapping[WorkerId, float | None]:
        """The workers that an operator drains, and for how many seconds each may take; None: without end."""

    def drained_s(self) -> Mapping[WorkerId, float]:
        """For how many seconds each worker has drained, with a mark or without, also before this controller
        started."""

    def forget_drains(self, ended: Collection[WorkerId]) -> None:
        """Removes the marks of workers that have ended."""

    def note_drains(self, draining: Collection[WorkerId]) -> None:
        """Notes that of the workers without a mark these drain, and no others."""


class Loop:
    """Call :meth:`round` every ROUND_S, or :meth:`start` to have a thread do it.

    ``grace_s``: how long a worker without a lease may be silent before it is killed. ``drain_timeout_s``: how
    long a dense worker may drain, unless its mark says otherwise. ``clock``: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        desired: DesiredState,
        directory: Directory,
        launcher: Launcher,
        probes: Probes,
        events: Events,
        grace_s: float,
        drain_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desired = desired
        self._directory = directory
        self._launcher = launcher
        self._events = events
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._observer = Observer(
            launcher=launcher,
            probes=probes,
            events=events,
            grace_s=grace_s,
            drain_timeout_s=drain_timeout_s,
        )
        self._is_answered = True
        """Whether the directory answered the last round."""
        self._thread = PeriodicThread(self._run, name="reconcile", period_s=ROUND_S, tell=_tell)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its round. Starts and stops nothing any more."""
        self._thread.stop()

    def round(self) -> None:
        """Observes, decides and acts once."""
        now_s = self._clock()
        listing = self._directory.listing()
        self._observer.notice(listing, now_s)
        drains = self._desired.drains()
        observed = self._observer.observed(listing, drains, self._desired.drained_s(), now_s=now_s)
        for action in reconcile(self._desired.counts(), observed, now_s):
            match action:
                case Drain(slot, worker):
                    self._observer.seen[slot].drained_s = now_s
                    self._events.add("draining", worker, self._why_draining(slot, drains))
                case Open(slot, _):
                    self._observer.seen[slot].drained_s = None
                case Start(slot):
                    self._events.add("started", str(slot))
                    self._launcher.start(slot)
                case Stop(slot):
                    self._stop(slot, observed.processes[slot])
                case Kill(slot):
                    self._kill(self._observer.seen[slot], slot, now_s)
        draining = self._observer.draining()
        self._directory.close(draining, draining=draining)
        if listing.settled:
            self._forget_drains(drains, listing)
            self._desired.note_drains(draining | self._observer.unheard_of(self._desired.drained_s()))

    def _stop(self, slot: Slot, process: Process) -> None:
        seen = self._observer.seen[slot]
        if not seen.stopped and process.worker is not None:
            left = f"{process.readers} sequences were left" if process.readers else ""
            self._events.add("drained", process.worker, left)
        seen.stopped = True
        # A sequence that came before the whole cluster had heard of the drain may end, too, and so may those
        # of a worker that this controller has not heard of. One that has none ends at once.
        self._launcher.stop(slot, grace_s=self._drain_timeout_s if process.readers == 0 else 0.0)

    def _kill(self, seen: Seen, slot: Slot, now_s: float) -> None:
        if seen.killed_s is None:
            seen.killed_s = now_s
            self._events.add("killed", str(slot), "it has answered nothing for too long")
        elif now_s - seen.kill_told_s < KILL_GRACE_S:
            return
        seen.kill_told_s = now_s
        self._launcher.kill(slot)

    def _why_draining(self, slot: Slot, drains: Mapping[WorkerId, float | None]) -> str:
        record = self._observer.seen[slot].record
        if record is not None and record.worker in drains:
            return "an operator drains it"
        told = record is not None and record.state == "draining"
        return "its process was told to end" if told else "there are more than desired"

    def _forget_drains(self, drains: Collection[WorkerId], listing: Listing) -> None:
        """Removes marks of workers that run no more."""
        running = {record.worker for record in listing.workers}
        running |= {seen.record.worker for seen in self._observer.seen.values() if seen.record is not None}
        if ended := set(drains) - running - self._observer.unheard_of(drains):
            self._desired.forget_drains(ended)

    def _run(self) -> None:
        try:
            self.round()
            if not self._is_answered:
                self._events.add("answers", "directory")
            self._is_answered = True
        except TransportError as error:
            # Nothing is started or stopped meanwhile; all that runs goes on.
            if self._is_answered:
                self._events.add("unreachable", "directory", str(error))
            self._is_answered = False


def _tell(error: Exception) -> None:
    """Ray's GCS may be away for a while; the next round observes anew."""
    _LOG.error("a round of the controller failed", exc_info=error)
