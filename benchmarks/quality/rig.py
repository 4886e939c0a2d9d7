"""Reads text with KV in one format, by the engine's prefill, stores and decode steps in this process.

Called by ``benchmark``. It must not know which text is read or which result is expected.
"""

import queue
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Self

import torch
from torch import Tensor

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.errors import DeadlineExceeded
from farshore.ids import FIRST_EPOCH, Epoch, SequenceId, WorkerId
from farshore.kernels.formats import KVFormat
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.kernels.select import implementation
from farshore.kvstore.store.arena.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.kv.prefix import fingerprint
from farshore.workers.engine.prefill.segment import PrefillSegment
from farshore.workers.engine.sequence import Event, Failed, Finished, Sampled, Sequence

ARENA_BYTES = 1 << 30
SEGMENT_TOKENS = 512
"""Rows whose logits are in memory at a time: 100 MB for SmolLM2."""
DEADLINE_S = 600.0

_WORKER = WorkerId("reader")


@dataclass(frozen=True, slots=True)
class Score:
    """The model's predictions of all tokens of a text but the first, each given the tokens before it."""

    logprobs: Tensor
    """f32[n]: natural logarithm of the probability of each token."""
    best: Tensor
    """i64[n]: the most probable token at each place."""
    seconds: float

    @classmethod
    def joined(cls, scores: Iterable["Score"]) -> "Score":
        scores = list(scores)
        return cls(
            torch.cat([score.logprobs for score in scores]),
            torch.cat([score.best for score in scores]),
            sum(score.seconds for score in scores),
        )

    @property
    def perplexity(self) -> float:
        return float(torch.exp(-self.logprobs.double().mean()))


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    seconds: float


class Reader:
    """An engine with its own memory and KV in ``format``. A context manager, which starts and stops it."""

    def __init__(self, model: Llama, format: KVFormat) -> None:
        self._model = model
        self._attention = attention_model(model.config, model.dtype, format)
        self._arena = Arena(ARENA_BYTES)
        store = LocalStore(worker=_WORKER, arena=self._arena)
        self._clients = {_WORKER: InProcessClient(_WORKER, store, self._attention)}
        self._numbers = count(1)
        self._engine = Engine(
            model=model,
            attention=self._attention,
            arena=self._arena,
            clients=self._clients,
            targets=[_WORKER],
            shard_by="range",
        )

    def __enter__(self) -> Self:
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def answer(self, prompt: list[int], *, most_tokens: int) -> Answer:
        """The model's greedy continuation of ``prompt``. Raises the engine's error if the sequence fails, and
        DeadlineExceeded after ``DEADLINE_S`` without an event."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        start_s = time.perf_counter()
        sampling = Sampling(max_tokens=most_tokens)
        self._engine.submit(self._name(), prompt, sampling, events.put, epoch=FIRST_EPOCH)
        tokens: list[int] = []
        while True:
            try:
                event = events.get(timeout=DEADLINE_S)
            except queue.Empty:
                raise DeadlineExceeded(f"the engine said nothing for {DEADLINE_S:.0f} s") from None
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Sampled):
                tokens.append(event.token_id)
            if isinstance(event, Finished):
                return Answer(tokens, time.perf_counter() - start_s)

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> Score:
        """Reads ``tokens`` as one prompt, segment by segment. Each segment attends to the stored KV of the
        segments before it."""
        start_s = time.perf_counter()
        name = self._name()
        sequence = Sequence(
            id=name,
            epoch=Epoch(next(self._numbers)),
            order=0,
            prompt_tokens=len(tokens),
            tokens=tokens,
            sampling=Sampling(max_tokens=1),
            emit=lambda event: None,
            arrived_s=time.monotonic(),
            # A salt of its own: a prefix found in the store would not be computed, and so not scored.
            fingerprint=fingerprint(self._attention, model_content=self._model.content, salt=name),
        )
        pool = ShardPool(self._clients, [_WORKER])
        pool.await_beats(DEADLINE_S)
        cache = SequenceCache(arena=self._arena, pool=pool, model=self._attention, shard_by="range")
        cache.place(sequence, promised_tokens=0)
        logprobs, best = [], []
        try:
            for first in range(0, len(tokens), SEGMENT_TOKENS):
                last = min(first + SEGMENT_TOKENS, len(tokens))
                logits = self._read(sequence, first, last, pool)
                for call in cache.seal(sequence, last):
                    call.result()
                cache.sealed(sequence, last)
                following = torch.tensor(tokens[first + 1 : last + 1])
                rows = torch.log_softmax(logits[: len(following)], dim=-1)
                logprobs.append(rows.gather(1, following[:, None])[:, 0])
                best.append(rows.argmax(-1))
        finally:
            cache.release(sequence)
            pool.close()
        return Score(torch.cat(logprobs), torch.cat(best), time.perf_counter() - start_s)

    def _read(self, sequence: Sequence, first: int, last: int, pool: ShardPool) -> Tensor:
        """Computes positions ``[first, last)``. Returns their logits ``f32[last - first, vocab]``."""
        segment = PrefillSegment(
            sequence,
            first,
            last,
            model=self._model,
            attention=self._attention,
            kernels=implementation(self._model.device, dtype=self._model.dtype),
            pool=pool,
            runtime=ImmediateRuntime(),
            local=None,
            logits_of=last - first,
        )
        for unit in segment.units():
            if isinstance(unit, Future):
                unit.result()
            else:
                unit()
        assert segment.logits is not None
        return segment.logits

    def _name(self) -> SequenceId:
        return SequenceId(f"text-{next(self._numbers)}")
