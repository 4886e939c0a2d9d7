"""Log-probabilities of a row of logits: of one token, and of the likeliest ones.

Called by ``decode.sampler`` for drawn tokens and by ``prefill.segment`` for those of a prompt. They are the
model's own: natural logarithms, before bias, penalties and temperature. It must not know sequences. It uses
numpy: sorting and summing one row of 49K logits takes a tenth of PyTorch's time.
"""

from math import isfinite
from typing import NamedTuple

import numpy as np

from farshore.errors import FarshoreError
from farshore.workers.engine.penalties import Row

DAMAGED = "the model's logits are not numbers: its weights or the stored KV are damaged"
"""The message of the error for logits that are not finite."""


class Logprobs(NamedTuple):
    """``logprob``: of the token. ``top``: (token id, log-probability) of the likeliest tokens, best first;
    among equal logits the smallest id is first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def check_finite(logits: Row) -> None:
    """Raises FarshoreError if a logit is not finite. ``logits``: any number of rows."""
    # max() and min() both return NaN if there is one.
    if not (isfinite(logits.max()) and isfinite(logits.min())):
        raise FarshoreError(DAMAGED)


def logprobs_of(row: Row, token: int, *, alternatives: int) -> Logprobs:
    """The log-probabilities of ``token`` and of as many of the likeliest tokens as ``alternatives`` says.
    ``row``: f32[vocab], finite."""
    largest = float(row.max())
    with np.errstate(over="ignore", under="ignore"):
        log_sum = largest + float(np.log(np.exp(row - np.float32(largest), dtype=np.float64).sum()))
    top: tuple[tuple[int, float], ...] = ()
    count = min(alternatives, row.size)
    if count > 0:
        kth = np.partition(row, -count)[-count]
        ids = np.flatnonzero(row >= kth)
        ids = ids[np.argsort(-row[ids], kind="stable")][:count]
        top = tuple((int(id), float(row[id]) - log_sum) for id in ids)
    return Logprobs(float(row[token]) - log_sum, top)


def rank_of(row: Row, token: int) -> int:
    """1 for the likeliest token; equally likely ones have the same rank."""
    return 1 + int(np.count_nonzero(row > row[token]))
