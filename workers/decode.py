"""One decode step of many sequences: plan, run, draw, commit. A step that fails leaves no trace.

A sequence brings one row, or more where there are guesses at what comes next: each guess is a row too, and
all are verified at once. The step's last word has the sampler: a guess is taken if it is the token drawn at
its place, so that what is generated is what steps of one row would have generated::

    committed        row 0       row 1       row 2
    ... the  cat │   sat         on          a           tokens
                     ↓           ↓           ↓
                     on  = on    the ≠ a     (dropped)   drawn: "on", "the"
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan import Read, StepPlan, Stretch
from farshore.errors import FarshoreError
from farshore.ids import WorkerId
from farshore.workers.sampler import Choice, sample
from farshore.workers.sequence import Sequence


@dataclass(slots=True)
class Turn:
    """One sequence in one step."""

    sequence: Sequence
    guesses: list[int]
    drawn: list[Choice]
    """Its next tokens, once the step has run: one, and one more for each guess that was right."""
    error: FarshoreError | None = None
    """Why nothing could be drawn."""

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


def make_plan(step: int, turns: Seq[Turn], attention: AttentionModel) -> StepPlan:
    """Rows from each sequence's committed length on. A span that rows one after the other attend to alike is
    read once."""
    reads: dict[WorkerId, list[Read]] = {}
    newest: dict[tuple[str, int, int, int, int], tuple[list[Read], int]] = {}
    row = 0
    for turn in turns:
        end = row + turn.rows
        for span in turn.sequence.spans:
            key = (span.span, span.first, span.last, span.group0, span.group1)
            where, index = newest.get(key, (None, 0))
            if where is not None and where[index].rows.stop == row:
                where[index] = where[index]._replace(rows=range(where[index].rows.start, end))
                continue
            of_worker = reads.setdefault(span.worker, [])
            newest[key] = of_worker, len(of_worker)
            of_worker.append(
                Read(
                    span.span,
                    span.origin,
                    span.first,
                    span.last,
                    span.group0,
                    span.group1,
                    range(row, end),
                )
            )
        row = end
    return StepPlan(
        step=step,
        groups=attention.specs[0].groups,
        sequences=tuple(turn.sequence.id for turn in turns for _ in range(turn.rows)),
        positions=tuple(turn.sequence.committed + i for turn in turns for i in range(turn.rows)),
        epochs={turn.sequence.id: turn.sequence.epoch for turn in turns},
        reads=({worker: tuple(r) for worker, r in reads.items()},),
    )


def check_plan(plan: StepPlan, turns: Seq[Turn]) -> None:
    """Raises InvalidPlan; nothing has been sent then."""
    plan.check(
        {turn.sequence.id: turn.sequence.committed for turn in turns},
        {
            turn.sequence.id: Stretch(turn.sequence.placed_tail.start, turn.sequence.committed + turn.rows)
            for turn in turns
        },
    )


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
        except FarshoreError as error:
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
        sequence, tail = turn.sequence, turn.sequence.placed_tail
        sequence.committed += len(turn.drawn)
        tail.advance(sequence.committed)
        if len(turn.drawn) < turn.rows:
            tail.truncate(sequence.committed)


def drop_scratch(turns: Seq[Turn]) -> None:
    """After a failed step: nothing above the committed lengths remains."""
    for turn in turns:
        turn.sequence.placed_tail.truncate(turn.sequence.committed)


def reserve(turns: Seq[Turn], give_up: Callable[[Sequence, FarshoreError], None]) -> list[Turn]:
    """Make room in the tails; guesses are dropped where there is none for them. ``give_up`` is called for
    sequences without room for a single row, and the others are returned."""
    ready = []
    for turn in turns:
        sequence, tail = turn.sequence, turn.sequence.placed_tail
        try:
            try:
                tail.reserve(sequence.committed + turn.rows)
            except FarshoreError:
                turn.guesses = []
                tail.reserve(sequence.committed + 1)
        except FarshoreError as error:
            give_up(sequence, error)
            continue
        ready.append(turn)
    return ready
