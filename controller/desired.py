"""What the cluster is to be: how many workers of each kind, and which of them are drained.

Used by ``controller``. The state is durable, one JSON object, since a restarted controller gets its first
configuration again: numbers of the last ``scale``, the numbers that were configured, drain marks, and since
when workers drain. It must not know where the state is stored.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from farshore.controller.config import check_counts
from farshore.controller.reconcile import KINDS, Kind
from farshore.errors import InvalidRequest
from farshore.ids import WorkerId

State = dict[str, Any]


class Desired:
    """Thread-safe. Each change is durable when its call returns; one that can't be stored changes nothing.

    ``controller``: names the controller, also when it is started again. ``configured``: the configuration's
    numbers. ``given``: those of them that an operator chose, not a
    default. ``load`` returns the stored state, None if there is none; ``store`` replaces it. ``restarted``:
    this controller was started again with its first arguments, which say nothing new. ``clock``: Unix time in
    seconds, since a drain goes on for longer than a controller may.

    Of a state that is stored, a number that an operator configures now and did not configure last time gives
    way to the new one; every other number is the last scale's.
    """

    def __init__(
        self,
        configured: Mapping[Kind, int],
        *,
        controller: str,
        given: Collection[Kind] = KINDS,
        load: Callable[[], State | None],
        store: Callable[[State], None],
        placement: str,
        restarted: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._controller = controller
        self._store = store
        self._clock = clock
        self._placement = placement
        self._lock = threading.Lock()
        state = load()
        self.ends = state is not None and state.get("down") == controller
        """Whether this controller is to end the cluster. Nothing else is stored then."""
        if state is None or "down" in state:
            self._configured, self._counts = dict(configured), dict(configured)
            self._drains: dict[WorkerId, float | None] = {}
            self._began_unix_s: dict[WorkerId, float] = {}
            self._change()
        else:
            self._configured = {kind: int(state["configured"][kind]) for kind in KINDS}
            self._counts = {kind: int(state["counts"][kind]) for kind in KINDS}
            self._drains = {WorkerId(worker): limit for worker, limit in state["drains"].items()}
            # A state of an older version says nothing of it.
            self._began_unix_s = dict.fromkeys(self._drains, clock()) | state.get("began_unix_s", {})
            if not restarted:
                self.configure({kind: configured[kind] for kind in given})

    def counts(self) -> dict[Kind, int]:
        """The number of workers of each kind."""
        with self._lock:
            return dict(self._counts)

    def drains(self) -> dict[WorkerId, float | None]:
        """The workers that are to be drained, and for how many seconds each may take; None: without end."""
        with self._lock:
            return dict(self._drains)

    def drained_s(self) -> dict[WorkerId, float]:
        """For how many seconds each worker has drained, with a mark or without, whichever controller ran."""
        with self._lock:
            now_s = self._clock()
            return {worker: now_s - began_s for worker, began_s in self._began_unix_s.items()}

    def configure(self, configured: Mapping[Kind, int]) -> dict[Kind, int]:
        """Takes the numbers of a configuration that an operator starts with. Those that were configured last
        time, too, change nothing. Returns the numbers in force. Raises InvalidRequest as :meth:`scale`."""
        with self._lock:
            changed = {kind: count for kind, count in configured.items() if count != self._configured[kind]}
            if changed:
                self._change(counts=self._checked(changed), configured=self._configured | changed)
            return dict(self._counts)

    def scale(self, changes: Mapping[Kind, int]) -> dict[Kind, int]:
        """Changes the numbers. Returns those in force. Raises InvalidRequest for a number that can't work."""
        with self._lock:
            self._change(counts=self._checked(changes))
            return dict(self._counts)

    def drain(self, worker: WorkerId, timeout_s: float | None) -> None:
        """Marks a worker. The mark ends with the worker: see :meth:`forget_drains`."""
        with self._lock:
            self._change(drains=self._drains | {worker: timeout_s})

    def forget_drains(self, ended: Collection[WorkerId]) -> None:
        """Removes the marks of workers that have ended."""
        with self._lock:
            left = {worker: limit for worker, limit in self._drains.items() if worker not in ended}
            if len(left) < len(self._drains):
                self._change(drains=left)

    def note_drains(self, draining: Collection[WorkerId]) -> None:
        """Notes that of the workers without a mark these drain, and no others."""
        with self._lock:
            if self._began_unix_s.keys() != {*self._drains, *draining}:
                self._change(draining=draining)

    def end(self) -> None:
        """Notes that this controller is to end the cluster, also if it is started again. The next cluster of
        this name starts as it is configured."""
        with self._lock:
            self._store({"down": self._controller})
            self.ends = True

    def _checked(self, changes: Mapping[Kind, int]) -> dict[Kind, int]:
        counts = self._counts | changes
        check_counts(counts["dense"], counts["attention"], placement=self._placement)
        return counts

    def _change(
        self,
        *,
        counts: dict[Kind, int] | None = None,
        configured: dict[Kind, int] | None = None,
        drains: dict[WorkerId, float | None] | None = None,
        draining: Collection[WorkerId] | None = None,
    ) -> None:
        """Stores the state with these changes, then applies them. ``draining``: the workers that drain and
        have no mark."""
        new_counts = self._counts if counts is None else counts
        new_configured = self._configured if configured is None else configured
        new_drains = self._drains if drains is None else drains
        unmarked = self._began_unix_s.keys() - self._drains.keys() if draining is None else draining
        now_s = self._clock()
        new_began = {worker: self._began_unix_s.get(worker, now_s) for worker in (*new_drains, *unmarked)}
        if not self.ends:
            self._store(
                {
                    "counts": new_counts,
                    "configured": new_configured,
                    "drains": new_drains,
                    "began_unix_s": new_began,
                }
            )
        self._counts, self._configured = new_counts, new_configured
        self._drains, self._began_unix_s = new_drains, new_began


class StateFile:
    """Keeps the state in a file, for a directory that stores nothing itself. The file's folder exists."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def load(self) -> State | None:
        """The stored state. Raises InvalidRequest if the file can't be read."""
        try:
            return json.loads(self._file.read_text(encoding="utf-8")) or None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                f"{self._file}: the cluster's state can't be read ({error}): remove the file to start as "
                "configured"
            ) from error

    def store(self, state: State) -> None:
        """Replaces the state; durable when it returns. Raises InvalidRequest if it can't be stored."""
        new = self._file.with_suffix(".new")
        try:
            with new.open("w", encoding="utf-8") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._file)
        except OSError as error:
            raise InvalidRequest(
                f"{self._file}: the cluster's state can't be stored: {error.strerror or error}"
            ) from error
