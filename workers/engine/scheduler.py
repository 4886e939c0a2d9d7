"""The rounds of an engine: admission, prefill, decode, and what happens to a sequence after an error.

Called by ``engine``'s loop, in its thread. A sequence that finds no memory is parked: it gives back its
memory and waits::

    waiting ──place──▶ prefill ──▶ running ──▶ finished, or failed
       ▲─────────── parked ◀──────────┘

An error belongs to the sequence whose work raised it (invariant 8, docs/architecture.md). The scheduler must
not know gRPC or how shards are called.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from farshore.errors import FarshoreError, Full, Internal, InvalidPlan, Lost, TransportError
from farshore.ids import SequenceId, WorkerId
from farshore.kernels.base import BLOCK_TOKENS
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.decode import step_entry
from farshore.workers.engine.decode.step_entry import StepEntry
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.lookup import PromptLookup
from farshore.workers.engine.prefill.pacer import PrefillPacer
from farshore.workers.engine.prefill.prompts import Outcome, Prompts
from farshore.workers.engine.requests import Requests, victims
from farshore.workers.engine.retry import StepRunner
from farshore.workers.engine.sequence import Failed, Finished, Reason, Sampled, Sequence

_log = logging.getLogger(__name__)

MOST_FAILURES = 8
"""A sequence fails at this many consecutive retryable errors."""


class Scheduler:
    """Schedules the sequences of one engine. Not thread-safe: only the engine's thread calls it."""

    def __init__(
        self,
        *,
        requests: Requests,
        pool: ShardPool,
        cache: SequenceCache,
        prompts: Prompts,
        runner: StepRunner,
        limits: EngineLimits,
    ) -> None:
        self._requests = requests
        self._pool = pool
        self._cache = cache
        self._prompts = prompts
        self._runner = runner
        self._limits = limits
        self._pacer = PrefillPacer(limits.max_decode_stall_ms)
        self._running: list[Sequence] = []
        self._placer = ThreadPoolExecutor(1, thread_name_prefix="place")
        self._placing: tuple[Sequence, int, Future[None]] | None = None
        """(sequence, value of ``_freed`` at start, pending result)."""
        self._released = 0
        """Number of sequences whose memory was given back, or will be when their last blocks are stored."""
        self._full_at: tuple[tuple[SequenceId, int], int] | None = None
        """(key of the sequence that found no room last, value of ``_freed`` then): it is not placed again
        before that value changes. A more urgent one may come before it, and be smaller."""
        self._prefilled = False
        """Whether prefill ran a unit in this round."""
        self.parkings = 0
        """Number of times that a sequence was parked."""
        self.tokens = 0
        """Number of tokens that were drawn."""
        self.unexpected_errors = 0
        """Number of requests that failed with an error that no caller can expect."""

    def round(self) -> bool:
        """Runs one round. Returns whether it made progress."""
        self._reap()
        self._cache.move_spans(self._live())
        progress = self._admit()
        if self._prompts:
            self._prefilled = False
            self._pacer.run_units(self._prefill_unit)
            progress |= self._prefilled
        if self._running:
            with self._pacer.step():
                progress |= self._decode()
        return progress

    @property
    def _freed(self) -> int:
        """Number of times that a sequence gave memory back."""
        return self._released + self._cache.finished

    def fail_all(self, error: FarshoreError) -> None:
        """Fails every live request with ``error``."""
        for sequence in self._requests.all():
            self._fail(sequence, error)

    def close(self) -> None:
        """Ends the placing thread and gives back its last result. Call it after :meth:`fail_all`."""
        self._placer.shutdown(wait=True)
        if self._placing is not None:
            self._cache.release(self._placing[0])
        self._cache.close()

    def _reap(self) -> None:
        """Ends cancelled sequences and those whose KV is lost, which frees their memory for this round."""
        for sequence in self._requests.all():
            if sequence.cancelled.is_set():
                self._finish(sequence, Reason.CANCELLED)
        if lost := self._pool.lost():
            for sequence in list(self._live()):
                if lost_workers := sequence.workers & lost.keys():
                    reasons = "; ".join(lost[worker] for worker in sorted(lost_workers))
                    self._fail(sequence, Lost(f"{reasons}: send the request again", shards=lost_workers))

    def uses(self, worker: WorkerId) -> bool:
        """Returns whether a sequence or a call under way needs the worker."""
        return (
            self._placing is not None
            or any(worker in sequence.workers for sequence in self._live())
            or self._cache.moves_to(worker)
            or not (self._pool[worker].is_idle or self._pool[worker].lost_reason)
        )

    def _live(self) -> Iterator[Sequence]:
        """Yields the sequences that have memory, except the one that is being placed."""
        yield from self._prompts
        yield from self._running

    # -- admission ---------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Places waiting sequences in order while there is memory. Returns whether it made progress."""
        progress = False
        while self._placing is not None or self._start_placing():
            assert self._placing is not None
            sequence, freed, placed = self._placing
            if not placed.done():
                # Other sequences run meanwhile: first touches of memory and calls to shards take time.
                return progress
            self._placing = None
            progress |= self._finish_placing(sequence, freed, placed.exception())
        return progress

    def _finish_placing(self, sequence: Sequence, freed: int, error: BaseException | None) -> bool:
        """Handles the end of a placement. Returns False if the sequence has to wait."""
        if sequence not in self._requests.of(sequence.id):
            self._cache.release(sequence)  # It was cancelled meanwhile.
            return True
        if error is None:
            self._requests.mark_placed(sequence)
            if sequence.queued_s is None:
                sequence.queued_s = time.monotonic() - sequence.arrived_s
                sequence.cached_tokens = sequence.committed
            if sequence.committed < sequence.prefill_tokens:
                self._prompts.add(sequence)
            else:
                self._running.append(sequence)
            return True
        waits = isinstance(error, TransportError | Full) and self._pool.may_answer()
        gives_back = self._cache.is_finishing or freed != self._freed
        if isinstance(error, Full) and (gives_back or list(self._live())):
            # Other sequences will give memory back, or have done so since this placement started.
            self._full_at = sequence.key, freed
            waits = True
        if not waits:
            self._retry_or_fail(sequence, error, park=False)
        return not waits

    def _start_placing(self) -> bool:
        """Starts to place the first waiting sequence, in another thread. Returns False if it has to wait."""
        sequence = self._requests.first_waiting()
        if sequence is None or self._full_at == (sequence.key, self._freed):
            return False
        live = list(self._live())
        if live and sum(other.completions for other in (*live, sequence)) > self._limits.running:
            return False
        # While others run, one tail block stays free for the next of them that fills its own.
        if self._cache.tail_blocks_free() < (2 if live else 1):
            return False
        if not self._pool.placeable() and self._pool.may_answer():
            return False
        promised = sum(min(other.growth_tokens, BLOCK_TOKENS) * other.completions for other in live)
        placed = self._placer.submit(self._cache.place, sequence, promised_tokens=promised)
        placed.add_done_callback(lambda _: self._requests.wake())
        self._placing = sequence, self._freed, placed
        return True

    # -- prefill -----------------------------------------------------------------------------------------

    def _prefill_unit(self) -> bool:
        """Runs one prefill unit. After a prompt's last unit, draws the first token of each completion.

        Returns whether prompts remain.
        """
        outcome = self._prompts.run_unit()
        if outcome is None:
            return False
        self._prefilled = True
        try:
            self._apply_outcome(outcome)
        except Exception as error:
            self._fail(outcome.sequence, error)
        return len(self._prompts) > 0

    def _apply_outcome(self, outcome: Outcome) -> None:
        sequence, error = outcome.sequence, outcome.error
        if outcome.sealed:
            sequence.failures = 0
        if error is not None:
            self._retry_or_fail(sequence, error, park=True)
        elif outcome.logits is not None:
            self._fork_prompt(sequence, outcome.logits)
        elif outcome.done:
            self._running.append(sequence)

    def _fork_prompt(self, sequence: Sequence, logits: Tensor) -> None:
        """Forks a prefilled prompt into its completions and draws the first token of each.

        Completions whose tails find no room are parked. ``logits`` is ``f32[vocab]``.
        """
        choices = [sequence]
        for number in range(1, sequence.sampling.n):
            child = sequence.fork(number)
            choices.append(child)
            self._requests.add_fork(sequence, child)
        sequence.forked = True
        entries = self._runner.draw_first_tokens(choices, logits)
        for choice in choices:
            if self._limits.speculate_tokens:
                choice.lookup = PromptLookup(self._limits.speculate_tokens)
            if choice is sequence or self._fork(sequence, choice):
                self._running.append(choice)
            else:
                self._queue_parked(choice)
        for entry in entries:
            step_entry.prepare_mask(entry.sequence)
            self._emit(entry)

    def _fork(self, sequence: Sequence, child: Sequence) -> bool:
        """Gives ``child`` a copy of the tail. Returns False unless one tail block stays free beside it."""
        if self._cache.tail_blocks_free() < 2:
            return False
        try:
            self._cache.fork(sequence, child)
        except Full:
            return False
        return True

    # -- decode ------------------------------------------------------------------------------------------

    def _decode(self) -> bool:
        """Runs one step of the running sequences whose shards answer.

        Returns whether any advanced or ended.
        """
        unreadable = self._pool.unreadable()
        entries = [
            StepEntry(sequence, [], [])
            for sequence in step_entry.order_by_spans(self._running)
            if not sequence.workers & unreadable
        ]
        if self._limits.speculate_tokens:
            step_entry.add_guesses(entries)
        running_before = len(self._running)
        entries = self._reserve(entries)
        self._runner.run(entries)
        for entry in entries:
            sequence = entry.sequence
            try:
                if entry.error is not None:
                    self._retry_or_fail(sequence, entry.error, park=False)
                elif entry.drawn:
                    sequence.failures = 0
                    self._emit(entry)
                    if sequence.tail is not None:
                        self._cache.hand_off(sequence)
            except Exception as error:
                self._fail(sequence, error)
        return any(entry.drawn or entry.error for entry in entries) or len(self._running) != running_before

    def _reserve(self, entries: list[StepEntry]) -> list[StepEntry]:
        """Reserves room in the tails, oldest first, parking newer sequences.

        Returns the entries with room.
        """
        ready: set[tuple[SequenceId, int]] = set()
        for entry in sorted(entries, key=lambda entry: (entry.sequence.admitted, entry.sequence.choice)):
            while entry.sequence.tail is not None:
                try:
                    step_entry.reserve_tail(entry)
                    ready.add(entry.sequence.key)
                    break
                except Full as error:
                    if not self._make_room():
                        # No other sequence is left to park. A cold call may still give memory back.
                        if self._pool.is_idle():
                            self._fail(entry.sequence, error)
                        break
        return [entry for entry in entries if entry.sequence.key in ready and entry.sequence.tail is not None]

    def _make_room(self) -> bool:
        """Parks the newest request. Returns False if only one sequence has memory."""
        parked = victims(self._live())
        for sequence in parked:
            self._park(sequence)
        return bool(parked)

    # -- ends and errors of sequences --------------------------------------------------------------------

    def _emit(self, entry: StepEntry) -> None:
        """Emits the drawn tokens of a sequence, and finishes it after its last one."""
        sequence = entry.sequence
        self.tokens += len(entry.drawn)
        for drawn in entry.drawn:
            sequence.emit(Sampled(drawn.token, sequence.choice, drawn.logprob, drawn.top))
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)

    def _park(self, sequence: Sequence) -> None:
        """Takes the sequence's memory back and queues it again."""
        self._release(sequence)
        self._queue_parked(sequence)

    def _queue_parked(self, sequence: Sequence) -> None:
        self.parkings += 1
        self._requests.park(sequence)

    def _retry_or_fail(self, sequence: Sequence, error: BaseException, *, park: bool) -> None:
        """Counts an error of the sequence: it retries after a retryable one, and fails otherwise.

        ``park`` parks it for the retry, so that it is placed anew.
        """
        sequence.failures += 1
        retryable = isinstance(error, FarshoreError) and (error.retryable or isinstance(error, Full))
        if not retryable or sequence.failures >= MOST_FAILURES:
            self._fail(sequence, error)
        elif park:
            self._park(sequence)

    def _finish(self, sequence: Sequence, reason: Reason) -> None:
        """Ends a completion, or all completions of a request that is not forked yet."""
        if not self._forget(sequence, ended=reason is not Reason.CANCELLED):
            return
        for choice in range(sequence.choice, sequence.choice + sequence.completions):
            queued_s = sequence.queued_s or 0.0
            attended_bytes = dict(sequence.attended_bytes)
            sequence.emit(Finished(reason, queued_s, attended_bytes, choice, sequence.cached_tokens))

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """Fails the whole request of ``sequence``.

        Errors outside the tree of FarshoreError become Internal.
        """
        if not isinstance(error, FarshoreError) or isinstance(error, InvalidPlan):
            _log.error("sequence %s failed", sequence.key, exc_info=error)
            self.unexpected_errors += 1
            error = Internal(f"the engine failed with {type(error).__name__}: {error}")
        siblings = self._requests.of(sequence.id)
        for sibling in siblings:
            self._forget(sibling)
        if siblings:
            sequence.emit(Failed(error))

    def _forget(self, sequence: Sequence, *, ended: bool = False) -> bool:
        """Removes a sequence and frees its memory. Returns False if it was removed before."""
        if not self._requests.forget(sequence):
            return False
        self._release(sequence, ended=ended)
        return True

    def _release(self, sequence: Sequence, *, ended: bool = False) -> None:
        """Takes a sequence out of prefill and decode, and gives its memory back. If it has ``ended``, full
        blocks of its tail are stored first, in the background."""
        self._prompts.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if self._placing is None or self._placing[0] is not sequence:
            give_back = self._cache.finish if ended else self._cache.release
            give_back(sequence)
        self._released += 1
        for running in self._running:
            running.refused_boundary = None  # Its hand-off may find room now.
