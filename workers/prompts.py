"""Prompts on their way: which one's next unit runs.

One segment is under way at a time, so that one segment's memory is held. Turns go to the oldest prompt and to
the one with least left by turns: a short prompt does not wait for a long one's end, nor a long one for all
short ones'. Called by ``engine``; it must not know what happens between two units.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Peer
from farshore.ids import WorkerId
from farshore.models.llama import Llama
from farshore.workers.attempts import attempt
from farshore.workers.cache import SequenceCache
from farshore.workers.prefill import Segment, Unit
from farshore.workers.sequence import Prefilled, Sequence

PROGRESS_S = 0.5
"""Between two events of one segment."""


class Prompts:
    """``segment_tokens``: tokens that go through the layers together."""

    def __init__(
        self,
        *,
        model: Llama,
        attention: AttentionModel,
        peers: Mapping[WorkerId, Peer],
        cache: SequenceCache,
        segment_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._attention = attention
        self._peers = peers
        self._cache = cache
        self._segment_tokens = segment_tokens
        self._clock = clock
        self._queue: list[Sequence] = []
        self._turns = 0
        self._segment: Segment | None = None
        self._units: Iterator[Unit] = iter(())
        self._told_s = 0.0
        # One thread writes, one pulls.
        self._helper = ThreadPoolExecutor(2, thread_name_prefix="prefill")

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """A sequence that is placed."""
        self._queue.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Give up. What was not sealed was never there. Unknown ones are ignored."""
        if self._segment is not None and self._segment.sequence is sequence:
            self._segment.close()
            self._segment = None
        if sequence in self._queue:
            self._queue.remove(sequence)

    def current(self) -> Sequence:
        """Whose the next unit is."""
        if self._segment is None:
            self._begin()
        assert self._segment is not None
        return self._segment.sequence

    def run_unit(self) -> Tensor | None:
        """Run the next unit. Where it is a prompt's last one: logits ``f32[vocab]`` behind the prompt, which
        is sealed and not here any more.

        Raises what the unit failed with at its last attempt: remove the sequence.
        """
        sequence, segment = self.current(), self._segment
        assert segment is not None
        unit = next(self._units, None)
        if unit is not None:
            attempt(unit)
            if self._clock() - self._told_s > PROGRESS_S and sequence.committed < segment.done_tokens:
                self._tell(sequence, segment.done_tokens)
            return None
        attempt(lambda: self._cache.seal(sequence, segment.last))
        self._segment = None
        self._tell(sequence, segment.last)
        if segment.logits is not None:
            self._queue.remove(sequence)
            return segment.logits[-1]
        return None

    def close(self) -> None:
        self._helper.shutdown(wait=True)

    def _begin(self) -> None:
        self._turns += 1
        left = lambda sequence: sequence.prompt_tokens - sequence.committed  # noqa: E731
        sequence = self._queue[0] if self._turns % 2 else min(self._queue, key=left)
        first = sequence.committed
        last = min(first + self._segment_tokens, sequence.prompt_tokens)
        self._segment = Segment(
            sequence,
            first,
            last,
            model=self._model,
            attention=self._attention,
            peers=self._peers,
            helper=self._helper,
            logits_of=int(last == sequence.prompt_tokens),
        )
        self._units = self._segment.units()
        self._told_s = self._clock()

    def _tell(self, sequence: Sequence, done_tokens: int) -> None:
        self._told_s = self._clock()
        sequence.emit(Prefilled(done_tokens, sequence.prompt_tokens))
