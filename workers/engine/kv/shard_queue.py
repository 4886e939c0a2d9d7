"""Cold calls to one shard: grants, holds, writes, seals and drops, made in order by a thread of their own.

The token loop enqueues calls and continues (invariant 9, docs/architecture.md). The same thread records which
spans this engine holds at the shard, sends beats, and probes a shard that does not answer. Called by
``pool``, ``cache``, ``handoff`` and ``prefill``. It must not know why a call is made.

States of a shard, as its engine sees them::

    answering ──frame late──▶ late ──silent for grace_s, refused, or another process──▶ lost
        ▲                      │                                                         │
        └──── a beat is answered and the hot connections are made anew ◀─ same process ──┘
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from farshore.attention_offload.base import ShardBeat
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.transport.connect import is_refused
from farshore.defaults import SHARD_GRACE_S
from farshore.errors import FarshoreError, Late, Lost, Overloaded, TransportError
from farshore.ids import SpanId, WorkerId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import PrefixFound, SpanKey
from farshore.kvstore.prefix import PrefixBlock
from farshore.workers.engine.kv.held_spans import HeldSpans
from farshore.workers.engine.sequence import Holder

T = TypeVar("T")

BEAT_S = 1.0
"""Time between two beats to a shard that answers."""
PROBE_S = 0.1
"""Time between two beats to a shard that does not answer."""
STALLED_S = 1.0
"""While a call takes longer than this, no sequence is placed on the shard."""
REFUSED_S = 0.5
"""A shard that refuses connections for this long is gone; a server that reopens its listener is faster."""
MOST_CALLS = 4096
"""Most calls that wait in a queue; further ones fail with Overloaded. Changes of holds are never refused."""

_LOG = logging.getLogger(__name__)


class _Call(NamedTuple):
    """A call that waits in the queue, and the future of its result."""

    run: Callable[[], Any]
    future: Future[Any]
    updates_holds: bool
    """Whether it changes the recorded holds. Such a call runs even if the shard does not answer."""


class ShardQueue:
    """The cold calls to one shard, in order, and the spans that this engine holds there.

    ``changed`` is called from the queue's thread when a call has ended or the shard's state has changed.
    ``grace_s`` is the time that the shard may stay silent before it is lost.

    Each choice of a sequence has a :class:`Holder`. A span is dropped when its last holder releases it.
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
        self.client = client
        self._changed = changed
        self._grace_s = grace_s
        self._clock = clock
        self._wake = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._closed = False
        self._late = False
        """A frame was late, or the hot connection broke."""
        self._silent = False
        """A cold call was not answered."""
        self._silent_since_s: float | None = None
        self._gone_reason = ""
        """Why the shard's process is known to be gone; empty if it is not."""
        self._last_error = ""
        """Text of the last error by which the shard was found late or silent."""
        self._refused_since_s: float | None = None
        self._call_began_s: float | None = None
        self._beat: ShardBeat | None = None
        self._beat_s = clock() - BEAT_S
        self._must_reconcile = False
        """Whether the next beat lists all wanted spans, since the shard may hold others."""
        self._beat_tried = threading.Event()
        self._held = HeldSpans()
        self._free_bytes = 0
        self._thread = threading.Thread(target=self._loop, name=f"shard {worker}", daemon=True)
        self._thread.start()

    # -- from any thread ---------------------------------------------------------------------------------

    @property
    def is_readable(self) -> bool:
        """Whether steps may send frames to the shard."""
        return not self._late and not self._gone_reason

    @property
    def is_placeable(self) -> bool:
        """Whether the shard answers cold calls, so that spans may be placed on it. False before its first
        beat."""
        began_s = self._call_began_s
        stalled = began_s is not None and self._clock() - began_s > STALLED_S
        return self._beat is not None and self.is_readable and not self._silent and not stalled

    @property
    def lost_reason(self) -> str:
        """Why the shard is lost; empty if it is not."""
        since_s = self._silent_since_s
        if self._gone_reason or since_s is None or self._clock() - since_s <= self._grace_s:
            return self._gone_reason
        return f"attention worker {self.worker} has not answered for {self._grace_s:g} s: {self._last_error}"

    @property
    def beat(self) -> ShardBeat | None:
        """The shard's last beat, with its memory; None if it has never answered."""
        return self._beat

    @property
    def free_bytes(self) -> int:
        """The bytes that the shard could grant when it last said so, less what was granted since then."""
        return self._free_bytes

    @property
    def is_idle(self) -> bool:
        """Whether all calls so far have ended."""
        return not self._calls and self._call_began_s is None

    def await_first_beat(self, timeout_s: float) -> None:
        """Blocks until the first beat has been answered or has failed, for ``timeout_s`` at most."""
        self._beat_tried.wait(timeout_s)

    def unanswered(self) -> FarshoreError:
        """Returns the error of a call that is not made since the shard does not answer: Lost or Late."""
        if reason := self.lost_reason:
            return Lost(reason, shards=[self.worker])
        return Late(
            f"attention worker {self.worker} does not answer: {self._last_error}", shards=[self.worker]
        )

    def suspect(self, error: TransportError) -> None:
        """Marks the shard late, since a frame failed, until it answers a beat and is connected again."""
        with self._wake:
            self._late = True
            self._last_error = str(error)
            if self._silent_since_s is None:
                self._silent_since_s = self._clock()
            self._wake.notify_all()

    def submit(self, call: Callable[[ShardClient], T]) -> Future[T]:
        """Enqueues ``call``, which runs in the queue's thread after all earlier ones.

        The future fails with the call's error. It fails with Late or Lost if the shard does not answer, and
        with Overloaded if MOST_CALLS wait; the call is then not made.
        """
        return self._enqueue(lambda: call(self.client))

    def create(
        self, holder: Holder, key: SpanKey, *, capacity_tokens: int, layout: KVLayout
    ) -> Future[SpanId]:
        """Enqueues the grant of a span, which ``holder`` then holds. Fails as :meth:`submit` or with Full. A
        beat goes first: a sequence must not depend on a shard that was lost or restarted since the last."""

        def run() -> SpanId:
            self._send_beat()
            return self.grant(holder, key, capacity_tokens=capacity_tokens, layout=layout)

        return self._enqueue(run)

    def find(self, names: Sequence[bytes], *, layer_class: int) -> Future[PrefixFound]:
        """Enqueues a search for blocks by their names. A hint: nothing is held, no tokens are compared."""

        def run() -> PrefixFound:
            found = self.client.store.find_prefix(names, layer_class=layer_class)
            self._free_bytes = found.available_bytes
            return found

        return self._enqueue(run)

    def hold_prefix(
        self, holder: Holder, blocks: Sequence[PrefixBlock], *, layer_class: int
    ) -> Future[PrefixFound]:
        """Enqueues a search that compares the tokens of ``blocks``; ``holder`` then holds what is found."""

        def run() -> PrefixFound:
            found = self.client.store.hold_prefix(
                blocks, layer_class=layer_class, sequence=holder.sequence, epoch=holder.epoch
            )
            self._hold(holder, [span_slice.span for span_slice in found.slices])
            self._free_bytes = found.available_bytes
            return found

        return self._enqueue(run)

    def refresh(self) -> Future[ShardBeat]:
        """Enqueues a beat, after which :attr:`free_bytes` is what the shard reports."""
        return self._enqueue(self._send_beat)

    def adopt(self, holder: Holder, span: SpanId) -> Future[None]:
        """Enqueues a hold of ``holder`` on a span that the shard imported. Fails as :meth:`submit`."""

        def run() -> None:
            self.client.store.hold([span], sequence=holder.sequence, epoch=holder.epoch)
            self._hold(holder, [span])

        return self._enqueue(run)

    def retain(self, holder: Holder, spans: Sequence[SpanId]) -> None:
        """Adds ``holder`` to ``spans``, which another choice holds. Makes no call to the shard."""
        self._enqueue(lambda: self._hold(holder, spans), updates_holds=True)

    def release(self, holder: Holder, spans: Iterable[SpanId] | None = None) -> None:
        """Releases ``spans``, or all spans of a closed ``holder`` if None.

        If the shard does not answer, it learns of the drops by the first beat that it answers.
        """
        released = None if spans is None else list(spans)
        self._enqueue(lambda: self._unhold(holder, released), updates_holds=True)

    def close(self) -> None:
        """Makes the calls that wait, then ends the thread. No call may be enqueued afterwards."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    # -- in the queue's thread ---------------------------------------------------------------------------

    def grant(self, holder: Holder, key: SpanKey, *, capacity_tokens: int, layout: KVLayout) -> SpanId:
        """Grants a span as :meth:`create` does; for use inside a submitted call."""
        span = self.client.store.create(
            key, capacity_tokens=capacity_tokens, layout=layout, epoch=holder.epoch
        )
        self._free_bytes -= -(-capacity_tokens // layout.block_tokens) * layout.block_bytes
        self._hold(holder, [span])
        return span

    def _enqueue(self, run: Callable[[], Any], *, updates_holds: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        with self._wake:
            if not updates_holds and not self._answers():
                future.set_exception(self.unanswered())
            elif not updates_holds and len(self._calls) >= MOST_CALLS:
                future.set_exception(
                    Overloaded(f"{MOST_CALLS} calls to attention worker {self.worker} wait already")
                )
            else:
                self._calls.append(_Call(run, future, updates_holds))
                self._wake.notify_all()
        return future

    def _answers(self) -> bool:
        return not self._late and not self._silent and not self._gone_reason

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
                self._run(call)
            elif self._until_beat_s() <= 0:
                self._probe()
            elif not self._answers():
                # The thread woke because the shard became late. It sleeps until the next beat is due.
                time.sleep(self._until_beat_s())

    def _until_beat_s(self) -> float:
        period_s = BEAT_S if self._gone_reason or self._answers() else PROBE_S
        return max(0.0, self._beat_s + period_s - self._clock())

    def _run(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        if not call.updates_holds and not self._answers():
            call.future.set_exception(self.unanswered())
            self._changed()
            return
        self._call_began_s = began_s = self._clock()
        try:
            result = call.run()
        except Exception as error:
            if isinstance(error, TransportError):
                self._mark_silent(error, began_s)
            elif call.updates_holds:  # No caller reads its future.
                _LOG.error("attention worker %s did not take spans back", self.worker, exc_info=error)
                self._must_reconcile = True
            self._call_began_s = None
            call.future.set_exception(error)
        else:
            self._call_began_s = None  # First, so that a caller that waited finds the shard idle.
            call.future.set_result(result)
        self._changed()

    def _mark_silent(self, error: TransportError, began_s: float) -> None:
        """Marks the shard silent. It may have carried out the unanswered call, so its holds may differ."""
        with self._wake:
            self._silent = self._must_reconcile = True
            self._last_error = str(error)
            if self._silent_since_s is None:
                self._silent_since_s = began_s
            self._beat_s = self._clock() - BEAT_S  # The next beat is due now.

    def _hold(self, holder: Holder, spans: Iterable[SpanId]) -> None:
        """Records that ``holder`` holds ``spans``; releases them at once if it is closed."""
        spans = list(spans)
        self._held.add(holder, spans)
        if holder.closed:
            self._unhold(holder, spans)

    def _unhold(self, holder: Holder, spans: Sequence[SpanId] | None) -> None:
        """Removes ``holder`` from ``spans`` (all if None), and drops spans without holders at the shard."""
        unheld = self._held.remove(holder, spans)
        if not unheld:
            return
        if not self._answers():
            self._must_reconcile = True
            return
        try:
            self.client.store.drop(unheld, sequence=holder.sequence, epoch=holder.epoch)
        except TransportError as error:
            self._mark_silent(error, self._clock())
        except FarshoreError:
            _LOG.exception("attention worker %s refused to take spans back", self.worker)
            self._must_reconcile = True

    def _send_beat(self) -> ShardBeat:
        """Sends a beat, which renews this engine's holds, and returns the answer.

        The beat lists all wanted spans if the shard may hold others. Raises Lost if another process or
        another incarnation answers.
        """
        beat = self.client.beat(self._held.wanted() if self._must_reconcile else None)
        known = self._beat.incarnation if self._beat is not None else beat.incarnation
        if (beat.worker, beat.incarnation) != (self.worker, known):
            self._gone_reason = (
                f"attention worker {self.worker} was restarted: {beat.worker} {beat.incarnation} is at its"
                " address, without what was stored"
            )
            raise Lost(self._gone_reason, shards=[self.worker])
        self._must_reconcile = beat.must_reconcile
        self._beat = beat
        self._free_bytes = beat.free_bytes
        self._beat_s = self._clock()
        return beat

    def _probe(self) -> None:
        """Sends a beat and reconnects the hot connections that are closed; updates the shard's state."""
        began_s = self._call_began_s = self._clock()
        was_answering = self._answers()
        try:
            if self._send_beat().must_reconcile:
                self._send_beat()
            self.client.connect()
        except Exception as error:
            if not isinstance(error, Lost):
                silence = error if isinstance(error, TransportError) else TransportError(repr(error))
                self._mark_silent(silence, began_s)
            self._beat_s = now_s = self._clock()
            if not is_refused(error):
                self._refused_since_s = None
            elif self._refused_since_s is None:
                self._refused_since_s = now_s
            elif now_s - self._refused_since_s >= REFUSED_S:
                self._gone_reason = f"attention worker {self.worker} is gone: {error}"
        else:
            with self._wake:
                self._late = self._silent = False
                self._silent_since_s = self._refused_since_s = None
                self._gone_reason = ""
        finally:
            self._call_began_s = None
            self._beat_tried.set()
        if was_answering != self._answers():
            _LOG.warning(
                "attention worker %s %s",
                self.worker,
                "answers again" if self._answers() else self._last_error,
            )
        self._changed()
