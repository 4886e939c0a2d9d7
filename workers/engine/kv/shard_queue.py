"""Cold calls to one shard: grants, holds, writes, seals and drops, in order, in a thread of their own.

The token loop hands calls over and goes on (design §2, invariant 9). The same thread keeps the books of what
this engine holds at the shard, and asks a shard that does not answer whether it is back. Called by ``pool``,
``cache``, ``handoff`` and ``prefill``; it must not know why a call is made.

States of a shard, as its engine sees them::

    answering ──frame late──▶ late ──silent for grace_s, refused, or another process──▶ lost
        ▲                      │                                                         │
        └──── a beat answered, the connection for frames made anew ◀── the same process ─┘
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import grpc

from farshore.attention_offload.base import ShardBeat
from farshore.attention_offload.client.base import ShardClient
from farshore.defaults import SHARD_GRACE_S
from farshore.errors import FarshoreError, Late, Lost, Overloaded, TransportError
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import SpanKey, SpanSlice
from farshore.kvstore.prefix import PrefixBlock
from farshore.workers.engine.sequence import Holder

T = TypeVar("T")

BEAT_S = 1.0
PROBE_S = 0.1
"""Between two beats to a shard that does not answer."""
STALLED_S = 1.0
"""A call that takes longer keeps new sequences away from the shard until it returns."""
REFUSED_S = 0.5
"""A shard that refuses connections for so long is gone; a listener that is opened anew is back sooner."""
MOST_CALLS = 4096
"""Calls that wait; beyond, a call fails with Overloaded. Drops are never refused."""

_LOG = logging.getLogger(__name__)


class _Call(NamedTuple):
    run: Callable[[], Any]
    future: Future[Any]
    keeps_books: bool
    """It is made even when the shard does not answer, since it changes what is wanted."""


class ShardQueue:
    """``changed`` is called, from the queue's thread, when a call has ended or the shard's state changed.

    A shard holds spans by sequence. Here each of a sequence's choices is a :class:`Holder`: a span is dropped
    at the shard when the last of the sequence's holders lets go.
    """

    def __init__(
        self,
        worker: WorkerId,
        client: ShardClient,
        *,
        changed: Callable[[], None] = lambda: None,
        grace_s: float = SHARD_GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self._client = client
        self._changed = changed
        self._grace_s = grace_s
        self._clock = clock
        self._wake = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._closed = False
        self._late = False
        """Frames were late, or their connection broke."""
        self._silent = False
        """A cold call was not answered."""
        self._silent_since_s: float | None = None
        self._gone = ""
        """Why the process that this queue was made for is known to be gone; empty: it is not."""
        self._why = ""
        self._refused_since_s: float | None = None
        self._call_began_s: float | None = None
        self._beat: ShardBeat | None = None
        self._beat_s = clock() - BEAT_S
        self._reconcile = False
        self._looked = threading.Event()
        self._holders: dict[tuple[SequenceId, SpanId], set[Holder]] = defaultdict(set)
        self._thread = threading.Thread(target=self._loop, name=f"shard {worker}", daemon=True)
        self._thread.start()

    # -- from any thread ---------------------------------------------------------------------------------

    @property
    def is_readable(self) -> bool:
        """Whether steps may send frames to it."""
        return not self._late and not self._gone

    @property
    def is_placeable(self) -> bool:
        """Whether it answers cold calls, so that spans may be placed there."""
        began_s = self._call_began_s
        stalled = began_s is not None and self._clock() - began_s > STALLED_S
        return self.is_readable and not self._silent and not stalled

    @property
    def lost(self) -> str:
        """Why what lies there is given up; empty while it is not."""
        since_s = self._silent_since_s
        if self._gone or since_s is None or self._clock() - since_s <= self._grace_s:
            return self._gone
        return f"attention worker {self.worker} has not answered for {self._grace_s:g} s: {self._why}"

    @property
    def beat(self) -> ShardBeat | None:
        """What the shard said last of its memory; None: it has never answered."""
        return self._beat

    @property
    def is_idle(self) -> bool:
        """Whether every call so far has ended."""
        return not self._calls and self._call_began_s is None

    def await_look(self, timeout_s: float) -> None:
        """Waits until the shard was asked for the first time, and has answered or not."""
        self._looked.wait(timeout_s)

    def unanswered(self) -> FarshoreError:
        """The error of a call that is not made because the shard does not answer."""
        if lost := self.lost:
            return Lost(lost, shards=[self.worker])
        return Late(f"attention worker {self.worker} does not answer: {self._why}", shards=[self.worker])

    def suspect(self, error: TransportError) -> None:
        """Frames to the shard failed. It is late until it answers a beat and is connected again."""
        with self._wake:
            self._late = True
            self._why = str(error)
            if self._silent_since_s is None:
                self._silent_since_s = self._clock()
            self._wake.notify_all()

    def submit(self, call: Callable[[ShardClient], T]) -> Future[T]:
        """Makes ``call`` behind those before it. The future fails with what the call raised; with Late or
        Lost, and no call made, while the shard does not answer; with Overloaded where too many wait."""
        return self._enqueue(lambda: call(self._client))

    def create(
        self, holder: Holder, key: SpanKey, *, capacity_tokens: int, layout: KVLayout
    ) -> Future[SpanId]:
        """Grants a span, which ``holder`` holds."""
        return self._enqueue(lambda: self.grant(holder, key, capacity_tokens=capacity_tokens, layout=layout))

    def find(
        self, holder: Holder, blocks: Sequence[PrefixBlock], *, layer_class: int
    ) -> Future[tuple[list[SpanSlice], int]]:
        """What lies there of ``blocks``, held by ``holder``, and the shard's free bytes."""

        def run() -> tuple[list[SpanSlice], int]:
            slices: list[SpanSlice] = []
            if blocks:
                slices = self._client.store.find_prefix(
                    blocks, layer_class=layer_class, sequence=holder.sequence, epoch=holder.epoch
                )
                self._hold(holder, [it.span for it in slices])
            return slices, self._ask().free_bytes

        return self._enqueue(run)

    def retain(self, holder: Holder, spans: Sequence[SpanId]) -> None:
        """``holder`` shares ``spans`` that another holder of its sequence has. Nothing is asked of the
        shard."""
        self._enqueue(lambda: self._hold(holder, spans), keeps_books=True)

    def release(self, holder: Holder, spans: Iterable[SpanId] | None = None) -> None:
        """Gives back ``spans``, or all that a closed ``holder`` has. What the shard does not hear of now it
        hears when it answers again."""
        named = None if spans is None else list(spans)
        self._enqueue(lambda: self._let_go(holder, named), keeps_books=True)

    def close(self) -> None:
        """Makes the calls that wait, then ends the thread. Nothing may be submitted any more."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    # -- in the queue's thread ---------------------------------------------------------------------------

    def grant(self, holder: Holder, key: SpanKey, *, capacity_tokens: int, layout: KVLayout) -> SpanId:
        """As :meth:`create`, inside a submitted call."""
        span = self._client.store.create(
            key, capacity_tokens=capacity_tokens, layout=layout, epoch=holder.epoch
        )
        self._hold(holder, [span])
        return span

    def _enqueue(self, run: Callable[[], Any], *, keeps_books: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        with self._wake:
            if not keeps_books and not self._answers():
                future.set_exception(self.unanswered())
            elif not keeps_books and len(self._calls) >= MOST_CALLS:
                future.set_exception(
                    Overloaded(f"{MOST_CALLS} calls to attention worker {self.worker} wait already")
                )
            else:
                self._calls.append(_Call(run, future, keeps_books))
                self._wake.notify_all()
        return future

    def _answers(self) -> bool:
        return not self._late and not self._silent and not self._gone

    def _loop(self) -> None:
        while True:
            with self._wake:
                if not self._calls and not self._closed:
                    self._wake.wait_for(
                        lambda: self._calls or self._closed or self._late, timeout=self._until_beat_s()
                    )
                call = self._calls.popleft() if self._calls else None
                if call is None and self._closed:
                    return
            if call is not None:
                self._make(call)
            elif self._until_beat_s() <= 0:
                self._look()
            elif not self._answers():
                # Late was the news; the next beat is due soon.
                time.sleep(self._until_beat_s())

    def _until_beat_s(self) -> float:
        period_s = BEAT_S if self._gone or self._answers() else PROBE_S
        return max(0.0, self._beat_s + period_s - self._clock())

    def _make(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        if not call.keeps_books and not self._answers():
            call.future.set_exception(self.unanswered())
            self._changed()
            return
        self._call_began_s = began_s = self._clock()
        try:
            result = call.run()
        except Exception as error:
            if isinstance(error, TransportError):
                self._unheard(error, began_s)
            elif call.keeps_books:  # its future has no reader
                _LOG.error("attention worker %s did not take spans back", self.worker, exc_info=error)
                self._reconcile = True
            call.future.set_exception(error)
        else:
            call.future.set_result(result)
        finally:
            self._call_began_s = None
        self._changed()

    def _unheard(self, error: TransportError, began_s: float) -> None:
        """A call was not answered: whether the shard did what it asks is unknown."""
        with self._wake:
            self._silent = self._reconcile = True
            self._why = str(error)
            if self._silent_since_s is None:
                self._silent_since_s = began_s
            self._beat_s = self._clock() - BEAT_S  # ask now

    def _hold(self, holder: Holder, spans: Iterable[SpanId]) -> None:
        for span in spans:
            self._holders[holder.sequence, span].add(holder)
        if holder.closed:
            self._let_go(holder, list(spans))

    def _let_go(self, holder: Holder, spans: Sequence[SpanId] | None) -> None:
        if spans is None:
            spans = [span for (_, span), holders in self._holders.items() if holder in holders]
        unheld = []
        for span in spans:
            key = holder.sequence, span
            holders = self._holders.get(key, set())
            holders.discard(holder)
            if not holders and self._holders.pop(key, None) is not None:
                unheld.append(span)
        if not unheld:
            return
        if not self._answers():
            self._reconcile = True
            return
        try:
            self._client.store.drop(unheld, sequence=holder.sequence, epoch=holder.epoch)
        except TransportError as error:
            self._unheard(error, self._clock())
        except FarshoreError:
            _LOG.exception("attention worker %s refused to take spans back", self.worker)
            self._reconcile = True

    def _wanted(self) -> dict[tuple[SequenceId, Epoch], list[SpanId]]:
        wanted: dict[tuple[SequenceId, Epoch], list[SpanId]] = {}
        for (sequence, span), holders in self._holders.items():
            epoch = max(holder.epoch for holder in holders)
            wanted.setdefault((sequence, epoch), []).append(span)
        return wanted

    def _ask(self) -> ShardBeat:
        """A beat: renews this engine's holds, and tells what the shard has free. With the list of all that is
        wanted where the shard may hold more than that."""
        beat = self._client.beat(self._wanted() if self._reconcile else None)
        known = self._beat.incarnation if self._beat is not None else beat.incarnation
        if (beat.worker, beat.incarnation) != (self.worker, known):
            self._gone = (
                f"attention worker {self.worker} was restarted: {beat.worker} {beat.incarnation} is at its"
                " address, without what was stored"
            )
            raise Lost(self._gone, shards=[self.worker])
        self._reconcile = beat.must_reconcile
        self._beat = beat
        self._beat_s = self._clock()
        return beat

    def _look(self) -> None:
        """Asks the shard whether it is there, and makes its connections anew where it was not."""
        began_s = self._call_began_s = self._clock()
        was_answering = self._answers()
        try:
            if self._ask().must_reconcile:
                self._ask()
            self._client.connect()
        except Exception as error:
            unheard = error if isinstance(error, TransportError) else TransportError(repr(error))
            if not isinstance(error, Lost):
                self._unheard(unheard, began_s)
            self._beat_s = now_s = self._clock()
            if not _is_refused(error):
                self._refused_since_s = None
            elif self._refused_since_s is None:
                self._refused_since_s = now_s
            elif now_s - self._refused_since_s >= REFUSED_S:
                self._gone = f"attention worker {self.worker} is gone: {error}"
        else:
            with self._wake:
                self._late = self._silent = False
                self._silent_since_s = self._refused_since_s = None
                self._gone = ""
        finally:
            self._call_began_s = None
            self._looked.set()
        if was_answering != self._answers():
            _LOG.warning(
                "attention worker %s %s", self.worker, "answers again" if self._answers() else self._why
            )
        self._changed()


def _is_refused(error: BaseException | None) -> bool:
    """Whether the shard's host answered that nothing listens at its address: its process is gone."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        if isinstance(error, grpc.RpcError) and "onnection refused" in (error.details() or ""):
            return True
        error = error.__cause__
    return False
