"""From logits to the next token.

What a row goes through, in this order::

    logits ─▶ bias ─▶ repetition penalty ─▶ presence, frequency penalties ─▶ greedy: the likeliest
      │                                                                  └─▶ temperature ─▶ top-k ─▶ top-p
      └─▶ log-probabilities: of the model itself                                   ─▶ min-p ─▶ draw

Bias and penalties before temperature, as vLLM does; top-k, top-p, min-p as transformers does, each on what
the one before it left. Log-probabilities are those of the untouched logits, vLLM's default. Whatever finite
numbers a request asks for, some token with a weight above 0 is drawn: adjusted logits stay in float32's
range, each knob is taken as the nearest value that means something, and of equal logits greedy takes the
smallest id.

A draw takes one random number, a hash of (seed, choice, position): a step that is run again, on this engine
or another, in whatever batch, draws the same token. Called by ``engine``; must not know sequences or batches.
numpy, since its sort and its sums of one row of 49K take a tenth of PyTorch's time.
"""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farshore.errors import FarshoreError
from farshore.workers.engine.penalties import (
    Row,
    Seen,
    add_bias,
    finite,
    penalise_counts,
    penalise_repetition,
)
from farshore.workers.engine.sequence import Sampling

_BLOCK = 256
"""Values added up at a time, so that a draw needs running sums of one block and of the blocks' sums only."""

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio


class Choice(NamedTuple):
    """``logprob`` of ``token`` and the likeliest ``top`` (token, logprob), best first: natural logarithms, of
    the model's distribution before bias, penalties and temperature. None and empty where not asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Tensor,
    sampling: Sampling,
    *,
    tokens: Sequence[int],
    prompt_tokens: int,
    seen: Seen,
    choice: int = 0,
) -> Choice:
    """logits ``f32[vocab]``, left as they are, -> the token behind ``tokens``, of which the first
    ``prompt_tokens`` are the prompt. ``seen`` is the sequence's, and follows ``tokens`` where penalties need
    it. ``choice``: which of the request's ``n`` completions this is.

    Raises FarshoreError for logits that are not numbers, and nothing else.
    """
    own: Row = logits.cpu().numpy()
    # NaN is both the largest and the smallest.
    if not (isfinite(own.max()) and isfinite(own.min())):
        raise FarshoreError("the model's logits are not numbers: its weights or the stored KV are damaged")
    row = adjusted(own, sampling, tokens=tokens, prompt_tokens=prompt_tokens, seen=seen)
    temperature = np.float32(finite(sampling.temperature))
    if temperature <= 0.0:
        token = int(row.argmax())
    else:
        ids, weights = candidates(row, sampling)
        token = int(ids[_reaching(weights, uniform(sampling.seed, choice, len(tokens)))])
    if sampling.logprobs is None:
        return Choice(token)
    return _with_logprobs(own, token, sampling.logprobs)


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of a key: its words go one after another through splitmix64's finaliser."""
    word = 0
    for key in (seed, choice, position):
        word = _mixed((word + _GOLDEN * (key + 1)) & _WORD)
    # 52 bits: times a sum in float64 it stays below that sum, whatever the rounding.
    return (word >> 12) * 2.0**-52


def _mixed(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def adjusted(row: Row, sampling: Sampling, *, tokens: Sequence[int], prompt_tokens: int, seen: Seen) -> Row:
    """``row`` itself, or a copy with bias and penalties applied, finite like ``row``.

    Repetition counts tokens of prompt and completion; presence and frequency the completion's alone.
    """
    counted = sampling.presence_penalty or sampling.frequency_penalty
    repeated = sampling.repetition_penalty != 1.0
    if not (sampling.logit_bias or repeated or counted):
        return row
    row = row.copy()
    if sampling.logit_bias:
        add_bias(row, sampling.logit_bias)
    if repeated or counted:
        seen.follow(tokens, prompt_tokens)
    if repeated:
        penalise_repetition(row, seen.ids, sampling.repetition_penalty)
    if counted:
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        penalise_counts(row, *seen.generated, presence=presence, frequency=frequency)
    return row


def candidates(row: Row, sampling: Sampling) -> tuple[NDArray[np.intp], Row]:
    """Token ids that may be drawn, ascending and never none, and their weights: the likeliest's is 1. The
    temperature is above 0."""
    # Largest first subtracted: nothing overflows but to -inf, a weight of 0, however low the temperature.
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
    """Indices of the smallest set of heaviest ones that holds ``top_p`` of the weight; of equal ones the
    first."""
    total = weights.sum(dtype=np.float64)
    # Those that weigh less than this weigh less than 1 - top_p together: none of them is inside. Of most rows
    # a few hundred are left to sort.
    in_question = np.flatnonzero(weights >= np.float32(total * (1.0 - top_p) / weights.size))
    candidates = weights[in_question]
    heaviest = np.sort(candidates)[::-1]
    count = 1 + _reaching(heaviest, top_p * total / heaviest.sum(dtype=np.float64), exactly=True)
    lightest = heaviest[count - 1]
    equal = np.flatnonzero(candidates == lightest)
    surplus = int(np.count_nonzero(candidates >= lightest)) - count
    inside = candidates >= lightest
    inside[equal[len(equal) - surplus :]] = False
    return in_question[inside]


def _reaching(weights: Row, share: float, *, exactly: bool = False) -> int:
    """The first index at which the running sum of the weights goes beyond ``share`` of their sum, or with
    ``exactly`` reaches it; its weight is above 0, as the sum is."""
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64)
    sums = blocks.cumsum()
    target = share * sums[-1]
    block = _first_reaching(sums, target, exactly=exactly)
    first = block * _BLOCK
    inside = weights[first : first + _BLOCK].cumsum(dtype=np.float64)
    return first + _first_reaching(inside, target - (sums[block - 1] if block else 0.0), exactly=exactly)


def _first_reaching(sums: NDArray[np.float64], target: float, *, exactly: bool) -> int:
    """The first index at which the running ``sums`` are above ``target`` (or with ``exactly`` equal to it),
    but never one beyond the last that adds to them: two ways of adding up may differ in the last bit."""
    index = int(np.searchsorted(sums, target, side="left" if exactly else "right"))
    return min(index, int(np.searchsorted(sums, sums[-1], side="left")))


def _with_logprobs(own: Row, token: int, count: int) -> Choice:
    """``count`` alternatives, or as many as the vocabulary has."""
    largest = float(own.max())
    with np.errstate(over="ignore"):
        log_sum = largest + float(np.log(np.exp(own - np.float32(largest)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    count = min(count, own.size)
    if count > 0:
        kth = np.partition(own, -count)[-count]
        ids = np.flatnonzero(own >= kth)
        ids = ids[np.argsort(-own[ids], kind="stable")][:count]
        top = tuple((int(id), float(own[id]) - log_sum) for id in ids)
    return Choice(token, float(own[token]) - log_sum, top)
