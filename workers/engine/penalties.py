"""Bias and penalties on one row of logits, and the counts of token ids that penalties need.

Called by ``decode.sampler``. Each sequence keeps one :class:`TokenCounts`: counting a whole context anew for
each token costs 0.8 ms at 32K tokens; updating the counts costs only the new tokens. It must not know
sequences or how a token is drawn.

Every function changes the row in index, ignores ids outside the vocabulary, and keeps finite logits finite: a
value outside float32's range becomes the largest or smallest float32. Logits that reach that limit are ties.
"""

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.int64]

LARGEST = float(np.finfo(np.float32).max)


class TokenCounts:
    """The distinct token ids of a sequence, and the count of each id in its completion.

    Ids are in order of first occurrence. Not thread-safe: only the engine's thread uses it.
    """

    def __init__(self) -> None:
        self._start((), 0)

    @property
    def ids(self) -> Ids:
        """Distinct ids of prompt and completion, i64. A view: do not keep it past the next ``update``."""
        return np.asarray(self._ids)

    @property
    def generated(self) -> tuple[Ids, Row]:
        """(distinct ids of the completion, i64; their counts, f32). Views, as ``ids``."""
        return np.asarray(self._generated), np.asarray(self._counts)

    def update(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Counts ``tokens``, whose first ``prompt_tokens`` are the prompt.

        The time is proportional to the difference from the last call. Between two calls the completion may be
        extended or truncated, but not truncated and then extended: only its length is compared.
        """
        if prompt_tokens != self._prompt_tokens:
            self._start(tokens[:prompt_tokens], prompt_tokens)
        while len(self._completion) > len(tokens) - prompt_tokens:
            self._remove_last()
        for token in tokens[prompt_tokens + len(self._completion) :]:
            self._add(token)

    def copy(self) -> "TokenCounts":
        """Returns an independent copy, for a fork."""
        copy = TokenCounts()
        copy._prompt_tokens, copy._prompt_ids = self._prompt_tokens, self._prompt_ids
        copy._ids, copy._completion = self._ids[:], self._completion[:]
        copy._index_of = dict(self._index_of)
        copy._generated, copy._counts = self._generated[:], self._counts[:]
        return copy

    def _start(self, prompt: Sequence[int], prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._ids = array("q", dict.fromkeys(prompt))
        self._prompt_ids = frozenset(self._ids)
        self._completion = array("q")
        self._index_of: dict[int, int] = {}
        """Token id -> its index in ``_generated`` and ``_counts``."""
        self._generated = array("q")
        self._counts = array("f")

    def _add(self, token: int) -> None:
        self._completion.append(token)
        index = self._index_of.setdefault(token, len(self._generated))
        if index < len(self._generated):
            self._counts[index] += 1
            return
        self._generated.append(token)
        self._counts.append(1)
        if token not in self._prompt_ids:
            self._ids.append(token)

    def _remove_last(self) -> None:
        token = self._completion.pop()
        index = self._index_of[token]
        self._counts[index] -= 1
        if self._counts[index]:
            return
        # Ids that first occurred after this token are already removed, so this id is the last of every list.
        del self._index_of[token]
        self._generated.pop()
        self._counts.pop()
        if token not in self._prompt_ids:
            self._ids.pop()


def add_bias(row: Row, biases: Mapping[int, float]) -> None:
    """Adds ``biases[id]`` to the logit of each id."""
    inside = {id: bias for id, bias in biases.items() if 0 <= id < row.size}
    ids = np.fromiter(inside.keys(), dtype=np.int64, count=len(inside))
    values = np.fromiter(inside.values(), dtype=np.float64, count=len(inside))
    with np.errstate(over="ignore"):
        _put(row, ids, row[ids] + np.clip(values, -LARGEST, LARGEST).astype(np.float32))


def penalise_repetition(row: Row, ids: Ids, penalty: float) -> None:
    """Divides the positive logits of ``ids`` by ``penalty`` and multiplies the others by it.

    Source: CTRL, Keskar et al. 2019, section 4.1.
    """
    ids = _inside(row, ids)
    values, factor = row[ids], np.float32(finite(penalty))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        _put(row, ids, np.where(values > 0, values / factor, values * factor))


def penalise_counts(row: Row, ids: Ids, counts: Row, *, presence: float, frequency: float) -> None:
    """Subtracts ``presence + frequency * count`` from the logit of each id (OpenAI's formula)."""
    inside = _inside(row, ids)
    if inside.size < ids.size:
        counts = counts[(ids >= 0) & (ids < row.size)]
    with np.errstate(over="ignore"):
        _put(row, inside, row[inside] - (finite(presence) + finite(frequency) * counts))


def _inside(row: Row, ids: Ids) -> Ids:
    """Returns the ids that are in the vocabulary."""
    if ids.size and (ids.min() < 0 or ids.max() >= row.size):
        return ids[(ids >= 0) & (ids < row.size)]
    return ids


def finite(value: float) -> float:
    """Clips ``value`` to float32's range."""
    return min(max(value, -LARGEST), LARGEST)


def _put(row: Row, ids: Ids, values: Row) -> None:
    row[ids] = np.clip(values, -LARGEST, LARGEST)
