"""The engine: schedule, plan, run, commit; one thread beside the model, which waits for frames alone.

Every round admits what fits, prefills for as long as running sequences may wait, and decodes a token or more
for each of them. Callers submit and cancel from other threads; tokens leave through each request's ``emit``.

A request is one sequence until its prompt is prefilled, and then one for each of its completions, which
share the prompt's KV. What a round does is ``scheduler``'s; whether there is another one is decided here: the
engine ends only when it can't compute a token any more.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.fanout.latency import Link
from farshore.attention_offload.plan.placement import ShardBy
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import DeadlineExceeded, Internal, TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kvstore.prefix import chain
from farshore.kvstore.store.arena import Arena
from farshore.models.llama import Llama
from farshore.workers.engine import admission
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.decode.micro_batch_tuner import MicroBatchTuner
from farshore.workers.engine.decode.step import LocalKV, Steps
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import Pool
from farshore.workers.engine.kv.prefix import fingerprint
from farshore.workers.engine.prefill.prompts import Prompts
from farshore.workers.engine.prefill.segment import Segment
from farshore.workers.engine.requests import Requests
from farshore.workers.engine.retry import Decoder
from farshore.workers.engine.scheduler import Scheduler
from farshore.workers.engine.sequence import Event, Holder, Sampling, Sequence
from farshore.workers.engine.views import EngineLoad, SequenceView, view

_log = logging.getLogger(__name__)

MOST_ESCAPES = 3
"""Rounds in a row that end with an error which is no sequence's own."""
HEARD_DEADLINE_S = 5.0
"""How long a starting engine waits for its shards' first words."""
LOOK_S = 0.1
"""How soon a round follows one in which nothing could be done: shards become lost by the clock."""


class Engine:
    """``peers`` maps every worker whose spans this engine reads, itself included; ``targets`` are those that
    new spans go to. ``claim`` gives the epoch that a new sequence is owned under. ``revision`` names the
    weights: engines that share a prefix cache must not name different ones alike. ``on_failed`` is called
    once if the engine can't go on, before any request hears of it."""

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        arena: Arena,
        clients: Mapping[WorkerId, ShardClient],
        targets: list[WorkerId],
        shard_by: ShardBy,
        claim: Callable[[SequenceId], Epoch],
        revision: str = "",
        limits: EngineLimits | None = None,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._claim = claim
        self._revision = revision
        self._limits = limits = limits or EngineLimits()
        self._on_failed = on_failed
        self._requests = Requests(limits.waiting)
        local = _local(arena, clients)
        self._pool = Pool(clients, targets, changed=self._requests.wake, grace_s=limits.shard_grace_s)
        self._cache = SequenceCache(
            arena=arena, pool=self._pool, model=attention, shard_by=shard_by, store=local.store
        )
        self._shards = Fanout(clients, attention)
        self._scheduler = Scheduler(
            requests=self._requests,
            pool=self._pool,
            cache=self._cache,
            prompts=Prompts(
                model=model,
                attention=attention,
                pool=self._pool,
                cache=self._cache,
                segment_tokens=limits.segment_tokens,
            ),
            decoder=Decoder(
                Steps(model=model, attention=attention, shards=self._shards, local=local),
                attention,
                MicroBatchTuner(lambda: self._shards.waited_s),
                suspect=self._suspect,
            ),
            limits=limits,
        )
        self._escapes = 0
        self._failure = ""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -- from other threads ------------------------------------------------------------------------------

    def start(self) -> None:
        self._pool.await_beats(HEARD_DEADLINE_S)
        self._thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """End the loop after the round under way; every live request gets a Failed event. Raises
        DeadlineExceeded where that round does not end in time."""
        self._requests.stop(TransportError("the engine is stopping: send the request again"))
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise DeadlineExceeded(f"the engine's round did not end within {timeout_s:.0f} s")
        self._scheduler.close()
        self._pool.close()

    def check_size(self, prompt_tokens: int, sampling: Sampling) -> None:
        """Raises InvalidRequest for a prompt that can never run here, before its tokens are looked at."""
        admission.check_size(prompt_tokens, sampling, config=self._model.config, cache=self._cache)

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

        Raises InvalidRequest for a prompt that can never run here, Overloaded when the queue is full,
        Internal when the engine has failed, TransportError when it is stopping.
        """
        self.check_size(len(prompt), sampling)
        admission.check_tokens(prompt, config=self._model.config)
        print_ = fingerprint(self._model.config, self._attention, revision=self._revision, salt=salt)
        blocks = chain(prompt, fingerprint=print_)
        # Refused before an epoch is claimed, so that a refusal leaves nothing to give back.
        with self._requests.reserve(sequence) as order:
            self._requests.add(
                Sequence(
                    id=sequence,
                    epoch=self._claim(sequence),
                    order=order,
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

    @property
    def failure(self) -> str:
        """Why the engine can't go on; empty while it can."""
        return self._failure

    def load(self) -> EngineLoad:
        return EngineLoad(*self._requests.load(), self._scheduler.parkings)

    def links(self) -> list[Link]:
        """What frames to each shard have taken."""
        return self._shards.links()

    def views(self) -> list[SequenceView]:
        """Live sequences that have memory. A snapshot: the engine goes on meanwhile."""
        return [seen for it in self._requests.all() if (seen := view(it)) is not None]

    # -- the loop ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        patience_s: float | None = None
        with torch.inference_mode():
            while not self._failure and self._requests.await_news(patience_s):
                try:
                    progress = self._scheduler.round()
                    self._escapes = 0 if progress else self._escapes
                    patience_s = 0.0 if progress else LOOK_S if self._requests.all() else None
                except Exception as error:
                    self._survive(error)
                    patience_s = LOOK_S
        ending = Internal(self._failure) if self._failure else TransportError("the engine was stopped")
        self._scheduler.fail_all(ending)

    def _survive(self, error: Exception) -> None:
        """An error that is no sequence's own. The engine goes on if it can still compute a token."""
        _log.exception("a round of the engine failed")
        self._escapes += 1
        try:
            if self._escapes >= MOST_ESCAPES:
                raise error
            probe(self._model, self._attention, self._pool)
        except Exception as last:
            _log.exception("the engine ends")
            self._failure = f"the engine failed with {type(last).__name__}: {last}; restart the cluster"
            self._on_failed()
            self._requests.stop(Internal(self._failure))

    def _suspect(self, shards: Iterable[WorkerId], error: TransportError) -> None:
        for shard in shards:
            self._pool[shard].suspect(error)


def _local(arena: Arena, clients: Mapping[WorkerId, ShardClient]) -> LocalKV:
    """The engine's memory, and whose spans lie in it."""
    for worker, client in clients.items():
        if client.transport is Transport.IN_PROCESS and client.store.memory is arena.memory:
            return LocalKV(arena.memory, worker, client.store)
    return LocalKV(arena.memory)


def probe(model: Llama, attention: AttentionModel, pool: Pool) -> None:
    """A built-in request of one token: whether the engine can still compute. Takes no memory of any store.

    Prefills a prompt of one token, of which nothing is stored. Raises what that raises, or Internal for
    logits that are not numbers."""
    sequence = Sequence(
        id=SequenceId("probe"),
        epoch=Epoch(0),
        order=0,
        prompt_tokens=1,
        tokens=[0],
        sampling=Sampling(max_tokens=1),
        emit=lambda event: None,
        arrived_s=0.0,
        fingerprint=b"",
        holder=Holder(SequenceId("probe"), Epoch(0)),
    )
    segment = Segment(sequence, 0, 1, model=model, attention=attention, pool=pool, logits_of=1)
    for unit in segment.units():
        assert callable(unit), "a segment without spans waits for no shard"
        unit()
    if segment.logits is None or not bool(torch.isfinite(segment.logits).all()):
        raise Internal("the model's logits are not numbers")
