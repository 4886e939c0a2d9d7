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
from farshore.attention_offload.plan import StepPlan
from farshore.errors import Full
from farshore.workers.sampler import Choice, sample
from farshore.workers.sequence import Sequence


@dataclass(slots=True)
class Turn:
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


def guess(turns: Seq[Turn]) -> None:
    """Let the sequences guess what comes next, as far as the step has room for rows."""
    room = MOST_GUESSING_ROWS - len(turns)
    for index, turn in enumerate(turns):
        sequence = turn.sequence
        # The last token that is asked for needs no guess behind it.
        most = min(
            room // (len(turns) - index), sequence.sampling.max_tokens - sequence.completion_tokens - 1
        )
        if sequence.lookup is not None and most > 0:
            turn.guesses = sequence.lookup.propose(sequence.tokens, most)
            room -= len(turn.guesses)


def draw(turns: Seq[Turn], logits: Tensor) -> None:
    """Draw every sequence's next tokens from the step's logits ``f32[rows, vocab]``; they become its own."""
    row = 0
    for turn in turns:
        turn.drawn = []
        try:
            for guess, behind in zip([*turn.guesses, None], logits[row : row + turn.rows], strict=True):
                turn.drawn.append(draw_one(turn.sequence, behind))
                if turn.drawn[-1].token != guess or turn.sequence.finish_reason() is not None:
                    break
        except Exception as error:
            turn.error = error
        if turn.guesses and turn.sequence.lookup is not None:
            turn.sequence.lookup.judge(len(turn.guesses), len(turn.drawn) - 1)
        row += turn.rows


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


def commit(plan: StepPlan, turns: Seq[Turn], attention: AttentionModel) -> None:
    """The KV of the tokens drawn from becomes part of every sequence, the rest is dropped. What the shards
    attended to is counted, shared reads for the first of those that share."""
    group_bytes = attention.layouts[0].of_groups(1).token_bytes
    of_row = [turn.sequence for turn in turns for _ in range(turn.rows)]
    for worker, reads in plan.reads[0].items():
        for read in reads:
            size = (read.last - read.first) * (read.group1 - read.group0) * group_bytes
            of_row[read.rows.start].attended_bytes[worker] += size
    for turn in turns:
        if turn.error is not None:
            continue
        try:
            sequence, tail = turn.sequence, turn.sequence.placed_tail
            sequence.committed += len(turn.drawn)
            tail.advance(sequence.committed)
            if len(turn.drawn) < turn.rows:
                tail.truncate(sequence.committed)
        except Exception as error:
            turn.error = error


def drop_scratch(turns: Seq[Turn]) -> None:
    """After a failed step: nothing above the committed lengths remains."""
    for turn in turns:
        turn.sequence.placed_tail.truncate(turn.sequence.committed)


def reserve(turn: Turn) -> None:
    """Make room in the sequence's tail; guesses are dropped where there is none for them. Raises Full where
    there is none for a single row."""
    sequence, tail = turn.sequence, turn.sequence.placed_tail
    try:
        tail.reserve(sequence.committed + turn.rows)
    except Full:
        if not turn.guesses:
            raise
        turn.guesses = []
        tail.reserve(sequence.committed + 1)
