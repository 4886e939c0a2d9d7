"""The engine: schedule, plan, run, commit; one thread beside the model, never waiting for the controller.

Every round admits what fits, prefills for as long as running sequences may wait, and decodes a token or more
for each of them. Callers submit and cancel from other threads; tokens leave through each request's ``emit``.

A request is one sequence until its prompt is prefilled, and then one for each of its completions, which share
the prompt's KV.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.attention_offload.fanout import Fanout
from farshore.attention_offload.frames import Transport
from farshore.attention_offload.latency import Link
from farshore.attention_offload.placement import ShardBy
from farshore.errors import DeadlineExceeded, FarshoreError, Full, TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.arena import Arena
from farshore.kvstore.prefix import chain
from farshore.models.llama import Llama
from farshore.workers import admission, decode
from farshore.workers.admission import EngineLimits
from farshore.workers.attempts import attempt
from farshore.workers.cache import SequenceCache
from farshore.workers.decode import Turn
from farshore.workers.lookup import Lookup
from farshore.workers.pace import Pace
from farshore.workers.prefix import fingerprint
from farshore.workers.prompts import Prompts
from farshore.workers.requests import Requests
from farshore.workers.sequence import Event, Failed, Finished, Reason, Sampled, Sampling, Sequence
from farshore.workers.stagger import Stagger
from farshore.workers.step import Own, Steps

_log = logging.getLogger(__name__)


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
    new spans go to. ``claim`` gives the epoch that a new sequence is owned under. ``revision`` names the
    weights: engines that share a prefix cache must not name different ones alike."""

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
        revision: str = "",
        limits: EngineLimits | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._arena = arena
        self._peers = peers
        self._claim = claim
        self._revision = revision
        self._limits = limits = limits or EngineLimits()
        self._shards = Fanout(peers, attention)
        self._steps = Steps(model=model, attention=attention, shards=self._shards, own=_own(arena, peers))
        self._stagger = Stagger(lambda: self._shards.waited_s)
        self._pace = Pace(limits.max_decode_stall_ms)
        self._cache = SequenceCache(
            arena=arena, peers=peers, targets=targets, model=attention, shard_by=shard_by
        )
        self._prompts = Prompts(
            model=model,
            attention=attention,
            peers=peers,
            cache=self._cache,
            segment_tokens=limits.segment_tokens,
        )
        self._requests = Requests(limits.waiting)
        self._running: list[Sequence] = []
        self._no_room = False  # for the first that waits, until somebody ends
        self._ended = 0
        self._placer = ThreadPoolExecutor(1, thread_name_prefix="place")
        self._placing: tuple[Sequence, int, Future[None]] | None = None
        """Who is being placed, how many had ended when that began, and what comes of it."""
        self._step = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -- from other threads ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """End the loop after the round under way; every live request gets a Failed event. Raises
        DeadlineExceeded where that round does not end in time."""
        self._requests.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise DeadlineExceeded(f"the engine's round did not end within {timeout_s:.0f} s")
        self._placer.shutdown(wait=True)
        self._prompts.close()
        self._cache.close()

    def submit(
        self,
        sequence: SequenceId,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[Event], None],
        *,
        salt: str = "",
    ) -> None:
        """Queue a request. ``emit`` is called from the engine's thread and must not block. What is stored
        already of a prompt that was given with the same ``salt`` is not computed again.

        Raises InvalidRequest for a prompt that can never run here, Overloaded when the queue is full.
        """
        admission.check(prompt, sampling, config=self._model.config, cache=self._cache)
        print_ = fingerprint(self._model.config, self._attention, revision=self._revision, salt=salt)
        blocks = chain(prompt, fingerprint=print_)
        # Refused before an epoch is claimed, so that a refusal leaves nothing to give back.
        with self._requests.reserve(sequence):
            self._requests.add(
                Sequence(
                    id=sequence,
                    epoch=self._claim(sequence),
                    prompt_tokens=len(prompt),
                    tokens=list(prompt),
                    sampling=sampling,
                    emit=emit,
                    arrived_s=time.monotonic(),
                    fingerprint=print_,
                    blocks=blocks,
                )
            )

    def cancel(self, sequence: SequenceId, *, choice: int | None = None) -> None:
        """End all of a request, or one of its completions, within one step. Unknown ids are ignored."""
        self._requests.cancel(sequence, choice=choice)

    def load(self) -> tuple[int, int]:
        """(requests running or prefilling, requests waiting)."""
        return self._requests.load()

    def links(self) -> list[Link]:
        """What frames to each shard have taken."""
        return self._shards.links()

    def views(self) -> list[SequenceView]:
        """Live sequences that have memory. A snapshot: the engine goes on meanwhile."""
        views = []
        for it in self._requests.all():
            if (tail := it.tail) is not None:
                spans = tuple((s.worker, s.first, s.last, s.group0, s.group1) for s in list(it.spans))
                views.append(
                    SequenceView(
                        id=it.id, epoch=it.epoch, committed=it.committed, tail_first=tail.start, spans=spans
                    )
                )
        return views

    # -- the loop ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        ending: FarshoreError = TransportError("the engine was stopped")
        try:
            with torch.inference_mode():
                while self._requests.await_work():
                    self._reap()
                    self._admit()
                    if self._prompts:
                        self._pace.turn(self._prefill_unit)
                    if self._running:
                        with self._pace.step():
                            self._decode()
        except Exception as error:
            # A mistake of ours. Nobody must wait for an engine that is gone.
            _log.exception("the engine ended")
            ending = FarshoreError(
                f"the engine ended with {type(error).__name__}: {error}; restart the cluster"
            )
        self._requests.stop()
        for sequence in self._requests.all():
            self._fail(sequence, ending)

    def _reap(self) -> None:
        """Cancelled requests free their memory before anything else is done."""
        for sequence in self._requests.all():
            if sequence.cancelled.is_set():
                self._finish(sequence, Reason.CANCELLED)

    def _live(self) -> Iterator[Sequence]:
        yield from self._prompts
        yield from self._running

    def _admit(self) -> None:
        """First come, first served: grant memory to waiting sequences while there is any."""
        while not self._no_room:
            live = list(self._live())
            if self._placing is None and not self._start_placing(live):
                return
            assert self._placing is not None
            sequence, ended, placed = self._placing
            if live and not placed.done():
                return  # they go on meanwhile: to touch new memory, or to ask a frozen shard, takes seconds
            error = placed.exception()
            self._placing = None
            if error is None:
                sequence.queued_s = time.monotonic() - sequence.arrived_s
                self._requests.begin(sequence)
                self._prompts.add(sequence)
            elif not isinstance(error, FarshoreError):
                raise error
            elif not isinstance(error, Full) or (not live and ended == self._ended):
                self._fail(sequence, error)
            else:
                self._no_room = ended == self._ended  # somebody will finish and free memory, if nobody has

    def _start_placing(self, live: list[Sequence]) -> bool:
        """Place whoever waits first, beside the loop. False: nobody waits, or enough are under way."""
        sequence = self._requests.first_waiting()
        if sequence is None:
            return False
        if live and sum(s.completions for s in (*live, sequence)) > self._limits.running:
            return False
        promised = sum(s.most_tokens - s.committed for s in live)
        placed = self._placer.submit(self._cache.place, sequence, promised_tokens=promised)
        self._placing = sequence, self._ended, placed
        return True

    def _prefill_unit(self) -> bool:
        """One unit of a prompt; behind the last one, the first tokens. Whether there are more."""
        sequence = self._prompts.current()
        try:
            logits = self._prompts.run_unit()
            if logits is not None:
                self._begin(sequence, logits)
        except FarshoreError as error:
            self._fail(sequence, error)
        return len(self._prompts) > 0

    def _begin(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """The prompt is sealed: a sequence for each of its completions, and each one's first token."""
        choices = [sequence]
        for choice in range(1, sequence.sampling.n):
            child = sequence.fork(choice)
            attempt(lambda child=child: self._cache.fork(sequence, child))
            choices.append(child)
            self._requests.add_fork(sequence, child)
        sequence.forked = True
        for it in choices:
            if self._limits.speculate_tokens:
                it.lookup = Lookup(self._limits.speculate_tokens)
            self._running.append(it)
        for it in choices:
            self._emit(Turn(it, [], [decode.draw_one(it, logits)]))

    def _decode(self) -> None:
        """A token or more for every running sequence."""
        turns = [Turn(sequence, [], []) for sequence in decode.order(self._running)]
        if self._limits.speculate_tokens:
            decode.guess(turns)
        turns = decode.reserve(turns, self._fail)
        if not turns:
            return
        try:
            attempt(lambda: self._run_step(turns))
        except FarshoreError as error:
            self._fail_unreachable([turn.sequence for turn in turns], error)
            return
        for turn in turns:
            if turn.error is not None:
                self._fail(turn.sequence, turn.error)
            elif turn.sequence.tail is not None:
                self._emit(turn)
                if turn.sequence.tail is not None:
                    self._cache.hand_off(turn.sequence)

    def _run_step(self, turns: list[Turn]) -> None:
        """A step, committed, its tokens drawn; one that raises leaves no trace."""
        self._step += 1
        try:
            plan = decode.make_plan(self._step, turns, self._attention)
            decode.check_plan(plan, turns)
            with self._stagger.step(len(plan.sequences)) as micro_batches:
                logits = self._steps.run(
                    plan,
                    [token for turn in turns for token in (turn.sequence.tokens[-1], *turn.guesses)],
                    [turn.sequence.placed_tail for turn in turns for _ in range(turn.rows)],
                    micro_batches=micro_batches,
                )
        except FarshoreError:
            decode.drop_scratch(turns)
            raise
        decode.draw(turns, logits)
        decode.commit(plan, turns, self._attention)

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
            self._fail(sequence, error)

    def _emit(self, turn: Turn) -> None:
        """Tell a sequence's new tokens, and finish it if they are its last."""
        sequence = turn.sequence
        for drawn in turn.drawn:
            sequence.emit(Sampled(drawn.token, sequence.choice, drawn.logprob, drawn.top))
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: Reason) -> None:
        """One completion is complete; all of the request's where it is not forked yet."""
        if not self._forget(sequence):
            return
        for choice in range(sequence.choice, sequence.choice + sequence.completions):
            sequence.emit(Finished(reason, sequence.queued_s, dict(sequence.attended_bytes), choice))

    def _fail(self, sequence: Sequence, error: FarshoreError) -> None:
        """All of its request ends."""
        together = self._requests.of(sequence.request_id)
        for it in together:
            self._forget(it)
        if together:
            sequence.emit(Failed(error))

    def _forget(self, sequence: Sequence) -> bool:
        """A sequence's memory is free, and nobody knows it any more. False: nobody did."""
        if not self._requests.forget(sequence):
            return False
        self._no_room = False
        self._ended += 1
        if self._placing is not None and self._placing[0] is sequence:
            self._placing[2].exception()  # it has deadlines; then what was granted can be given back
            self._placing = None
        self._prompts.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._cache.release(sequence)
        return True


def _own(arena: Arena, peers: Mapping[WorkerId, Peer]) -> Own:
    """The engine's memory, and whose spans lie in it."""
    for worker, peer in peers.items():
        if peer.transport is Transport.IN_PROCESS and peer.store.memory is arena.memory:
            return Own(arena.memory, worker, peer.store)
    return Own(arena.memory)
