"""Whose holds a shard keeps: each belongs to the incarnation of an engine, which renews its lease by calling.

The store knows sequences and epochs; this book, beside it, knows which engine brought each of them here. An
engine that makes no call for ``LEASE_S`` is taken for dead: what it brought is given back, unsealed spans and
all, while named blocks stay as cache by the store's own rules. Content never changes once sealed, so keeping
a hold for too long is safe, and a hold given back too early shows as NotFound, never as a wrong token.

A shard that was paused itself (SIGSTOP, a suspended machine) heard no engine, and may still have calls in its
queues that their callers gave up. So the leases begin anew when its clock has jumped, and every engine is
asked to say completely what it still wants (``must_reconcile``). What an engine sent before such a list and
the shard meets after it is stale, and refused: the engine's own clock, sent with each call, tells.

Called by the gRPC service and by its ticker. It must not know memory or networks.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from farshore.attention_offload.base import Caller, Wanted
from farshore.attention_offload.shard.checks import check_name
from farshore.errors import Cancelled, Overloaded
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kvstore.store.store import LocalStore

_LOG = logging.getLogger(__name__)

LEASE_S = 30.0
TICK_S = 1.0
PAUSE_S = 2.0
"""A tick that comes later than this behind its time means that the whole process stood still."""

TURN_S = 5.0
"""How long a call waits for another one of its engine: a grant touches new memory, a second for some GiB."""

MOST_ENGINES = 1024


@dataclass(slots=True, eq=False)
class _Engine:
    seen_s: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One change at a time: a call is wholly before a complete list, or wholly after it."""
    brought: dict[SequenceId, set[Epoch]] = field(default_factory=dict)
    newest_ns: int = 0
    """When the newest change that was made was sent ..."""
    listed_ns: int = 0
    """... and the newest complete list."""
    must_reconcile: bool = True
    """A call of before the shard knew the engine may still be under way."""
    is_over: bool = False


class EngineHolds:
    """Thread-safe. ``clock``: the shard's own, monotonic, in seconds."""

    def __init__(self, store: LocalStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._engines: dict[str, _Engine] = {}
        self._ticked_s = clock()

    @contextmanager
    def changing(self, caller: Caller, sequence: SequenceId, epoch: Epoch) -> Iterator[None]:
        """A call of the engine that makes or gives back holds of the sequence. Raises Cancelled where a
        complete list that was sent later has been acted on: the engine has given this call up."""
        with self._turn(caller.engine) as engine:
            if caller.sent_ns < engine.listed_ns:
                raise Cancelled(f"engine {caller.engine} has listed what it wants since it sent this call")
            engine.newest_ns = max(engine.newest_ns, caller.sent_ns)
            engine.brought.setdefault(sequence, set()).add(epoch)
            yield

    def beat(self, caller: Caller, wanted: Wanted | None) -> bool:
        """Renews the engine's lease; one that is unknown is known from now on. ``wanted``: all that it wants
        here, so the rest of what it brought is given back; None: it doesn't say. Returns whether it must say.

        A list that was sent before a change that the shard has made is stale, and only renews.
        """
        with self._turn(caller.engine) as engine:
            if wanted is not None and caller.sent_ns >= max(engine.newest_ns, engine.listed_ns):
                engine.listed_ns = caller.sent_ns
                self._give_back(engine, wanted)
                engine.must_reconcile = False
            return engine.must_reconcile

    def renew(self, engine: str) -> None:
        """A call that changes no holds: a sign of life of an engine that is known."""
        with self._lock:
            if it := self._engines.get(engine):
                it.seen_s = self._clock()

    def tick(self) -> None:
        """Once every ``TICK_S``: what dead engines brought is given back."""
        with self._lock:
            self._notice_pause()
            now_s = self._ticked_s = self._clock()
            engines = list(self._engines.items())
        for name, engine in engines:
            if not engine.lock.acquire(blocking=False):
                continue  # in the middle of a call
            try:
                if now_s - engine.seen_s >= LEASE_S:
                    with self._lock:
                        del self._engines[name]
                    engine.is_over = True
                    self._give_back(engine, {})
                else:
                    self._forget_ended(engine)
            finally:
                engine.lock.release()

    def engines(self) -> list[str]:
        with self._lock:
            return sorted(self._engines)

    @contextmanager
    def _turn(self, name: str) -> Iterator[_Engine]:
        engine = self._enter(name)
        while engine.is_over:  # given up while this call waited for it
            engine.lock.release()
            engine = self._enter(name)
        try:
            yield engine
        finally:
            engine.seen_s = self._clock()
            engine.lock.release()

    def _enter(self, name: str) -> _Engine:
        check_name("an engine's incarnation", name)
        with self._lock:
            self._notice_pause()
            engine = self._engines.get(name)
            if engine is None:
                if len(self._engines) >= MOST_ENGINES:
                    raise Overloaded(f"{MOST_ENGINES} engines hold leases here: try again later")
                engine = self._engines[name] = _Engine(self._clock())
            engine.seen_s = self._clock()
        if not engine.lock.acquire(timeout=TURN_S):
            raise Overloaded(f"another call of engine {name} has taken over {TURN_S:g} s: try again later")
        return engine

    def _notice_pause(self) -> None:
        """In the lock: all leases begin anew, with a full term, where this process stood still."""
        now_s = self._clock()
        if now_s - self._ticked_s <= TICK_S + PAUSE_S:
            return
        self._ticked_s = now_s
        for engine in self._engines.values():
            engine.seen_s = now_s
            engine.must_reconcile = True

    def _give_back(self, engine: _Engine, wanted: Wanted) -> None:
        """All that the engine brought and doesn't want, but for what another engine brought too: that is the
        other one's to give back."""
        kept: dict[SequenceId, set[SpanId]] = {}
        for (sequence, _), spans in wanted.items():
            kept.setdefault(sequence, set()).update(spans)
        with self._lock:
            others = [it for it in self._engines.values() if it is not engine]
        for sequence, epochs in engine.brought.items():
            alone = epochs.difference(*(it.brought.get(sequence, ()) for it in others))
            if alone:
                self._store.drop_sequence(sequence, epoch=max(alone), keep=kept.get(sequence, ()))
        self._forget_ended(engine)

    def _forget_ended(self, engine: _Engine) -> None:
        holding = self._store.sequences()
        for sequence in [it for it in engine.brought if it not in holding]:
            del engine.brought[sequence]


class Ticker:
    """Calls ``tick`` every ``TICK_S`` in a daemon thread of its own, until :meth:`stop`."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Idempotent."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(TICK_S):
            try:
                self._tick()
            except Exception:  # the next one may do better; without any, no lease would end
                _LOG.exception("engines' leases were not looked at")
