"""One decode step's rows: guess, draw, commit. A step that fails leaves no trace.

A sequence brings one row, or more where there are guesses at what comes next: each guess is a row too, and
all are verified at once. The step's last word has the sampler: a guess is taken if it is the token drawn at
its place, so that what is generated is what steps of one row would have generated::

    committed        row 0       row 1       row 2
    ... the  cat │   sat         on          a           tokens
                     ↓           ↓           ↓
                     on  = on    the ≠ a     (dropped)   drawn: "on", "the"
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import StepPlan
from farshore.errors import Full
from farshore.workers.engine.decode.sampler import Choice, sample
from farshore.workers.engine.sequence import Sequence


@dataclass(slots=True)
class StepEntry:
    """One sequence in one step."""

    sequence: Sequence
    guesses: list[int]
    drawn: list[Choice]
    """Its next tokens, once the step has run: one, and one more for each guess that was right."""
    error: Exception | None = None
    """Why its own part of the step failed."""

    @property
    def rows(self) -> int:
        return 1 + len(self.guesses)


def order(batch: Seq[Sequence]) -> list[Sequence]:
    """Sequences that share spans one after the other: what they share is read once for all of them."""
    return sorted(batch, key=lambda sequence: [span.span for span in sequence.spans])


MOST_GUESSING_ROWS = 16
"""Rows of a step that guesses may fill up: beyond, a row costs more than the guess is worth."""


def guess(entries: Seq[StepEntry]) -> None:
    """Let the sequences guess what comes next, as far as the step has room for rows."""
    room = MOST_GUESSING_ROWS - len(entries)
    for index, entry in enumerate(entries):
        sequence = entry.sequence
        # The last token that is asked for needs no guess behind it.
        most = min(
            room // (len(entries) - index), sequence.sampling.max_tokens - sequence.completion_tokens - 1
        )
        if sequence.lookup is not None and most > 0:
            entry.guesses = sequence.lookup.propose(sequence.tokens, most)
            room -= len(entry.guesses)


def draw(entries: Seq[StepEntry], logits: Tensor) -> None:
    """Draw every sequence's next tokens from the step's logits ``f32[rows, vocab]``; they become its own."""
    row = 0
    for entry in entries:
        entry.drawn = []
        try:
            for guess, behind in zip([*entry.guesses, None], logits[row : row + entry.rows], strict=True):
                entry.drawn.append(draw_one(entry.sequence, behind))
                if entry.drawn[-1].token != guess or entry.sequence.finish_reason() is not None:
                    break
        except Exception as error:
            entry.error = error
        if entry.guesses and entry.sequence.lookup is not None:
            entry.sequence.lookup.judge(len(entry.guesses), len(entry.drawn) - 1)
        row += entry.rows


def draw_one(sequence: Sequence, logits: Tensor) -> Choice:
    """The token behind all of the sequence's, now the last of them."""
    drawn = sample(
        logits,
        sequence.sampling,
        tokens=sequence.tokens,
        prompt_tokens=sequence.prompt_tokens,
        seen=sequence.seen,
        choice=sequence.choice,
    )
    sequence.tokens.append(drawn.token)
    return drawn


def commit(plan: StepPlan, entries: Seq[StepEntry], attention: AttentionModel) -> None:
    """The KV of the tokens drawn from becomes part of every sequence, the rest is dropped. What the shards
    attended to is counted, shared reads for the first of those that share."""
    group_bytes = attention.layouts[0].of_groups(1).token_bytes
    of_row = [entry.sequence for entry in entries for _ in range(entry.rows)]
    for worker, reads in plan.reads[0].items():
        for read in reads:
            size = (read.last - read.first) * (read.group1 - read.group0) * group_bytes
            of_row[read.rows.start].attended_bytes[worker] += size
    for entry in entries:
        if entry.error is not None:
            continue
        try:
            sequence, tail = entry.sequence, entry.sequence.placed_tail
            sequence.committed += len(entry.drawn)
            tail.advance(sequence.committed)
            if len(entry.drawn) < entry.rows:
                tail.truncate(sequence.committed)
        except Exception as error:
            entry.error = error


def drop_scratch(entries: Seq[StepEntry]) -> None:
    """After a failed step: nothing above the committed lengths remains."""
    for entry in entries:
        entry.sequence.placed_tail.truncate(entry.sequence.committed)


def reserve(entry: StepEntry) -> None:
    """Make room in the sequence's tail; guesses are dropped where there is none for them. Raises Full where
    there is none for a single row."""
    sequence, tail = entry.sequence, entry.sequence.placed_tail
    try:
        tail.reserve(sequence.committed + entry.rows)
    except Full:
        if not entry.guesses:
            raise
        entry.guesses = []
        tail.reserve(sequence.committed + 1)
