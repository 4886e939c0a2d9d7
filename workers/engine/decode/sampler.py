"""Draws the next token from logits.

The stages that one row passes, in this order::

    logits ─▶ bias ─▶ repetition penalty ─▶ presence, frequency penalties ─▶ mask ─┬▶ greedy: the likeliest
      └─▶ log-probabilities: of the model itself                                   └▶ temperature ─▶ top-k
                                                                                    ─▶ top-p ─▶ min-p ─▶ draw

Bias and penalties precede the temperature, as in vLLM. top-k, top-p and min-p work as in transformers, each
on the tokens that the previous stage kept. Log-probabilities are those of the unchanged logits, vLLM's
default. For any finite parameters a token with a positive weight is drawn: adjusted logits stay in float32's
range, and a parameter outside its meaningful range is clipped to it. Greedy takes the smallest id among equal
logits.

A draw uses one random number, a hash of (seed, choice, position). So a repeated step draws the same token, on
any engine and in any batch. Called by ``decode.step_entry``. It must not know sequences or batches. It uses
numpy: sorting and summing one row of 49K logits takes a tenth of PyTorch's time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farshore.sampling import Sampling
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.logprobs import check_finite, logprobs_of
from farshore.workers.engine.penalties import (
    Row,
    TokenCounts,
    add_bias,
    finite,
    penalise_counts,
    penalise_repetition,
)

_BLOCK = 256
"""Weights per partial sum. A draw needs the running sums of the partial sums and of one block only."""

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio


class DrawnToken(NamedTuple):
    """A drawn token and its log-probability.

    ``top`` lists the likeliest (token, log-probability) pairs, best first. Log-probabilities are natural
    logarithms under the model's distribution before bias, penalties and temperature. If they are not
    requested, ``logprob`` is None and ``top`` is empty.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Tensor,
    sampling: Sampling,
    *,
    tokens: Sequence[int],
    prompt_tokens: int,
    counts: TokenCounts,
    choice: int = 0,
    mask: TokenMask | None = None,
) -> DrawnToken:
    """Draws the token that follows ``tokens`` from ``logits`` (``f32[vocab]``, not changed).

    The first ``prompt_tokens`` of ``tokens`` are the prompt. ``counts`` belongs to the sequence; it is
    updated if a penalty needs it. ``choice`` is the number of the completion in its request. ``mask``: which
    tokens may be drawn; None: all. Raises FarshoreError if a logit is not finite or the mask allows nothing,
    and nothing else.
    """
    model_row: Row = logits.cpu().numpy()
    check_finite(model_row)
    row = adjusted(model_row, sampling, tokens=tokens, prompt_tokens=prompt_tokens, counts=counts)
    if mask is not None:
        row = np.where(mask.allowed(tokens, prompt_tokens), row, np.float32(-np.inf))
    temperature = np.float32(finite(sampling.temperature))
    if temperature <= 0.0:
        token = int(row.argmax())
    else:
        ids, weights = candidates(row, sampling)
        token = int(ids[_index_beyond(weights, uniform(sampling.seed, choice, len(tokens)))])
    if sampling.logprobs is None:
        return DrawnToken(token)
    return DrawnToken(token, *logprobs_of(model_row, token, alternatives=sampling.logprobs))


def uniform(seed: int, choice: int, position: int) -> float:
    """Returns the random number in [0, 1) of a key: splitmix64's finaliser applied to each word in turn."""
    word = 0
    for key in (seed, choice, position):
        word = _mixed((word + _GOLDEN * (key + 1)) & _WORD)
    # With 52 bits, its product with a float64 sum rounds to less than that sum.
    return (word >> 12) * 2.0**-52


def _mixed(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def adjusted(
    row: Row, sampling: Sampling, *, tokens: Sequence[int], prompt_tokens: int, counts: TokenCounts
) -> Row:
    """Returns ``row``, or a copy with bias and penalties applied; finite if ``row`` is.

    The repetition penalty counts prompt and completion; the presence and frequency penalties count the
    completion only.
    """
    counted = sampling.presence_penalty or sampling.frequency_penalty
    repeated = sampling.repetition_penalty != 1.0
    if not (sampling.logit_bias or repeated or counted):
        return row
    row = row.copy()
    if sampling.logit_bias:
        add_bias(row, sampling.logit_bias)
    if repeated or counted:
        counts.update(tokens, prompt_tokens)
    if repeated:
        penalise_repetition(row, counts.ids, sampling.repetition_penalty)
    if counted:
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        penalise_counts(row, *counts.generated, presence=presence, frequency=frequency)
    return row


def candidates(row: Row, sampling: Sampling) -> tuple[NDArray[np.intp], Row]:
    """Returns the token ids that may be drawn, ascending, and their weights, f32; the largest weight is 1.

    There is at least one id. The temperature must be above 0.
    """
    # The maximum is subtracted before the division: at a low temperature a logit can only overflow to -inf,
    # which is a weight of 0.
    with np.errstate(over="ignore"):
        logits = (row - row.max()) / np.float32(finite(sampling.temperature))
    ids = None
    if 0 < sampling.top_k < logits.size:
        kth = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(logits >= kth)
        logits = logits[ids]
    weights = np.exp(logits)
    if sampling.top_p < 1.0:
        kept = _nucleus(weights, max(sampling.top_p, 0.0))
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(weights >= np.float32(min(sampling.min_p, 1.0)))
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return np.arange(row.size) if ids is None else ids, weights


def _nucleus(weights: Row, top_p: float) -> NDArray[np.intp]:
    """Returns the indices of the smallest set of largest weights whose sum reaches ``top_p`` of the total.

    Among equal weights the first ones are in the set.
    """
    total = weights.sum(dtype=np.float64)
    # All weights below this bound together are less than 1 - top_p of the total, so none of them is in the
    # set. For most rows a few hundred weights remain to be sorted.
    large = np.flatnonzero(weights >= np.float32(total * (1.0 - top_p) / weights.size))
    large_weights = weights[large]
    descending = np.sort(large_weights)[::-1]
    count = 1 + _index_beyond(descending, top_p * total / descending.sum(dtype=np.float64), or_equal=True)
    smallest = descending[count - 1]
    equal = np.flatnonzero(large_weights == smallest)
    surplus = int(np.count_nonzero(large_weights >= smallest)) - count
    inside = large_weights >= smallest
    inside[equal[len(equal) - surplus :]] = False
    return large[inside]


def _index_beyond(weights: Row, share: float, *, or_equal: bool = False) -> int:
    """Returns the first index at which the running sum of ``weights`` exceeds ``share`` of their sum.

    With ``or_equal``, reaching it suffices. The weight at the index is above 0. The sum must be above 0.
    """
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64)
    sums = blocks.cumsum()
    target = share * sums[-1]
    block = _first_beyond(sums, target, or_equal=or_equal)
    first = block * _BLOCK
    inside = weights[first : first + _BLOCK].cumsum(dtype=np.float64)
    return first + _first_beyond(inside, target - (sums[block - 1] if block else 0.0), or_equal=or_equal)


def _first_beyond(sums: NDArray[np.float64], target: float, *, or_equal: bool) -> int:
    """Returns the first index at which the running ``sums`` exceed ``target``, or with ``or_equal`` reach it.

    The index is at most that of the last positive weight: sums of blocks and sums of weights may differ in
    the last bit, so ``target`` may exceed the last sum.
    """
    index = int(np.searchsorted(sums, target, side="left" if or_equal else "right"))
    return min(index, int(np.searchsorted(sums, sums[-1], side="left")))
