"""Prompts on their way: which one's next unit runs.

A prompt is runnable, or waits for a call to a shard; the engine's loop runs units of runnable ones only
(design §5). One segment is under way at a time, so that one segment's memory is held; others begin while it
waits. Turns go to the oldest prompt and to the one with least left by turns: a short prompt does not wait for
a long one's end, nor a long one for all short ones'. Called by ``engine``; it must not know what happens
between two units.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.models.llama import Llama
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import Pool
from farshore.workers.engine.prefill.segment import Segment, Unit
from farshore.workers.engine.sequence import Prefilled, Sequence

PROGRESS_S = 0.5
"""Between two events of one segment."""
MOST_SEGMENTS = 4
"""Under way at a time: all but one of them wait for shards."""


class Outcome(NamedTuple):
    """What became of ``sequence`` in a unit. ``error``: remove it. ``sealed``: a segment of it is. ``done``:
    everything of it is, and it is not here any more."""

    sequence: Sequence
    sealed: bool = False
    done: bool = False
    logits: Tensor | None = None
    """f32[vocab], behind the prompt; None where the next token was drawn long ago."""
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Prompt:
    sequence: Sequence
    segment: Segment | None = None
    steps: Iterator[Unit | Future[Any]] = field(default_factory=lambda: iter(()))
    waits_for: list[Future[Any]] = field(default_factory=list)
    """Calls that must succeed before the next step."""
    sealing: bool = False
    told_s: float = 0.0

    @property
    def is_runnable(self) -> bool:
        return all(call.done() for call in self.waits_for)


class Prompts:
    """``segment_tokens``: tokens that go through the layers together."""

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        pool: Pool,
        cache: SequenceCache,
        segment_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._attention = attention
        self._pool = pool
        self._cache = cache
        self._segment_tokens = segment_tokens
        self._clock = clock
        self._queue: list[_Prompt] = []
        self._turns = 0
        self._current: _Prompt | None = None

    def __iter__(self) -> Iterator[Sequence]:
        return iter([prompt.sequence for prompt in self._queue])

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """A sequence that is placed, some of it not prefilled yet."""
        self._queue.append(_Prompt(sequence))

    def remove(self, sequence: Sequence) -> None:
        """Give up. What was not sealed was never there. Unknown ones are ignored."""
        for prompt in [prompt for prompt in self._queue if prompt.sequence is sequence]:
            if prompt.segment is not None:
                prompt.segment.close()
            self._queue.remove(prompt)
            if self._current is prompt:
                self._current = None

    def run_unit(self) -> Outcome | None:
        """Run the next unit of a prompt that is runnable; None where there is none."""
        prompt = self._choose()
        if prompt is None:
            return None
        try:
            return self._advance(prompt)
        except Exception as error:
            return Outcome(prompt.sequence, error=error)

    def _advance(self, prompt: _Prompt) -> Outcome:
        sequence = prompt.sequence
        for call in prompt.waits_for:
            call.result()
        prompt.waits_for = []
        if prompt.sealing:
            return self._sealed(prompt)
        if prompt.segment is None:
            self._begin(prompt)
        segment = prompt.segment
        assert segment is not None
        for step in prompt.steps:
            if isinstance(step, Future):
                prompt.waits_for = [step]
                if step.done():
                    return self._advance(prompt)
            else:
                step()
                if self._clock() - prompt.told_s > PROGRESS_S and sequence.committed < segment.done_tokens:
                    self._tell(prompt, segment.done_tokens)
            return Outcome(sequence)
        prompt.waits_for = self._cache.seal(sequence, segment.last)
        prompt.sealing = True
        return self._advance(prompt) if prompt.is_runnable else Outcome(sequence)

    def _sealed(self, prompt: _Prompt) -> Outcome:
        sequence, segment = prompt.sequence, prompt.segment
        assert segment is not None
        self._cache.sealed(sequence, segment.last)
        prompt.segment, prompt.sealing = None, False
        self._current = None
        self._tell(prompt, segment.last)
        if segment.last < sequence.prefill_tokens:
            return Outcome(sequence, sealed=True)
        self._queue.remove(prompt)
        logits = None if segment.logits is None else segment.logits[-1]
        return Outcome(sequence, sealed=True, done=True, logits=logits)

    def _choose(self) -> _Prompt | None:
        """The prompt whose segment is under way while it is runnable, else another one."""
        if self._current is not None and self._current.is_runnable:
            return self._current
        begun = [prompt for prompt in self._queue if prompt.segment is not None]
        runnable = [prompt for prompt in begun if prompt.is_runnable]
        if not runnable and len(begun) < MOST_SEGMENTS:
            runnable = self._next([prompt for prompt in self._queue if prompt.segment is None])
        self._current = runnable[0] if runnable else None
        return self._current

    def _next(self, prompts: list[_Prompt]) -> list[_Prompt]:
        if not prompts:
            return []
        self._turns += 1
        if self._turns % 2:
            return prompts[:1]
        return [min(prompts, key=lambda prompt: prompt.sequence.prefill_tokens - prompt.sequence.committed)]

    def _begin(self, prompt: _Prompt) -> None:
        sequence = prompt.sequence
        first = sequence.committed
        last = min(first + self._segment_tokens, sequence.prefill_tokens)
        prompt.segment = Segment(
            sequence,
            first,
            last,
            model=self._model,
            attention=self._attention,
            pool=self._pool,
            logits_of=int(last == sequence.prefill_tokens and not sequence.forked),
        )
        prompt.steps = prompt.segment.units()
        prompt.told_s = self._clock()

    def _tell(self, prompt: _Prompt, done_tokens: int) -> None:
        prompt.told_s = self._clock()
        sequence = prompt.sequence
        if not sequence.forked:  # else tokens were emitted already
            sequence.emit(Prefilled(done_tokens, sequence.prefill_tokens))
