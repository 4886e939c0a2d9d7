"""Leases a shard's holds to engines, and drops the holds of an engine that is dead.

Called by the gRPC service, by the bulk loop, and every TICK_S by ``service.serve``. It must not know memory
or networks.

The store records sequences and epochs; this module records which engine created holds for them. Every call of
an engine renews its lease. An engine that makes no call for ``LEASE_S`` is considered dead, and the holds of
its sequences are dropped. Its unsealed spans are freed; named blocks stay in the cache by the store's rules.
Sealed content never changes, so keeping a hold for too long is safe, and dropping one too early causes
NotFound, never a wrong token.

A shard that was paused itself (SIGSTOP, a suspended machine) received no calls, and its queues may hold calls
that the engines have given up. When its clock has jumped, all leases start anew, and each engine must send a
complete list of the spans that it still wants (``must_reconcile``). A call that an engine sent before such a
list, but that the shard processes after the list, is stale and is refused. Send times are compared on the
engine's own clock, which each call carries.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from farshore.attention_offload.base import Caller, Wanted
from farshore.attention_offload.shard.checks import check_id
from farshore.errors import Cancelled, Overloaded
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kvstore.store.store import LocalStore

LEASE_S = 30.0
TICK_S = 1.0
PAUSE_S = 2.0
"""A tick that is later than this means that the whole process was paused."""

CALL_WAIT_S = 5.0
"""How long a call waits for another call of its engine. A grant touches new memory, which takes a second for
some GiB."""

MOST_ENGINES = 1024


@dataclass(slots=True, eq=False)
class _Lease:
    """One engine's lease, and the holds that it covers."""

    seen_s: float
    """When the engine's latest call came, on the shard's clock."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held during a change, so that a call is entirely before a complete list or entirely after it."""
    epochs: dict[SequenceId, set[Epoch]] = field(default_factory=dict)
    """The sequences, and their epochs, whose holds the engine has created or dropped."""
    last_change_ns: int = 0
    """The latest send time, on the engine's clock, of a change that was made."""
    last_list_ns: int = 0
    """The latest send time, on the engine's clock, of a complete list that was processed."""
    must_reconcile: bool = True
    """True at first: calls that the engine sent before the lease began may still arrive."""
    expired: bool = False


class EngineHolds:
    """The leases of all engines of a shard. Thread-safe. ``clock`` gives the shard's monotonic seconds."""

    def __init__(self, store: LocalStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._ticked_s = clock()

    @contextmanager
    def changing(self, caller: Caller, sequence: SequenceId, epoch: Epoch) -> Iterator[None]:
        """A context in which a call of ``caller`` creates or drops holds of the sequence. Renews the lease.

        Raises Cancelled if the shard has processed a complete list that the engine sent later: the engine has
        given this call up. Raises Overloaded if another call of the engine takes longer than CALL_WAIT_S, or
        if MOST_ENGINES engines have leases."""
        with self._locked(caller.engine) as lease:
            if caller.sent_ns < lease.last_list_ns:
                raise Cancelled(f"engine {caller.engine} has listed what it wants since it sent this call")
            lease.last_change_ns = max(lease.last_change_ns, caller.sent_ns)
            lease.epochs.setdefault(sequence, set()).add(epoch)
            yield

    def beat(self, caller: Caller, wanted: Wanted | None) -> bool:
        """Renews the engine's lease, or starts one. Returns whether a complete list is needed.

        ``wanted`` is the complete list of the spans that the engine wants here; its other holds are dropped.
        None leaves its holds unchanged. A list is stale, and only renews the lease, if the engine sent it
        before a change or a list that the shard has processed. Raises Overloaded as :meth:`changing`.
        """
        with self._locked(caller.engine) as lease:
            if wanted is not None and caller.sent_ns >= max(lease.last_change_ns, lease.last_list_ns):
                lease.last_list_ns = caller.sent_ns
                self._drop_all_but(lease, wanted)
                lease.must_reconcile = False
            return lease.must_reconcile

    def renew(self, engine: str) -> None:
        """Renews the engine's lease, if it has one, for a call that changes no holds."""
        with self._lock:
            if lease := self._leases.get(engine):
                lease.seen_s = self._clock()

    def tick(self) -> None:
        """Drops the holds of engines whose leases have expired. Must be called every ``TICK_S``."""
        with self._lock:
            self._notice_pause()
            now_s = self._ticked_s = self._clock()
            leases = list(self._leases.items())
        for engine, lease in leases:
            if not lease.lock.acquire(blocking=False):
                continue  # A call of this engine is in progress.
            try:
                if now_s - lease.seen_s >= LEASE_S:
                    with self._lock:
                        del self._leases[engine]
                    lease.expired = True
                    self._drop_all_but(lease, {})
                else:
                    self._forget_ended(lease)
            finally:
                lease.lock.release()

    def engines(self) -> list[str]:
        """The incarnations of the engines that have leases, sorted."""
        with self._lock:
            return sorted(self._leases)

    @contextmanager
    def _locked(self, engine: str) -> Iterator[_Lease]:
        """A context that holds the lock of the engine's lease. Renews the lease at both ends."""
        lease = self._lock_lease(engine)
        while lease.expired:  # It expired while this call waited for the lock.
            lease.lock.release()
            lease = self._lock_lease(engine)
        try:
            yield lease
        finally:
            lease.seen_s = self._clock()
            lease.lock.release()

    def _lock_lease(self, engine: str) -> _Lease:
        check_id("an engine's incarnation", engine)
        with self._lock:
            self._notice_pause()
            lease = self._leases.get(engine)
            if lease is None:
                if len(self._leases) >= MOST_ENGINES:
                    raise Overloaded(f"{MOST_ENGINES} engines hold leases here: try again later")
                lease = self._leases[engine] = _Lease(self._clock())
            lease.seen_s = self._clock()
        if not lease.lock.acquire(timeout=CALL_WAIT_S):
            raise Overloaded(
                f"another call of engine {engine} has taken over {CALL_WAIT_S:g} s: try again later"
            )
        return lease

    def _notice_pause(self) -> None:
        """Starts all leases anew if this process was paused. The caller holds ``_lock``."""
        now_s = self._clock()
        if now_s - self._ticked_s <= TICK_S + PAUSE_S:
            return
        self._ticked_s = now_s
        for lease in self._leases.values():
            lease.seen_s = now_s
            lease.must_reconcile = True

    def _drop_all_but(self, lease: _Lease, wanted: Wanted) -> None:
        """Drops the lease's holds, except those in ``wanted`` and those that another lease covers too."""
        kept: dict[SequenceId, set[SpanId]] = {}
        for (sequence, _), spans in wanted.items():
            kept.setdefault(sequence, set()).update(spans)
        with self._lock:
            others = [other for other in self._leases.values() if other is not lease]
        for sequence, epochs in lease.epochs.items():
            unshared = epochs.difference(*(other.epochs.get(sequence, ()) for other in others))
            if unshared:
                self._store.drop_sequence(sequence, epoch=max(unshared), keep=kept.get(sequence, ()))
        self._forget_ended(lease)

    def _forget_ended(self, lease: _Lease) -> None:
        """Removes sequences without holds from the lease; it would grow with every request otherwise."""
        holding = self._store.sequences()
        for sequence in [sequence for sequence in lease.epochs if sequence not in holding]:
            del lease.epochs[sequence]
