"""The engine: schedule, plan, run, commit; one thread beside the model, never waiting for the controller.

Every round admits what fits, prefills one segment of one prompt, and decodes one token for every running
sequence. Callers submit and cancel from other threads; tokens leave through each sequence's ``emit``.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.fanout import Fanout
from farshore.attention_offload.latency import Link
from farshore.attention_offload.placement import ShardBy
from farshore.errors import DeadlineExceeded, FarshoreError, Full, InvalidRequest, Overloaded, TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.arena import Arena
from farshore.models.llama import Llama
from farshore.workers import decode
from farshore.workers.cache import SequenceCache
from farshore.workers.prefill import prefill_segment
from farshore.workers.sampler import sample
from farshore.workers.sequence import (
    Event,
    Failed,
    Finished,
    Prefilled,
    Reason,
    Sampled,
    Sampling,
    Sequence,
)
from farshore.workers.stagger import Stagger
from farshore.workers.step import run_step

STEP_ATTEMPTS = 4
"""A step is a transaction: how often it is run before its sequences fail."""

RETRY_PAUSE_S = 0.05
"""Before the second attempt, doubled for each one after it: a restarted connection needs a moment."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    segment_tokens: int = 512
    """Prompt tokens prefilled between two decode steps."""
    running: int = 64
    waiting: int = 256
    max_decode_stall_ms: float = 200.0  # by prefill
    speculate_tokens: int = 0  # drafted a step


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """What status shows of one sequence."""

    id: SequenceId
    epoch: Epoch
    committed: int
    tail_first: int
    spans: tuple[tuple[WorkerId, int, int, int, int], ...]
    """(worker, first, last, group0, group1)"""


class Engine:
    """``peers`` maps every worker whose spans this engine reads, itself included; ``targets`` are those that
    new spans go to. ``claim`` gives the epoch that a new sequence is owned under."""

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        arena: Arena,
        peers: Mapping[WorkerId, Peer],
        targets: list[WorkerId],
        shard_by: ShardBy,
        claim: Callable[[SequenceId], Epoch],
        limits: EngineLimits | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._arena = arena
        self._peers = peers
        self._shards = Fanout(peers, attention)
        self._stagger = Stagger(lambda: self._shards.waited_s)
        self._cache = SequenceCache(
            arena=arena, peers=peers, targets=targets, model=attention, shard_by=shard_by
        )
        self._claim = claim
        self._limits = limits or EngineLimits()
        self._wake = threading.Condition()
        self._stopping = False
        self._claiming: set[SequenceId] = set()
        self._known: dict[SequenceId, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._step = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -- from other threads ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """End the loop after the round under way; every live sequence gets a Failed event. Raises
        DeadlineExceeded where that round does not end in time."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise DeadlineExceeded(f"the engine's round did not end within {timeout_s:.0f} s")
        self._cache.close()

    def submit(
        self, sequence: SequenceId, prompt: list[int], sampling: Sampling, emit: Callable[[Event], None]
    ) -> None:
        """Queue a sequence. ``emit`` is called from the engine's thread and must not block.

        Raises InvalidRequest for a prompt that can never run here, Overloaded when the queue is full.
        """
        self._check(prompt, sampling)
        # Refused before an epoch is claimed, so that a refusal leaves nothing to give back.
        with self._wake:
            self._refuse_more(sequence)
            self._claiming.add(sequence)
        try:
            new = Sequence(
                id=sequence,
                epoch=self._claim(sequence),
                prompt_tokens=len(prompt),
                tokens=list(prompt),
                sampling=sampling,
                emit=emit,
                arrived_s=time.monotonic(),
            )
            with self._wake:
                if self._stopping:
                    raise TransportError("the engine is stopping")
                self._known[sequence] = new
                self._waiting.append(new)
                self._wake.notify_all()
        finally:
            with self._wake:
                self._claiming.discard(sequence)

    def cancel(self, sequence: SequenceId) -> None:
        """End a sequence within one step. Unknown ids are ignored."""
        with self._wake:
            if sequence in self._known:
                self._known[sequence].cancelled.set()
                self._wake.notify_all()

    def load(self) -> tuple[int, int]:
        """(sequences running or prefilling, requests waiting)."""
        with self._wake:
            return len(self._known) - len(self._waiting), len(self._waiting)

    def links(self) -> list[Link]:
        """What frames to each shard have taken."""
        return self._shards.links()

    def views(self) -> list[SequenceView]:
        """Live sequences that have memory. A snapshot: the engine goes on meanwhile."""
        with self._wake:
            known = list(self._known.values())
        views = []
        for it in known:
            tail = it.tail
            if tail is not None:
                spans = tuple((s.worker, s.first, s.last, s.group0, s.group1) for s in list(it.spans))
                views.append(
                    SequenceView(
                        id=it.id, epoch=it.epoch, committed=it.committed, tail_first=tail.start, spans=spans
                    )
                )
        return views

    # -- the loop ----------------------------------------------------------------------------------------

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        config = self._model.config
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one token")
        if bad := [token for token in prompt if not 0 <= token < config.vocab]:
            raise InvalidRequest(f"token id {bad[0]} is not in the vocabulary of {config.vocab}")
        if sampling.max_tokens < 1:
            raise InvalidRequest(f"max_tokens {sampling.max_tokens}: ask for at least 1")
        total = len(prompt) + sampling.max_tokens
        if total > config.max_positions:
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens + max_tokens {sampling.max_tokens} = {total}, but the model has"
                f" {config.max_positions} positions: shorten the prompt or lower max_tokens"
            )
        try:
            self._cache.fits_ever(total)
        except Full as error:
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens + max_tokens {sampling.max_tokens} do not fit into the KV pool"
                f" of {error.free_bytes / 2**30:.2f} GiB: shorten the prompt, lower max_tokens, or start the"
                " cluster with more --kv-memory or --attention-workers"
            ) from error

    def _refuse_more(self, sequence: SequenceId) -> None:
        if self._stopping:
            raise TransportError("the engine is stopping")
        if sequence in self._known or sequence in self._claiming:
            raise InvalidRequest(f"sequence {sequence} is running already: choose another id")
        if len(self._waiting) + len(self._claiming) >= self._limits.waiting:
            raise Overloaded(f"{self._limits.waiting} requests are waiting: try again in a few seconds")

    def _loop(self) -> None:
        ending: FarshoreError = TransportError("the engine was stopped")
        try:
            with torch.inference_mode():
                while self._await_work():
                    self._reap()
                    self._admit()
                    self._prefill()
                    self._decode()
        except Exception as error:
            # A mistake of ours. Nobody must wait for an engine that is gone.
            _log.exception("the engine ended")
            ending = FarshoreError(
                f"the engine ended with {type(error).__name__}: {error}; restart the cluster"
            )
        with self._wake:
            self._stopping = True
            live = list(self._known.values())
        for sequence in live:
            self._end(sequence, Failed(ending))

    def _await_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._known)
            return not self._stopping

    def _reap(self) -> None:
        """Cancelled sequences free their memory before anything else is done."""
        with self._wake:
            cancelled = [sequence for sequence in self._known.values() if sequence.cancelled.is_set()]
        for sequence in cancelled:
            self._finish(sequence, Reason.CANCELLED)

    def _admit(self) -> None:
        """First come, first served: grant memory to waiting sequences while there is any."""
        while True:
            with self._wake:
                live = len(self._prefilling) + len(self._running)
                if not self._waiting or live >= self._limits.running:
                    return
                sequence = self._waiting[0]
            promised = sum(s.most_tokens - s.committed for s in (*self._prefilling, *self._running))
            try:
                self._cache.place(sequence, promised_tokens=promised)
            except Full as error:
                if live:
                    return  # somebody will finish and free memory
                self._end(sequence, Failed(error))
                continue
            except FarshoreError as error:
                self._end(sequence, Failed(error))
                continue
            sequence.queued_s = time.monotonic() - sequence.arrived_s
            with self._wake:
                self._waiting.remove(sequence)
            self._prefilling.append(sequence)

    def _prefill(self) -> None:
        """One segment of the oldest prompt; behind the last one, its first token."""
        if not self._prefilling:
            return
        sequence = self._prefilling[0]
        first = sequence.committed
        last = min(first + self._limits.segment_tokens, sequence.prompt_tokens)
        try:
            logits = _attempt(lambda: self._run_segment(sequence, first, last))
        except FarshoreError as error:
            self._end(sequence, Failed(error))
            return
        sequence.emit(Prefilled(last, sequence.prompt_tokens))
        if last == sequence.prompt_tokens:
            self._prefilling.popleft()
            self._running.append(sequence)
            self._take(sequence, logits)

    def _run_segment(self, sequence: Sequence, first: int, last: int) -> torch.Tensor:
        """Logits behind position ``last``; the segment is committed."""
        logits = prefill_segment(
            sequence, first, last, model=self._model, attention=self._attention, peers=self._peers
        )
        self._cache.seal(sequence, last)
        return logits

    def _decode(self) -> None:
        """One token for every running sequence."""
        batch = list(self._running)
        if not batch:
            return
        try:
            logits = _attempt(lambda: self._run_step(batch))
        except FarshoreError as error:
            self._fail_unreachable(batch, error)
            return
        for row, sequence in enumerate(batch):
            self._take(sequence, logits[row])
            if sequence.tail is not None:
                self._cache.hand_off(sequence)

    def _run_step(self, batch: list[Sequence]) -> torch.Tensor:
        """Logits of a committed step; one that raises leaves no trace."""
        self._step += 1
        try:
            plan = decode.make_plan(self._step, batch, self._attention)
            decode.check_plan(plan, batch)
            with self._stagger.step(len(batch)) as micro_batches:
                logits = run_step(
                    plan,
                    [sequence.tokens[sequence.committed] for sequence in batch],
                    [decode.tail_of(sequence) for sequence in batch],
                    model=self._model,
                    attention=self._attention,
                    shards=self._shards,
                    memory=self._arena.memory,
                    micro_batches=micro_batches,
                )
            decode.commit(plan, batch, self._attention)
        except FarshoreError:
            decode.drop_scratch(batch)
            raise
        return logits

    def _fail_unreachable(self, batch: list[Sequence], error: FarshoreError) -> None:
        """Fail those sequences that need a shard which is gone; all of them if none is."""
        gone = set()
        for worker, peer in self._peers.items():
            try:
                peer.identify()
            except FarshoreError:
                gone.add(worker)
        hit = [s for s in batch if any(span.worker in gone for span in s.spans)]
        for sequence in hit or batch:
            self._end(sequence, Failed(error))

    def _take(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Sample the token behind the committed ones, and finish the sequence if it was the last."""
        of = {"prompt_tokens": sequence.prompt_tokens, "choice": sequence.choice}
        try:
            drawn = sample(logits, sequence.sampling, tokens=sequence.tokens, **of)
        except FarshoreError as error:
            self._end(sequence, Failed(error))
            return
        sequence.tokens.append(drawn.token)
        sequence.emit(Sampled(drawn.token, sequence.choice, drawn.logprob, drawn.top))
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: Reason) -> None:
        self._end(
            sequence, Finished(reason, sequence.queued_s, dict(sequence.attended_bytes), sequence.choice)
        )

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        """Forget a sequence and free its memory, then say so."""
        with self._wake:
            self._known.pop(sequence.id, None)
            for queue in (self._waiting, self._prefilling, self._running):
                if sequence in queue:
                    queue.remove(sequence)
        self._cache.release(sequence)
        sequence.emit(event)


def _attempt(transaction: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``transaction`` returns; it is run again while what broke it is retryable."""
    for attempt in range(1, STEP_ATTEMPTS):
        try:
            return transaction()
        except FarshoreError as error:
            if not error.retryable:
                raise
            time.sleep(RETRY_PAUSE_S * 2 ** (attempt - 1))
    return transaction()
