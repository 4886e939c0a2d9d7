"""Draws from the rows of a step: one by one on a CPU, all in one pass on a GPU.

A sequence's rows after the first are those of its guesses, and each is drawn from as if the guesses before it
were right. On a CPU a draw is computed when it is asked for, so that none is computed behind a wrong guess.
On a GPU all are computed before the first is asked for: one wait a step instead of one a row.

Called by ``step_entry``. It must not know how a step runs or commits.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from farshore.kernels.runtime.base import DeviceRuntime
from farshore.workers.engine.decode.device_sampler import DrawBatch
from farshore.workers.engine.decode.sampler import DrawnToken, sample
from farshore.workers.engine.sequence import Sequence

Draw = Callable[[int], DrawnToken]
"""Draws from one of a sequence's rows, given that its tokens end with the guesses before that row. Raises
FarshoreError if no token can be drawn."""


def draws_of(guesses: Seq[tuple[Sequence, list[int]]], logits: Tensor, runtime: DeviceRuntime) -> list[Draw]:
    """The draws of each sequence. ``guesses``: the step's sequences, each with its guesses. ``logits``:
    ``f32[rows, vocab]``, one row for each sequence and one for each of its guesses, in this order, on the
    device of ``runtime``, which the calling thread has entered."""
    rows = [1 + len(of_sequence) for _, of_sequence in guesses]
    cuts = [slice(last - count, last) for last, count in zip(accumulate(rows), rows, strict=True)]
    if not runtime.is_host:
        return _together(guesses, cuts, logits, runtime)
    return [
        partial(_draw_row, sequence, logits[cut]) for (sequence, _), cut in zip(guesses, cuts, strict=True)
    ]


def _draw_row(sequence: Sequence, logits: Tensor, row: int) -> DrawnToken:
    return sample(logits[row], sequence.sampling, **_context(sequence))


def _together(
    guesses: Seq[tuple[Sequence, list[int]]], cuts: Seq[slice], logits: Tensor, runtime: DeviceRuntime
) -> list[Draw]:
    batch = DrawBatch(logits.shape[-1])
    errors = []
    firsts = []
    for (sequence, of_sequence), cut in zip(guesses, cuts, strict=True):
        firsts.append(len(batch))
        errors.append(_add_rows(batch, sequence, of_sequence, cut.start))
    results = batch.draw(logits, runtime)
    ends = [*firsts[1:], len(batch)]
    return [
        partial(_drawn_row, results[first:end], error)
        for first, end, error in zip(firsts, ends, errors, strict=True)
    ]


def _drawn_row(results: Seq[DrawnToken | Exception], error: Exception | None, row: int) -> DrawnToken:
    """``error``: why the row after the last result can't be drawn from."""
    result = results[row] if row < len(results) else error
    if isinstance(result, DrawnToken):
        return result
    assert result is not None, "this row follows a guess that can't be drawn"
    raise result


def _add_rows(batch: DrawBatch, sequence: Sequence, guesses: list[int], first: int) -> Exception | None:
    """Adds a sequence's rows to ``batch``, up to one whose guess can't be drawn, or that can't be drawn from:
    returns that row's error."""
    length = len(sequence.tokens)
    try:
        for row, guess in enumerate([*guesses, None]):
            allowed = batch.add(first + row, sequence.sampling, **_context(sequence))
            if guess is None or (allowed is not None and not allowed[guess]):
                return None
            sequence.tokens.append(guess)
    except Exception as error:
        return error
    finally:
        if len(sequence.tokens) > length:
            del sequence.tokens[length:]
            sequence.token_counts.truncate(sequence.completion_tokens)
            if sequence.mask is not None:
                sequence.mask.truncate(sequence.tokens, sequence.prompt_tokens)
    return None


def _context(sequence: Sequence) -> dict[str, Any]:
    """The arguments by which a sampler knows a sequence."""
    return {
        "tokens": sequence.tokens,
        "prompt_tokens": sequence.prompt_tokens,
        "counts": sequence.token_counts,
        "choice": sequence.choice,
        "mask": sequence.mask,
    }
