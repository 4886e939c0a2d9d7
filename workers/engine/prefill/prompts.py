"""The prompts under prefill, and the choice of the prompt whose unit runs next.

A prompt is runnable, or waits for a call to a shard; only runnable prompts run units, so the engine's thread
never waits for a shard. One segment runs at a time, which bounds memory; others start only while it waits.
New segments alternate between the oldest prompt and the prompt with the fewest tokens left: a short prompt
does not wait for the end of a long one, and a long prompt does not wait for all short ones.

Called by ``scheduler``. It must not know what happens between two units.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.ids import WorkerId
from farshore.kernels.base import Kernels
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.models.llama import Llama
from farshore.workers.engine.kv.cache import SequenceCache
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.prefill.segment import PrefillSegment, Unit
from farshore.workers.engine.sequence import Prefilled, PromptLogprobs, PromptToken, Sequence

PROGRESS_S = 0.5
"""Least time between two progress events of one segment."""
LOGPROBS_TOKENS = 256
"""Most tokens of a prompt in one event of their log-probabilities."""
MOST_SEGMENTS = 4
"""Most segments in memory at a time; all but one of them wait for shards."""


class Outcome(NamedTuple):
    """The result of one unit."""

    sequence: Sequence
    sealed: bool = False
    """Whether the unit sealed a segment of the prompt."""
    done: bool = False
    """Whether the whole prompt is sealed. It is then removed from :class:`Prompts`."""
    logits: Tensor | None = None
    """f32[vocab] after the last token, if ``done``; None if the sequence was parked after its first draw."""
    error: Exception | None = None
    """The error of the unit. The caller must :meth:`Prompts.remove` the sequence."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """A sequence and its segment under way, if any."""

    sequence: Sequence
    segment: PrefillSegment | None = None
    units: Iterator[Unit | Future[Any]] = field(default_factory=lambda: iter(()))
    waits_for: list[Future[Any]] = field(default_factory=list)
    """Calls that must succeed before the next unit."""
    sealing: bool = False
    """Whether all units have run, and ``waits_for`` holds the seals."""
    reported_s: float = 0.0
    """Clock time of the last progress event."""

    @property
    def is_runnable(self) -> bool:
        return all(call.done() for call in self.waits_for)


class Prompts:
    """The prompts of one engine under prefill. Not thread-safe; no call waits for a shard.

    ``segment_tokens`` is the length of a prefill segment. ``local``: the worker whose spans lie on the
    runtime's device, if any.
    """

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        kernels: Kernels[Any],
        pool: ShardPool,
        cache: SequenceCache,
        runtime: DeviceRuntime,
        local: WorkerId | None,
        segment_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._attention = attention
        self._kernels = kernels
        self._pool = pool
        self._cache = cache
        self._runtime = runtime
        self._local = local
        self._segment_tokens = segment_tokens
        self._clock = clock
        self._queue: list[_Prompt] = []
        self._starts = 0
        self._current: _Prompt | None = None

    def __iter__(self) -> Iterator[Sequence]:
        return iter([prompt.sequence for prompt in self._queue])

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Adds a placed sequence with tokens that are not prefilled yet."""
        self._queue.append(_Prompt(sequence))

    def remove(self, sequence: Sequence) -> None:
        """Stops the prefill of a sequence.

        KV that is not sealed is discarded. Unknown sequences are ignored.
        """
        for prompt in [prompt for prompt in self._queue if prompt.sequence is sequence]:
            if prompt.segment is not None:
                prompt.segment.close()
            self._queue.remove(prompt)
            if self._current is prompt:
                self._current = None

    def run_unit(self) -> Outcome | None:
        """Runs one unit of a runnable prompt. Returns None if no prompt is runnable."""
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
            return self._finish_segment(prompt)
        if prompt.segment is None:
            prompt.waits_for = self._cache.leave_draining(sequence)
            if prompt.waits_for:
                return self._advance(prompt) if prompt.is_runnable else Outcome(sequence)
            self._start_segment(prompt)
        segment = prompt.segment
        assert segment is not None
        for unit in prompt.units:
            if isinstance(unit, Future):
                prompt.waits_for = [unit]
                if unit.done():
                    return self._advance(prompt)
            else:
                unit()
                if (
                    self._clock() - prompt.reported_s > PROGRESS_S
                    and sequence.committed < segment.done_tokens
                ):
                    self._report_progress(prompt, segment.done_tokens)
            return Outcome(sequence)
        prompt.waits_for = self._cache.seal(sequence, segment.last)
        prompt.sealing = True
        return self._advance(prompt) if prompt.is_runnable else Outcome(sequence)

    def _finish_segment(self, prompt: _Prompt) -> Outcome:
        sequence, segment = prompt.sequence, prompt.segment
        assert segment is not None
        self._cache.sealed(sequence, segment.last)
        _emit_logprobs(sequence, segment)
        prompt.segment, prompt.sealing = None, False
        self._current = None
        self._report_progress(prompt, segment.last)
        if segment.last < sequence.prefill_tokens:
            return Outcome(sequence, sealed=True)
        self._queue.remove(prompt)
        logits = None if segment.logits is None else segment.logits[-1]
        return Outcome(sequence, sealed=True, done=True, logits=logits)

    def _choose(self) -> _Prompt | None:
        """Chooses the current prompt while it is runnable, else another one."""
        if self._current is not None and self._current.is_runnable:
            return self._current
        started = [prompt for prompt in self._queue if prompt.segment is not None]
        runnable = [prompt for prompt in started if prompt.is_runnable]
        if not runnable and len(started) < MOST_SEGMENTS:
            runnable = self._next_to_start(
                [prompt for prompt in self._queue if prompt.segment is None and prompt.is_runnable]
            )
        self._current = runnable[0] if runnable else None
        return self._current

    def _next_to_start(self, prompts: list[_Prompt]) -> list[_Prompt]:
        """Returns the one of ``prompts`` that starts a segment next, or []: alternately the oldest and the
        one with the fewest tokens left."""
        if not prompts:
            return []
        self._starts += 1
        if self._starts % 2:
            return prompts[:1]
        return [min(prompts, key=lambda prompt: prompt.sequence.prefill_tokens - prompt.sequence.committed)]

    def _start_segment(self, prompt: _Prompt) -> None:
        sequence = prompt.sequence
        first = sequence.committed
        last = min(first + self._segment_tokens, sequence.prefill_tokens)
        prompt.segment = PrefillSegment(
            sequence,
            first,
            last,
            model=self._model,
            attention=self._attention,
            kernels=self._kernels,
            pool=self._pool,
            runtime=self._runtime,
            local=self._local,
            logits_of=int(last == sequence.prefill_tokens and not sequence.forked),
            scored_from=(
                max(first, sequence.prompt_logprobs_sent - 1) if sequence.owes_prompt_logprobs else None
            ),
        )
        prompt.units = prompt.segment.units()
        prompt.reported_s = self._clock()

    def _report_progress(self, prompt: _Prompt, done_tokens: int) -> None:
        prompt.reported_s = self._clock()
        sequence = prompt.sequence
        if not sequence.forked:  # A forked sequence has emitted tokens already.
            sequence.emit(Prefilled(done_tokens, sequence.prefill_tokens))


def _emit_logprobs(sequence: Sequence, segment: PrefillSegment) -> None:
    """Emits the log-probabilities that a sealed segment has computed. Those of a segment that is not sealed
    are computed again."""
    if not sequence.owes_prompt_logprobs:
        return
    tokens = segment.prompt_tokens
    if not sequence.prompt_logprobs_sent:
        tokens = [PromptToken(sequence.tokens[0]), *tokens]
    for first in range(0, len(tokens), LOGPROBS_TOKENS):
        piece = tokens[first : first + LOGPROBS_TOKENS]
        sequence.emit(PromptLogprobs(sequence.prompt_logprobs_sent, piece))
        sequence.prompt_logprobs_sent += len(piece)
