"""What an engine does in a round: admit, prefill, decode; and what becomes of sequences that find no memory,
or whose part of the work fails.

Called by ``engine``'s loop, in its thread. A sequence that finds no memory is parked: it gives back what it
has, and waits::

    waiting ──place──▶ prefill ──▶ running ──▶ finished, or failed
       ▲─────────── parked ◀──────────┘

An error belongs to the sequence whose part of the work raised it (design §2.8).
"""

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from farshore.errors import FarshoreError, Full, Internal, InvalidPlan, Lost, TransportError
from farshore.ids import SequenceId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.decode import step_entry as decode
from farshore.workers.engine.decode.step_entry import StepEntry
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import Pool
from farshore.workers.engine.lookup import Lookup
from farshore.workers.engine.prefill.pacer import PrefillPacer
from farshore.workers.engine.prefill.prompts import Outcome, Prompts
from farshore.workers.engine.requests import Requests
from farshore.workers.engine.retry import Decoder
from farshore.workers.engine.sequence import Failed, Finished, Reason, Sampled, Sequence

_log = logging.getLogger(__name__)

MOST_FAILURES = 8
"""Retryable errors of one sequence in a row; the last of them ends it."""


class Scheduler:
    """Not thread-safe: the engine's thread calls it."""

    def __init__(
        self,
        *,
        requests: Requests,
        pool: Pool,
        cache: SequenceCache,
        prompts: Prompts,
        decoder: Decoder,
        limits: EngineLimits,
    ) -> None:
        self._requests = requests
        self._pool = pool
        self._cache = cache
        self._prompts = prompts
        self._decoder = decoder
        self._limits = limits
        self._pacer = PrefillPacer(limits.max_decode_stall_ms)
        self._running: list[Sequence] = []
        self._placer = ThreadPoolExecutor(1, thread_name_prefix="place")
        self._placing: tuple[Sequence, int, Future[None]] | None = None
        """(sequence, value of ``_freed`` at start, pending result)."""
        self._freed = 0
        """How often memory was given back."""
        self._full_at: int | None = None
        """Value of ``_freed`` when the sequence that waits first found no room."""
        self._ran = False
        """Whether a prompt had a unit to run in the last turn of prefill."""
        self.parkings = 0

    def round(self) -> bool:
        """Whether anything could be done."""
        self._reap()
        progress = self._admit()
        if self._prompts:
            self._ran = False
            self._pacer.turn(self._prefill_unit)
            progress |= self._ran
        if self._running:
            with self._pacer.step():
                progress |= self._decode()
        return progress

    def fail_all(self, error: FarshoreError) -> None:
        for sequence in self._requests.all():
            self._fail(sequence, error)

    def close(self) -> None:
        """Ends placing; what was placed last is given back. After :meth:`fail_all`."""
        self._placer.shutdown(wait=True)
        if self._placing is not None:
            self._cache.release(self._placing[0])

    def _reap(self) -> None:
        """Cancelled requests free their memory before anything else is done, and so do those whose KV is
        lost."""
        for sequence in self._requests.all():
            if sequence.cancelled.is_set():
                self._finish(sequence, Reason.CANCELLED)
        if lost := self._pool.lost():
            for sequence in list(self._live()):
                if hit := sequence.workers & lost.keys():
                    why = "; ".join(lost[worker] for worker in sorted(hit))
                    self._fail(sequence, Lost(f"{why}: send the request again", shards=hit))

    def _live(self) -> Iterator[Sequence]:
        """Sequences that have memory, but for one that is being placed."""
        yield from self._prompts
        yield from self._running

    # -- admission ---------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """First come, first served: grant memory to waiting sequences while there is any. Whether any was
        placed."""
        progress = False
        while self._placing is not None or self._start_placing():
            assert self._placing is not None
            sequence, freed, placed = self._placing
            if not placed.done():
                return progress  # others go on meanwhile: to touch new memory, or to ask a shard, takes time
            self._placing = None
            progress |= self._placed(sequence, freed, placed.exception())
        return progress

    def _placed(self, sequence: Sequence, freed: int, error: BaseException | None) -> bool:
        """Placing came to its end."""
        if sequence not in self._requests.of(sequence.id):
            self._cache.release(sequence)  # it was cancelled meanwhile
            return True
        if error is None:
            self._requests.begin(sequence)
            if sequence.queued_s is None:
                sequence.queued_s = time.monotonic() - sequence.arrived_s
            if sequence.committed < sequence.prefill_tokens:
                self._prompts.add(sequence)
            else:
                self._running.append(sequence)
            return True
        waits = isinstance(error, TransportError | Full) and self._pool.may_answer()
        if isinstance(error, Full) and (list(self._live()) or freed != self._freed):
            self._full_at = freed  # memory will be given back, or was meanwhile
            waits = True
        if not waits:
            self._set_back(sequence, error, park=False)
        return not waits

    def _start_placing(self) -> bool:
        """Place the sequence that waits first, beside the loop. False: none waits, or it has to wait."""
        sequence = self._requests.first_waiting()
        if sequence is None or self._full_at == self._freed:
            return False
        live = list(self._live())
        if live and sum(s.completions for s in (*live, sequence)) > self._limits.running:
            return False
        # Next to others, one block is left for the next of them that needs another.
        if self._cache.tail_blocks_free() < (2 if live else 1):
            return False
        if not self._pool.placeable() and self._pool.may_answer():
            return False
        promised = sum(min(s.growth_tokens, BLOCK_TOKENS) * s.completions for s in live)
        placed = self._placer.submit(self._cache.place, sequence, promised_tokens=promised)
        placed.add_done_callback(lambda _: self._requests.wake())
        self._placing = sequence, self._freed, placed
        return True

    # -- prefill -----------------------------------------------------------------------------------------

    def _prefill_unit(self) -> bool:
        """One unit of a prompt; behind the last one, the first tokens. Whether there are more."""
        outcome = self._prompts.run_unit()
        if outcome is None:
            return False
        self._ran = True
        try:
            self._take_in(outcome)
        except Exception as error:
            self._fail(outcome.sequence, error)
        return len(self._prompts) > 0

    def _take_in(self, outcome: Outcome) -> None:
        sequence, error = outcome.sequence, outcome.error
        if outcome.sealed:
            sequence.failures = 0
        if error is not None:
            self._set_back(sequence, error, park=True)
        elif outcome.logits is not None:
            self._begin(sequence, outcome.logits)
        elif outcome.done:
            self._running.append(sequence)

    def _begin(self, sequence: Sequence, logits: Tensor) -> None:
        """The prompt is sealed: a sequence for each of its completions, and each one's first token. Those
        whose tails find no room are parked."""
        choices = [sequence]
        for choice in range(1, sequence.sampling.n):
            child = sequence.fork(choice)
            choices.append(child)
            self._requests.add_fork(sequence, child)
        sequence.forked = True
        entries = [StepEntry(it, [], [decode.draw_one(it, logits)]) for it in choices]
        for it in choices:
            if self._limits.speculate_tokens:
                it.lookup = Lookup(self._limits.speculate_tokens)
            if it is sequence or self._fork(sequence, it):
                self._running.append(it)
            else:
                self._wait_again(it)
        for entry in entries:
            self._emit(entry)

    def _fork(self, sequence: Sequence, child: Sequence) -> bool:
        """Whether there was room for the child's tail, and a block left."""
        if self._cache.tail_blocks_free() < 2:
            return False
        try:
            self._cache.fork(sequence, child)
        except Full:
            return False
        return True

    # -- decode ------------------------------------------------------------------------------------------

    def _decode(self) -> bool:
        """A token or more for every running sequence whose shards answer. Whether any got one, or ended."""
        unreadable = self._pool.unreadable()
        entries = [
            StepEntry(sequence, [], [])
            for sequence in decode.order(self._running)
            if not sequence.workers & unreadable
        ]
        if self._limits.speculate_tokens:
            decode.guess(entries)
        before = len(self._running)
        entries = self._reserve(entries)
        self._decoder.run(entries)
        for entry in entries:
            sequence = entry.sequence
            try:
                if entry.error is not None:
                    self._set_back(sequence, entry.error, park=False)
                elif entry.drawn:
                    sequence.failures = 0
                    self._emit(entry)
                    if sequence.tail is not None:
                        self._cache.hand_off(sequence)
            except Exception as error:
                self._fail(sequence, error)
        return any(entry.drawn or entry.error for entry in entries) or len(self._running) != before

    def _reserve(self, entries: list[StepEntry]) -> list[StepEntry]:
        """Room in the tails, for the oldest first; others are parked for it. The turns that have room."""
        ready: set[tuple[SequenceId, int]] = set()
        for entry in sorted(entries, key=lambda entry: (entry.sequence.order, entry.sequence.choice)):
            while entry.sequence.tail is not None:
                try:
                    decode.reserve(entry)
                    ready.add(entry.sequence.key)
                    break
                except Full as error:
                    if not self._make_room():
                        # Alone, and still no room. Memory may be on its way back.
                        if self._pool.is_idle():
                            self._fail(entry.sequence, error)
                        break
        return [entry for entry in entries if entry.sequence.key in ready and entry.sequence.tail is not None]

    def _make_room(self) -> bool:
        """Park what was taken on last. False: only one sequence is left."""
        parked = victims(self._live())
        for sequence in parked:
            self._park(sequence)
        return bool(parked)

    # -- what becomes of a sequence ----------------------------------------------------------------------

    def _emit(self, entry: StepEntry) -> None:
        """Tell a sequence's new tokens, and finish it if they are its last."""
        sequence = entry.sequence
        for drawn in entry.drawn:
            sequence.emit(Sampled(drawn.token, sequence.choice, drawn.logprob, drawn.top))
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)

    def _park(self, sequence: Sequence) -> None:
        """It gives its memory back, and waits for it again."""
        self._leave(sequence)
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        self.parkings += 1
        self._requests.park(sequence)

    def _set_back(self, sequence: Sequence, error: BaseException, *, park: bool) -> None:
        """Its part of the work failed: it tries again, or fails. ``park``: where it finds other memory."""
        sequence.failures += 1
        retryable = isinstance(error, FarshoreError) and (error.retryable or isinstance(error, Full))
        if not retryable or sequence.failures >= MOST_FAILURES:
            self._fail(sequence, error)
        elif park:
            self._park(sequence)

    def _finish(self, sequence: Sequence, reason: Reason) -> None:
        """One completion is complete; all of the request's where it is not forked yet."""
        if not self._forget(sequence):
            return
        for choice in range(sequence.choice, sequence.choice + sequence.completions):
            queued_s = sequence.queued_s or 0.0
            sequence.emit(Finished(reason, queued_s, dict(sequence.attended_bytes), choice))

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """All of its request ends."""
        if not isinstance(error, FarshoreError) or isinstance(error, InvalidPlan):
            _log.error("sequence %s failed", sequence.key, exc_info=error)
            error = Internal(f"the engine failed with {type(error).__name__}: {error}")
        together = self._requests.of(sequence.id)
        for it in together:
            self._forget(it)
        if together:
            sequence.emit(Failed(error))

    def _forget(self, sequence: Sequence) -> bool:
        """A sequence's memory is free, and the engine knows it no more. False: it did not."""
        if not self._requests.forget(sequence):
            return False
        self._leave(sequence)
        return True

    def _leave(self, sequence: Sequence) -> None:
        self._prompts.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if self._placing is None or self._placing[0] is not sequence:
            self._cache.release(sequence)
        self._freed += 1
        for it in self._running:
            it.refused_at = None  # there may be room for its blocks now


def victims(placed: Iterable[Sequence]) -> list[Sequence]:
    """Of the sequences that have memory: all choices of the request that was taken on last. The oldest
    request keeps its first choice, so that it always finishes: where there is no other request, its last
    choice, and [] where there is only one choice."""
    by_age = sorted(placed, key=lambda sequence: (sequence.order, sequence.choice))
    if len(by_age) < 2:
        return []
    oldest, newest = by_age[0], by_age[-1]
    if oldest.order == newest.order:
        return [newest]
    return [sequence for sequence in by_age if sequence.order == newest.order]
