"""The directory: which workers are registered, which engine owns each sequence, and where its spans are.

Called by the controller, and by an engine when it takes a sequence over; never on the token path. All of it
is soft state, which may be lost at any time: workers register again, and owners claim and publish again. It
must not know stores or transports. :class:`EmbeddedDirectory` is the implementation in one process.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from farshore.errors import Fenced, InvalidRequest, NotFound
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.base import SpanInfo


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The owner of a sequence and the spans that the sequence holds."""

    owner: WorkerId
    epoch: Epoch
    spans: Mapping[WorkerId, Sequence[SpanInfo]]
    """By lender: the worker whose memory the spans use."""


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

    def claim(self, sequence: SequenceId, owner: WorkerId) -> Epoch:
        """Makes ``owner`` the owner, atomically. Returns its epoch, which is higher than every epoch before,
        of any sequence.

        Spans that an earlier owner published stay listed until the new owner publishes. Not idempotent: a
        repeated claim gets another epoch, which is harmless.
        """
        ...

    def publish(
        self, sequence: SequenceId, epoch: Epoch, spans: Mapping[WorkerId, Sequence[SpanInfo]]
    ) -> None:
        """Replaces the list of the sequence's spans, which is by lender. Idempotent.

        Fenced if a newer epoch was claimed. NotFound if the sequence was never claimed or is forgotten, also
        because the directory was lost. InvalidRequest for an epoch that this directory did not give out.
        """
        ...

    def lookup(self, sequence: SequenceId) -> Placement:
        """The sequence's owner and spans. NotFound if it was never claimed or is forgotten."""
        ...

    def forget(self, sequence: SequenceId, epoch: Epoch) -> None:
        """Removes a sequence that has ended. Idempotent. Fenced and InvalidRequest as for ``publish``."""
        ...

    def debts(self) -> Mapping[tuple[WorkerId, WorkerId], int]:
        """Bytes lent, by (lender, owner), computed from the published spans. Spans that an owner stores
        itself are not debts."""
        ...


@dataclass(slots=True)
class _Registration:
    record: WorkerRecord
    lease: Lease
    expires_s: float


class EmbeddedDirectory:
    """See :class:`Directory` for the contract. Calls wait for one lock and for nothing else.

    One counter gives the epochs of all sequences, so a forgotten sequence leaves nothing behind and its next
    claim still gets a higher epoch. ``first_epoch``: where the counter starts. Stores remember fences for
    longer than this object exists, so a process that replaces a lost directory must pass a higher epoch than
    any before, such as the time in microseconds. ``clock``: seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, first_epoch: int = 1) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._epochs = count(first_epoch)
        self._serials = count()
        self._registrations: dict[WorkerId, _Registration] = {}
        self._placements: dict[SequenceId, Placement] = {}

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

    def claim(self, sequence: SequenceId, owner: WorkerId) -> Epoch:
        with self._lock:
            epoch = Epoch(next(self._epochs))
            before = self._placements.get(sequence)
            self._placements[sequence] = Placement(
                owner=owner, epoch=epoch, spans=before.spans if before else {}
            )
        return epoch

    def publish(
        self, sequence: SequenceId, epoch: Epoch, spans: Mapping[WorkerId, Sequence[SpanInfo]]
    ) -> None:
        copy = {lender: tuple(infos) for lender, infos in spans.items()}
        with self._lock:
            placement = self._placement(sequence)
            _check_epoch(sequence, epoch, placement)
            self._placements[sequence] = replace(placement, spans=copy)

    def lookup(self, sequence: SequenceId) -> Placement:
        with self._lock:
            return self._placement(sequence)

    def forget(self, sequence: SequenceId, epoch: Epoch) -> None:
        with self._lock:
            if sequence in self._placements:
                _check_epoch(sequence, epoch, self._placements[sequence])
                del self._placements[sequence]

    def debts(self) -> Mapping[tuple[WorkerId, WorkerId], int]:
        debts: Counter[tuple[WorkerId, WorkerId]] = Counter()
        with self._lock:
            for placement in self._placements.values():
                for lender, infos in placement.spans.items():
                    if infos and lender != placement.owner:
                        debts[lender, placement.owner] += sum(info.bytes for info in infos)
        return dict(debts)

    def _placement(self, sequence: SequenceId) -> Placement:
        try:
            return self._placements[sequence]
        except KeyError:
            raise NotFound(f"{sequence} was never claimed, or it has ended") from None

    def _expire(self) -> None:
        """Removes the workers whose lease has expired. Called with the lock held."""
        now_s = self._clock()
        expired = [worker for worker, entry in self._registrations.items() if entry.expires_s <= now_s]
        for worker in expired:
            del self._registrations[worker]


def _check_epoch(sequence: SequenceId, epoch: Epoch, placement: Placement) -> None:
    if epoch < placement.epoch:
        raise Fenced(f"epoch {epoch} of {sequence} is over: {placement.owner} owns it in {placement.epoch}")
    if epoch > placement.epoch:
        raise InvalidRequest(f"epoch {epoch} of {sequence} was not claimed here; {placement.epoch} was")
