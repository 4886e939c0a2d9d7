"""The engine of a dense worker: it owns sequences and produces their tokens.

One thread runs rounds. A round admits waiting sequences while there is memory, prefills prompts for as long
as running sequences can wait, and decodes at least one token for each running sequence. This thread waits for
frames and for nothing else (invariant 9, docs/architecture.md). Callers submit and cancel from other threads;
tokens leave through each request's ``emit``.

A request is one sequence until its prompt is prefilled, then one sequence for each of its completions; these
share the prompt's KV. ``scheduler`` decides what a round does. This module decides whether another round
follows: the engine ends only if it can no longer compute a token (invariant 8, docs/architecture.md).

Called by ``dense`` and ``engine_service``. It must not know gRPC or global placement.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.base import ShardClient
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.fanout.latency import Link
from farshore.attention_offload.plan.placement import ShardBy
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import DeadlineExceeded, FarshoreError, Internal, TransportError
from farshore.ids import Epoch, SequenceId, WorkerId
from farshore.kernels.base import Kernels
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.kernels.select import device_runtime, implementation
from farshore.kvstore.prefix import chain
from farshore.kvstore.store.arena.arena import Arena
from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine import admission
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.decode.device.loop import (
    DEVICE_MICRO_BATCHES,
    WARM_UP_STEPS,
    DeviceLayerLoop,
)
from farshore.workers.engine.decode.kernel_plans import LocalKV
from farshore.workers.engine.decode.micro_batch_tuner import MicroBatchTuner
from farshore.workers.engine.decode.step import LayerLoop
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.locations import Find, PrefixLocations
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.kv.prefix import fingerprint
from farshore.workers.engine.membership import Change, Membership
from farshore.workers.engine.prefill.prompts import Prompts
from farshore.workers.engine.prefill.segment import PrefillSegment
from farshore.workers.engine.requests import Requests
from farshore.workers.engine.retry import StepRunner
from farshore.workers.engine.scheduler import Scheduler
from farshore.workers.engine.sequence import Event, Holder, Sequence
from farshore.workers.engine.views import EngineLoad, SequenceView, view

_log = logging.getLogger(__name__)

MOST_FAILED_ROUNDS = 3
"""The engine ends after this many failed rounds without progress in between."""
FIRST_BEAT_DEADLINE_S = 5.0
"""How long a starting engine waits for the first beat of its shards."""
IDLE_ROUND_S = 0.1
"""Longest pause after a round without progress: shards become lost by the clock, without any event."""


class Engine:
    """One engine. Construct it, then :meth:`start`. Other threads may call every public method.

    ``clients`` maps the first workers whose spans the engine reads, itself included, to their shard clients;
    ``targets`` are the workers that new spans are placed on. Engines whose models have equal ``content``
    share stored prefixes; ``find_prefix`` asks the directory which shards may hold one. ``runtime``: None for
    a new one of the model's device. ``on_failed`` is called once if the engine fails, before any request gets
    its Failed event.
    """

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        arena: Arena,
        clients: Mapping[WorkerId, ShardClient],
        targets: list[WorkerId],
        shard_by: ShardBy,
        limits: EngineLimits | None = None,
        runtime: DeviceRuntime | None = None,
        find_prefix: Find | None = None,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._runtime = runtime = runtime or device_runtime(model.device)
        self._limits = limits = limits or EngineLimits()
        self._on_failed = on_failed
        self._requests = Requests(limits.waiting)
        local = _local(arena, clients)
        self._kernels = kernels = implementation(model.device, arena.memory.device, dtype=model.dtype)
        # Fan-out and membership share the mapping; it changes between steps only.
        clients = dict(clients)
        self._pool = ShardPool(
            clients,
            targets,
            changed=self._requests.wake,
            grace_s=limits.shard_grace_s,
        )
        self._locations = PrefixLocations(find_prefix)
        self._cache = SequenceCache(
            arena=arena,
            pool=self._pool,
            model=attention,
            shard_by=shard_by,
            store=local.store,
            locations=self._locations,
        )
        self._shards = Fanout(clients, attention)
        common = {
            "model": model,
            "attention": attention,
            "kernels": kernels,
            "shards": self._shards,
            "local": local,
        }
        self._scheduler = Scheduler(
            requests=self._requests,
            pool=self._pool,
            cache=self._cache,
            prompts=Prompts(
                model=model,
                attention=attention,
                kernels=kernels,
                pool=self._pool,
                cache=self._cache,
                runtime=runtime,
                local=local.worker,
                segment_tokens=limits.segment_tokens,
            ),
            runner=StepRunner(
                LayerLoop(**common) if runtime.is_host else DeviceLayerLoop(**common, runtime=runtime),
                attention,
                _tuner(runtime, waited_s=lambda: self._shards.waited_s),
                runtime=runtime,
                suspect=self._suspect,
            ),
            limits=limits,
        )
        self._membership = Membership(
            clients, pool=self._pool, fanout=self._shards, is_used=self._scheduler.uses
        )
        self._failed_rounds = 0
        self._failure = ""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -- from other threads ------------------------------------------------------------------------------

    def start(self) -> None:
        """Waits for the shards' first beats, at most ``FIRST_BEAT_DEADLINE_S``, and starts the loop."""
        self._pool.await_beats(FIRST_BEAT_DEADLINE_S)
        self._thread.start()

    def refuse(self, refusal: FarshoreError | None) -> None:
        """Refuses new requests from now on with ``refusal``; None: accepts them again."""
        self._requests.refuse(refusal)

    def stop(self, timeout_s: float = 60.0, *, reason: str = "the engine was stopped") -> None:
        """Ends the loop after the current round. Every live request gets a Failed event, with ``reason``.

        Raises DeadlineExceeded if that round does not end within ``timeout_s``.
        """
        self._requests.stop(TransportError(f"{reason}: send the request again"))
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise DeadlineExceeded(f"the engine's round did not end within {timeout_s:.0f} s")
        self._scheduler.close()
        self._locations.close()
        self._pool.close()
        self._membership.close()

    def check_size(self, prompt_tokens: int, sampling: Sampling) -> None:
        """Raises InvalidRequest if a prompt of this size can never run here. The tokens are not needed."""
        admission.check_size(prompt_tokens, sampling, config=self._model.config, cache=self._cache)

    def lowered(self, prompt_tokens: int, sampling: Sampling) -> Sampling:
        """The sampling with ``max_tokens`` lowered to what the KV pool holds beside the prompt."""
        return admission.lowered(prompt_tokens, sampling, cache=self._cache)

    def submit(
        self,
        sequence: SequenceId,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[Event], None],
        *,
        epoch: Epoch,
        salt: str = "",
        mask: TokenMask | None = None,
        priority: int = 0,
    ) -> None:
        """Queues a request. ``emit`` is called from the engine's thread and must not block. Shards refuse
        what an older ``epoch`` of the sequence writes. ``mask``: which tokens may be drawn. ``priority``: of
        the requests that wait for their first memory, those with the lowest number get it first.

        A stored prefix is reused only for prompts with the same ``salt``. Raises InvalidRequest for a prompt
        that can never run here and for a sequence id in use, Overloaded if the queue is full, Internal if the
        engine has failed, TransportError if it is stopping, and what :meth:`refuse` was given.
        """
        self.check_size(len(prompt), sampling)
        admission.check_tokens(prompt, config=self._model.config)
        kv_fingerprint = fingerprint(self._attention, model_content=self._model.content, salt=salt)
        blocks = chain(prompt, fingerprint=kv_fingerprint)
        with self._requests.reserve(sequence) as order:
            self._requests.add(
                Sequence(
                    id=sequence,
                    epoch=epoch,
                    order=order,
                    priority=priority,
                    prompt_tokens=len(prompt),
                    tokens=list(prompt),
                    sampling=sampling,
                    emit=emit,
                    arrived_s=time.monotonic(),
                    fingerprint=kv_fingerprint,
                    blocks=blocks,
                    mask=mask,
                )
            )

    def cancel(self, sequence: SequenceId, *, choice: int | None = None) -> None:
        """Ends a request, or one of its completions, in the next round. Unknown ids are ignored."""
        self._requests.cancel(sequence, choice=choice)

    def announce(self, change: Change) -> None:
        """Tells the engine that a shard joined, left, or changed; applied between two steps. Never blocks."""
        self._membership.announce(change)
        self._requests.rouse()

    @property
    def failure(self) -> str:
        """The reason why the engine failed; empty while it runs."""
        return self._failure

    def load(self) -> EngineLoad:
        """Returns how many requests run, wait and are parked."""
        return EngineLoad(*self._requests.load(), self._scheduler.parkings, self._scheduler.tokens)

    def shards(self) -> dict[WorkerId, bool]:
        """Returns the shards that the engine knows, and whether each answers."""
        return self._pool.answering()

    def readers(self) -> dict[WorkerId, int]:
        """Returns the number of sequences that read from each worker."""
        return dict(Counter(worker for sequence in self._requests.all() for worker in sequence.workers))

    def drains(self) -> dict[WorkerId, str]:
        """Returns the shards that spans move off, each with the reason why some stay there; "" if none do."""
        return self._cache.drains()

    def links(self) -> list[Link]:
        """Returns the measured latencies and failures of frames, for each shard."""
        return self._shards.links()

    def views(self) -> list[SequenceView]:
        """Returns a snapshot of the live sequences that have memory."""
        views = (view(sequence, self._attention.layouts[0]) for sequence in self._requests.all())
        return [sequence_view for sequence_view in views if sequence_view is not None]

    # -- the loop ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        timeout_s: float | None = None
        with torch.inference_mode(), self._runtime.entered():
            if not self._runtime.is_host:
                # Compiles kernels, and finds a device that cannot run them before a request does.
                self._probe()
            while not self._failure and self._requests.await_news(timeout_s):
                try:
                    self._membership.apply()
                    errors = self._scheduler.unexpected_errors
                    progress = self._scheduler.round()
                    if self._scheduler.unexpected_errors > errors and not self._runtime.is_host:
                        # After an error of a GPU every call fails, so every request would fail alone.
                        self._probe()
                    self._failed_rounds = 0 if progress else self._failed_rounds
                    pending = (
                        self._requests.all() or self._membership.is_waiting or self._cache.is_moving_spans
                    )
                    timeout_s = 0.0 if progress else IDLE_ROUND_S if pending else None
                except Exception as error:
                    self._survive(error)
                    timeout_s = IDLE_ROUND_S
        self._scheduler.fail_all(self._requests.ending or Internal(self._failure))

    def _survive(self, error: Exception) -> None:
        """Handles an error that belongs to no sequence: ends the engine if the probe fails, too."""
        _log.exception("a round of the engine failed")
        self._failed_rounds += 1
        self._probe(error if self._failed_rounds >= MOST_FAILED_ROUNDS else None)

    def _probe(self, failed: Exception | None = None) -> None:
        """Ends the engine if the probe fails, or at once with the error ``failed``."""
        try:
            if failed is not None:
                raise failed
            probe(self._model, self._attention, self._kernels, self._pool, self._runtime)
        except Exception as error:
            _log.exception("the engine ends")
            self._failure = f"the engine failed with {type(error).__name__}: {error}; its worker is replaced"
            self._on_failed()
            self._requests.stop(Internal(self._failure))

    def _suspect(self, shards: Iterable[WorkerId], error: TransportError) -> None:
        for shard in shards:
            self._pool[shard].suspect(error)


def _local(arena: Arena, clients: Mapping[WorkerId, ShardClient]) -> LocalKV:
    """Returns the engine's memory, with the in-process store in the same arena if there is one."""
    for worker, client in clients.items():
        if client.transport is Transport.IN_PROCESS and client.store.memory is arena.memory:
            return LocalKV(arena.memory, worker, client.store)
    return LocalKV(arena.memory)


def _tuner(runtime: DeviceRuntime, *, waited_s: Callable[[], float]) -> MicroBatchTuner:
    """Chooses the number of micro-batches for the layer loop of the runtime's device."""
    if runtime.is_host:
        return MicroBatchTuner(waited_s)
    return MicroBatchTuner(waited_s, most=DEVICE_MICRO_BATCHES, warm_up_steps=WARM_UP_STEPS)


def probe(
    model: Llama,
    attention: AttentionModel,
    kernels: Kernels[Any],
    pool: ShardPool,
    runtime: DeviceRuntime,
) -> None:
    """Checks that the engine can still compute: prefills a built-in prompt of one token.

    Takes no memory of any store. Raises the error of the prefill, or Internal if the logits are not finite.
    """
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
    segment = PrefillSegment(
        sequence,
        0,
        1,
        model=model,
        attention=attention,
        kernels=kernels,
        pool=pool,
        runtime=runtime,
        local=None,
        logits_of=1,
    )
    for unit in segment.units():
        assert callable(unit), "a segment without spans waits for no shard"
        unit()
    if segment.logits is None or not bool(torch.isfinite(segment.logits.cpu()).all()):
        raise Internal("the model's logits are not numbers")
