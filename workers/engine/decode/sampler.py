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
any engine, in any batch and on any device: ``decode.device_sampler`` draws the same tokens from a batch on a
GPU. Equal tokens need equal sums of weights, in whatever order a device adds; so weights are rounded to
multiples of 1 / :func:`units`, whose sums are exact. A token whose weight is less than half of that, relative
to the likeliest token's weight, is not drawn: 4e-12 for SmolLM2's vocabulary.

Called by ``decode.draws``. It must not know sequences or batches. It uses numpy: sorting and summing one
row of 49K logits takes a tenth of PyTorch's time.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farshore.sampling import Sampling
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.logprobs import check_finite, logprobs_of
from farshore.workers.engine.penalties import Row, TokenCounts, adjust, adjustments, finite

Weights = NDArray[np.float64]

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
    tokens may be drawn; None: all. Raises FarshoreError if the mask allows nothing or a logit is not finite,
    in this order, and nothing else.
    """
    allowed = None if mask is None else mask.allowed(tokens, prompt_tokens)
    model_row: Row = logits.cpu().numpy()
    check_finite(model_row)
    row = adjusted(model_row, sampling, tokens=tokens, prompt_tokens=prompt_tokens, counts=counts)
    if allowed is not None:
        row = np.where(allowed, row, np.float32(-np.inf))
    temperature = np.float32(finite(sampling.temperature))
    if temperature <= 0.0:
        token = int(row.argmax())
    else:
        ids, weights = candidates(row, sampling)
        weights = rounded(weights, row.size)
        share = uniform(sampling.seed, choice, len(tokens))
        token = int(ids[_index_beyond(weights, share * weights.sum())])
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


def units(vocab: int) -> float:
    """The number of units in the largest weight: a power of two, so that sums of ``vocab`` weights in whole
    units are exact in float64."""
    return 2.0 ** (53 - (vocab - 1).bit_length())


def rounded(weights: Weights, vocab: int) -> Weights:
    """``weights``, at most 1 each, in whole units."""
    out = weights * units(vocab)
    return np.rint(out, out=out)


def adjusted(
    row: Row, sampling: Sampling, *, tokens: Sequence[int], prompt_tokens: int, counts: TokenCounts
) -> Row:
    """Returns ``row``, or a copy with bias and penalties applied; finite if ``row`` is."""
    changes = adjustments(sampling, vocab=row.size, tokens=tokens, prompt_tokens=prompt_tokens, counts=counts)
    if changes is None:
        return row
    row = row.copy()
    adjust(row, changes)
    return row


def candidates(row: Row, sampling: Sampling) -> tuple[NDArray[np.intp], Weights]:
    """Returns the token ids that may be drawn, ascending, and their weights, f64; the largest weight is 1.

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
    # In float32 the last bits differ between numpy and PyTorch, and from device to device.
    weights = np.exp(logits, dtype=np.float64)
    if sampling.top_p < 1.0:
        kept = _nucleus(logits, weights, max(sampling.top_p, 0.0), row.size)
        ids, logits, weights = kept if ids is None else ids[kept], logits[kept], weights[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(logits >= least_logit(sampling.min_p))
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return np.arange(row.size) if ids is None else ids, weights


def least_logit(min_p: float) -> np.float64:
    """The least logit, below the largest and divided by the temperature, that ``min_p`` keeps; -inf: all.

    Logits are compared, not weights, whose last bits differ between numpy and PyTorch."""
    return np.log(np.float64(min(min_p, 1.0))) if min_p > 0.0 else np.float64(-np.inf)


def _nucleus(logits: Row, weights: Weights, top_p: float, vocab: int) -> NDArray[np.intp]:
    """Returns the indices of the smallest set of likeliest tokens whose weights reach ``top_p`` of the total.

    Among equal logits the first ones are in the set.
    """
    weights = rounded(weights, vocab)
    total = weights.sum()
    # All weights below this bound together are less than 1 - top_p of the total, so none of them is in the
    # set. For most rows a few hundred weights remain to be sorted. 0.999: the bound is rounded.
    large = np.flatnonzero(weights >= 0.999 * total * (1.0 - top_p) / weights.size)
    large_logits = logits[large]
    descending = -np.sort(-large_logits)
    count = 1 + _index_beyond(
        rounded(np.exp(descending, dtype=np.float64), vocab), top_p * total, or_equal=True
    )
    smallest = descending[count - 1]
    inside = large_logits >= smallest
    surplus = int(np.count_nonzero(inside)) - count
    equal = np.flatnonzero(large_logits == smallest)
    inside[equal[len(equal) - surplus :]] = False
    return large[inside]


def _index_beyond(weights: Weights, target: float, *, or_equal: bool = False) -> int:
    """Returns the first index at which the running sum of ``weights`` exceeds ``target``.

    With ``or_equal``, reaching it suffices. ``weights`` are in whole units, and their sum exceeds ``target``,
    or reaches it. The weight at the index is above 0, unless ``target`` is 0 and may be reached.
    """
    side: Literal["left", "right"] = "left" if or_equal else "right"
    sums = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)).cumsum()
    block = int(sums.searchsorted(target, side=side))
    first = block * _BLOCK
    inside = weights[first : first + _BLOCK].cumsum()
    return first + int(inside.searchsorted(target - (sums[block - 1] if block else 0.0), side=side))
