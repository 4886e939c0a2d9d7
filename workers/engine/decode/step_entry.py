"""The sequences of one decode step: their guesses, their rows, and the tokens drawn from its logits.

A sequence has one row, plus one row for each guess; a step verifies all guesses at once. A guess is accepted
if the sampler draws the same token at its position, so the tokens equal those of steps without guesses::

    committed        row 0       row 1       row 2
    ... the  cat │   sat         on          a           tokens
                     ↓           ↓           ↓
                     on  = on    the ≠ a     (dropped)   drawn: "on", "the"

Called by ``scheduler`` and ``retry``. It must not know shards or how a step runs.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import StepPlan
from farshore.errors import Full
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.workers.engine.decode.draws import draws_of
from farshore.workers.engine.decode.sampler import DrawnToken
from farshore.workers.engine.sequence import Sequence


@dataclass(slots=True)
class StepEntry:
    """One sequence's rows of a step: its newest token and its guesses."""

    sequence: Sequence
    guesses: list[int]
    drawn: list[DrawnToken]
    """The next tokens, after the step: one, and one more for each accepted guess."""
    error: Exception | None = None
    """The error of this sequence alone, if drawing or committing failed."""

    @property
    def rows(self) -> int:
        """Number of the sequence's rows in the step."""
        return 1 + len(self.guesses)


def order_by_spans(batch: Seq[Sequence]) -> list[Sequence]:
    """Sorts sequences so that those that share spans are adjacent: a step reads a shared span once."""
    return sorted(batch, key=lambda sequence: [span.span for span in sequence.spans])


MOST_ROWS_WITH_GUESSES = 16
"""Guesses are added while the step has fewer rows than this. Beyond, a row costs more than a guess gains."""


def add_guesses(entries: Seq[StepEntry]) -> None:
    """Adds guesses to the entries, up to ``MOST_ROWS_WITH_GUESSES`` rows in all."""
    room = MOST_ROWS_WITH_GUESSES - len(entries)
    for index, entry in enumerate(entries):
        sequence = entry.sequence
        # No guess is needed for the token after the last requested one.
        most = min(
            room // (len(entries) - index), sequence.sampling.max_tokens - sequence.completion_tokens - 1
        )
        if sequence.lookup is not None and most > 0:
            entry.guesses = sequence.lookup.propose(sequence.tokens, most)
            room -= len(entry.guesses)


def draw_tokens(entries: Seq[StepEntry], logits: Tensor, runtime: DeviceRuntime) -> None:
    """Draws each sequence's next tokens from the step's logits, ``f32[rows, vocab]``, and appends them.

    ``runtime``: of the logits' device, which the calling thread has entered.
    Drawing for a sequence stops at its first wrong guess and at its last token. An error is stored in the
    entry and does not affect the others.
    """
    draws = draws_of([(entry.sequence, entry.guesses) for entry in entries], logits, runtime)
    for entry, draw in zip(entries, draws, strict=True):
        entry.drawn = []
        try:
            for row, guess in enumerate([*entry.guesses, None]):
                entry.drawn.append(draw(row))
                entry.sequence.tokens.append(entry.drawn[-1].token)
                if entry.drawn[-1].token != guess or entry.sequence.finish_reason() is not None:
                    break
        except Exception as error:
            entry.error = error
        if entry.guesses and entry.sequence.lookup is not None:
            entry.sequence.lookup.record(len(entry.guesses), len(entry.drawn) - 1)


def prepare_mask(sequence: Sequence) -> None:
    """Begins to compute which tokens may come next, so that the next step's draw need not wait for it."""
    if sequence.mask is not None and sequence.finish_reason() is None:
        sequence.mask.prepare(sequence.tokens, sequence.prompt_tokens)


def commit(plan: StepPlan, entries: Seq[StepEntry], attention: AttentionModel) -> None:
    """Commits the KV of the rows that tokens were drawn from, and truncates the tails above it.

    Adds the bytes that shards attended to to ``attended_bytes``; a shared read counts for its first sequence.
    An error is stored in the entry.
    """
    group_bytes = attention.layouts[0].of_groups(1).token_bytes
    sequence_of_row = [entry.sequence for entry in entries for _ in range(entry.rows)]
    for worker, reads in plan.reads[0].items():
        for read in reads:
            size = (read.last - read.first) * (read.group1 - read.group0) * group_bytes
            sequence_of_row[read.rows.start].attended_bytes[worker] += size
    for entry in entries:
        if entry.error is not None:
            continue
        try:
            sequence, tail = entry.sequence, entry.sequence.placed_tail
            sequence.committed += len(entry.drawn)
            tail.advance(sequence.committed)
            if len(entry.drawn) < entry.rows:
                tail.truncate(sequence.committed)
            prepare_mask(sequence)
        except Exception as error:
            entry.error = error


def truncate_tails(entries: Seq[StepEntry]) -> None:
    """Truncates the tails to the committed lengths, after a failed step."""
    for entry in entries:
        entry.sequence.placed_tail.truncate(entry.sequence.committed)


def reserve_tail(entry: StepEntry) -> None:
    """Reserves room for the entry's rows in the tail; drops the guesses if there is no room for them.

    Raises Full if there is no room for one row.
    """
    sequence, tail = entry.sequence, entry.sequence.placed_tail
    try:
        tail.reserve(sequence.committed + entry.rows)
    except Full:
        if not entry.guesses:
            raise
        entry.guesses = []
        tail.reserve(sequence.committed + 1)
