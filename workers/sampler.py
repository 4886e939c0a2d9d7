"""From logits to the next token.

What a row goes through, in this order::

    logits ─▶ bias ─▶ repetition penalty ─▶ presence, frequency penalties ─▶ greedy: the likeliest
      │                                                                  └─▶ temperature ─▶ top-k ─▶ top-p
      └─▶ log-probabilities: of the model itself                                   ─▶ min-p ─▶ draw

Bias and penalties before temperature, as vLLM does; top-k, top-p, min-p as transformers does, each on what
the one before it left. Log-probabilities are those of the untouched logits, vLLM's default.

A draw takes one random number, a hash of (seed, choice, position): a step that is run again, on this engine
or another, in whatever batch, draws the same token. Called by ``engine``; must not know sequences or batches.
numpy, since its sort and its sums of one row of 49K take a tenth of PyTorch's time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from farshore.errors import FarshoreError
from farshore.workers.sequence import Sampling

Row = NDArray[np.float32]

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
    logits: Tensor, sampling: Sampling, *, tokens: Sequence[int], prompt_tokens: int, choice: int = 0
) -> Choice:
    """logits ``f32[vocab]``, left as they are, -> the token behind ``tokens``, of which the first
    ``prompt_tokens`` are the prompt. ``choice``: which of the request's ``n`` completions this is.

    Raises FarshoreError for logits that are not numbers.
    """
    own: Row = logits.cpu().numpy()
    row = adjusted(own, sampling, tokens=tokens, prompt_tokens=prompt_tokens)
    best = int(row.argmax())
    # A NaN is its own argmax: nothing else needs to look for one.
    if not np.isfinite(row[best]):
        raise FarshoreError("the model's logits are not numbers: its weights or the stored KV are damaged")
    if sampling.temperature == 0.0:
        token = best
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


def adjusted(row: Row, sampling: Sampling, *, tokens: Sequence[int], prompt_tokens: int) -> Row:
    """``row`` itself, or a copy with bias and penalties applied.

    Repetition (CTRL, Keskar et al. 2019, §4.1): a token seen in prompt or completion is divided by the
    penalty where positive, multiplied where negative. Presence and frequency (OpenAI): a token is lowered by
    the one where the completion holds it, and by the other for every time that it does.
    """
    counted = sampling.presence_penalty or sampling.frequency_penalty
    if not (sampling.logit_bias or sampling.repetition_penalty != 1.0 or counted):
        return row
    row = row.copy()
    for token, bias in sampling.logit_bias.items():
        row[token] += bias
    if sampling.repetition_penalty != 1.0:
        marks = np.zeros(row.size, dtype=bool)
        marks[np.asarray(tokens)] = True
        seen = np.flatnonzero(marks)
        values, penalty = row[seen], np.float32(sampling.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if counted and len(tokens) > prompt_tokens:
        ids, counts = np.unique(np.asarray(tokens[prompt_tokens:]), return_counts=True)
        row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts.astype(np.float32)
    return row


def candidates(row: Row, sampling: Sampling) -> tuple[NDArray[np.intp], Row]:
    """Token ids that may be drawn, ascending and never none, and their weights: the likeliest's is 1."""
    # Largest first subtracted: nothing overflows, however low the temperature.
    logits = (row - row.max()) / np.float32(sampling.temperature)
    ids = None
    if 0 < sampling.top_k < logits.size:
        kth = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(logits >= kth)
        logits = logits[ids]
    weights = np.exp(logits)
    if sampling.top_p < 1.0:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(weights >= np.float32(sampling.min_p))
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
    ``exactly`` reaches it."""
    side = "left" if exactly else "right"
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64)
    sums = blocks.cumsum()
    target = share * sums[-1]
    block = min(int(np.searchsorted(sums, target, side=side)), len(sums) - 1)
    first = block * _BLOCK
    inside = weights[first : first + _BLOCK].cumsum(dtype=np.float64)
    if block:
        target -= sums[block - 1]
    index = int(np.searchsorted(inside, target, side=side))
    # The two ways of adding up may differ in the last bit: beyond the block's end is its last weight.
    return first + (index if index < inside.size else int(np.flatnonzero(inside < inside[-1])[-1]) + 1)


def _with_logprobs(own: Row, token: int, count: int) -> Choice:
    largest = float(own.max())
    log_sum = largest + float(np.log(np.exp(own - np.float32(largest)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        kth = np.partition(own, -count)[-count]
        ids = np.flatnonzero(own >= kth)
        ids = ids[np.argsort(-own[ids], kind="stable")][:count]
        top = tuple((int(id), float(own[id]) - log_sum) for id in ids)
    return Choice(token, float(own[token]) - log_sum, top)
