"""The directory: which workers are registered, and until when.

Never on the token path. All of it is soft state, which may be lost at any time: workers register again. It
must not know stores or transports. :class:`EmbeddedDirectory` is the implementation in one process.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from farshore.errors import InvalidRequest, NotFound
from farshore.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A registered worker."""

    worker: WorkerId
    kind: str
    """The worker's role, such as engine or shard. Not interpreted here."""
    address: str
    capabilities: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A worker's registration, valid for ``ttl_s`` after it was made or last renewed."""

    worker: WorkerId
    serial: int
    ttl_s: float


class Directory(Protocol):
    """The interface of a directory. Thread-safe."""

    def register(
        self, worker: WorkerId, *, kind: str, address: str, capabilities: Mapping[str, str], ttl_s: float
    ) -> Lease:
        """Registers a worker for ``ttl_s``. An earlier lease of the same worker becomes void. InvalidRequest
        unless ``ttl_s`` is positive."""
        ...

    def renew(self, lease: Lease) -> None:
        """Makes the lease valid for its ``ttl_s`` from now. NotFound if it has expired or is void: the worker
        must register again."""
        ...

    def workers(self) -> list[WorkerRecord]:
        """The workers with a valid lease, in order of registration."""
        ...


@dataclass(slots=True)
class _Registration:
    record: WorkerRecord
    lease: Lease
    expires_s: float


class EmbeddedDirectory:
    """See :class:`Directory` for the contract. Calls wait for one lock and for nothing else. ``clock``:
    seconds, monotonic."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._serials = count()
        self._registrations: dict[WorkerId, _Registration] = {}

    def register(
        self, worker: WorkerId, *, kind: str, address: str, capabilities: Mapping[str, str], ttl_s: float
    ) -> Lease:
        if ttl_s <= 0:
            raise InvalidRequest(f"a lease of {ttl_s} s: give more than 0")
        record = WorkerRecord(worker=worker, kind=kind, address=address, capabilities=dict(capabilities))
        with self._lock:
            lease = Lease(worker=worker, serial=next(self._serials), ttl_s=ttl_s)
            self._expire()
            self._registrations.pop(worker, None)
            self._registrations[worker] = _Registration(record, lease, self._clock() + ttl_s)
        return lease

    def renew(self, lease: Lease) -> None:
        with self._lock:
            self._expire()
            registration = self._registrations.get(lease.worker)
            if registration is None or registration.lease != lease:
                raise NotFound(f"the lease of {lease.worker} ran out or was replaced: register again")
            registration.expires_s = self._clock() + lease.ttl_s

    def workers(self) -> list[WorkerRecord]:
        with self._lock:
            self._expire()
            return [registration.record for registration in self._registrations.values()]

    def _expire(self) -> None:
        """Removes the workers whose lease has expired. Called with the lock held."""
        now_s = self._clock()
        expired = [worker for worker, entry in self._registrations.items() if entry.expires_s <= now_s]
        for worker in expired:
            del self._registrations[worker]
