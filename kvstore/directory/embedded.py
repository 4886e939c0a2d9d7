"""Who is there, who owns which sequence, and where its spans are.

Asked by the controller and by engines when a sequence is taken over; never on the token path. All of it is
soft state: workers register again and owners claim and publish again, so it can be lost at any time. It must
not know stores or transports. :class:`EmbeddedDirectory` lives in one process.
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
    worker: WorkerId
    kind: str
    """What it does, engine or shard; not interpreted here."""
    address: str
    capabilities: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A worker's claim to be there. Renew it within ``ttl_s``, or stop working."""

    worker: WorkerId
    serial: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    owner: WorkerId
    epoch: Epoch
    spans: Mapping[WorkerId, Sequence[SpanInfo]]
    """By the worker that lends the memory."""


class Directory(Protocol):
    """Thread-safe."""

    def register(
        self, worker: WorkerId, *, kind: str, address: str, capabilities: Mapping[str, str], ttl_s: float
    ) -> Lease:
        """Enters a worker, or enters it anew: an earlier lease of the same worker is void then."""
        ...

    def renew(self, lease: Lease) -> None:
        """Extends the lease by its ``ttl_s`` from now. NotFound if it ran out or is void: register again."""
        ...

    def workers(self) -> list[WorkerRecord]:
        """Those whose lease holds, in order of registration."""
        ...

    def claim(self, sequence: SequenceId, owner: WorkerId) -> Epoch:
        """Makes ``owner`` the owner, atomically; returns its epoch: higher than any before, of any sequence.

        Spans published earlier stay listed until the new owner publishes. Not idempotent: a repeated claim
        is a new epoch, which is harmless.
        """
        ...

    def publish(
        self, sequence: SequenceId, epoch: Epoch, spans: Mapping[WorkerId, Sequence[SpanInfo]]
    ) -> None:
        """Replaces the sequence's spans, given by lender. Idempotent.

        Fenced if a newer epoch was claimed; NotFound if the sequence was never claimed or is forgotten (also:
        the directory was lost). InvalidRequest for an epoch that was not given out here.
        """
        ...

    def lookup(self, sequence: SequenceId) -> Placement:
        """NotFound if the sequence was never claimed or is forgotten."""
        ...

    def forget(self, sequence: SequenceId, epoch: Epoch) -> None:
        """The sequence is over. Idempotent. Fenced and InvalidRequest as for ``publish``."""
        ...

    def debts(self) -> Mapping[tuple[WorkerId, WorkerId], int]:
        """Bytes lent, by (lender, owner); computed from the published spans. What is its own nobody owes."""
        ...


@dataclass(slots=True)
class _Registration:
    record: WorkerRecord
    lease: Lease
    expires_s: float


class EmbeddedDirectory:
    """See :class:`Directory` for the contract. One lock; no call waits for anything else.

    Epochs come from one counter for all sequences, so that forgetting a sequence forgets everything about it
    and its next claim is still higher. ``first_epoch``: where the counter starts. Stores remember fences for
    longer than this object lives, so a process that replaces a lost directory passes something higher than
    before (the time in microseconds, say).
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
            raise NotFound(f"nobody has claimed {sequence}, or it is over") from None

    def _expire(self) -> None:
        now_s = self._clock()
        for worker in [w for w, r in self._registrations.items() if r.expires_s <= now_s]:
            del self._registrations[worker]


def _check_epoch(sequence: SequenceId, epoch: Epoch, placement: Placement) -> None:
    if epoch < placement.epoch:
        raise Fenced(f"epoch {epoch} of {sequence} is over: {placement.owner} owns it in {placement.epoch}")
    if epoch > placement.epoch:
        raise InvalidRequest(f"epoch {epoch} of {sequence} was not claimed here; {placement.epoch} was")
