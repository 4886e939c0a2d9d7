"""Bias and penalties on a row of logits, and the counts of token ids that they need.

Called by ``sampler``. A sequence keeps one :class:`Seen`: recounting its whole context for every token costs
0.8 ms at 32K tokens, following it costs what is new. Must not know sequences or how a token is drawn.

Every function changes the row in place, ignores ids outside the vocabulary, and leaves finite logits finite:
what float32 cannot hold becomes its largest or smallest number. Logits that end there are ties.
"""

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.int64]

LARGEST = float(np.finfo(np.float32).max)


class Seen:
    """Which token ids a sequence holds, and how often its completion holds each, in order of first sight.

    For one thread, the engine's.
    """

    def __init__(self) -> None:
        self._start((), 0)

    @property
    def ids(self) -> Ids:
        """Ids of prompt and completion, each once. A view: drop it before the next ``follow``."""
        return np.asarray(self._ids)

    @property
    def generated(self) -> tuple[Ids, Row]:
        """Ids of the completion, each once, and how often it holds them; views as ``ids``."""
        return np.asarray(self._generated), np.asarray(self._counts)

    def follow(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Counts ``tokens``, of which the first ``prompt_tokens`` are the prompt, in time that grows with
        the difference to the last call's.

        The completion may have been cut since then, but must not have grown again before this call: what
        was cut is told by the length alone.
        """
        if prompt_tokens != self._prompt_tokens:
            self._start(tokens[:prompt_tokens], prompt_tokens)
        while len(self._completion) > len(tokens) - prompt_tokens:
            self._forget_last()
        for token in tokens[prompt_tokens + len(self._completion) :]:
            self._add(token)

    def copy(self) -> "Seen":
        """The same counts, for a fork: each follows its own completion from here on."""
        copy = Seen()
        copy._prompt_tokens, copy._prompt_ids = self._prompt_tokens, self._prompt_ids
        copy._ids, copy._completion = self._ids[:], self._completion[:]
        copy._places = dict(self._places)
        copy._generated, copy._counts = self._generated[:], self._counts[:]
        return copy

    def _start(self, prompt: Sequence[int], prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._ids = array("q", dict.fromkeys(prompt))
        self._prompt_ids = frozenset(self._ids)
        self._completion = array("q")
        self._places: dict[int, int] = {}  # id -> its index in the next two
        self._generated = array("q")
        self._counts = array("f")

    def _add(self, token: int) -> None:
        self._completion.append(token)
        place = self._places.setdefault(token, len(self._generated))
        if place < len(self._generated):
            self._counts[place] += 1
            return
        self._generated.append(token)
        self._counts.append(1)
        if token not in self._prompt_ids:
            self._ids.append(token)

    def _forget_last(self) -> None:
        token = self._completion.pop()
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place]:
            return
        # Everything first seen behind this token is forgotten already, so it is the last in every list.
        del self._places[token]
        self._generated.pop()
        self._counts.pop()
        if token not in self._prompt_ids:
            self._ids.pop()


def add_bias(row: Row, biases: Mapping[int, float]) -> None:
    """Adds to the logits of the given ids."""
    inside = {id: bias for id, bias in biases.items() if 0 <= id < row.size}
    ids = np.fromiter(inside.keys(), dtype=np.int64, count=len(inside))
    values = np.fromiter(inside.values(), dtype=np.float64, count=len(inside))
    with np.errstate(over="ignore"):
        _put(row, ids, row[ids] + np.clip(values, -LARGEST, LARGEST).astype(np.float32))


def penalise_repetition(row: Row, ids: Ids, penalty: float) -> None:
    """Divides the logits of ``ids`` by the penalty where positive, else multiplies (CTRL, Keskar et al. 2019,
    §4.1)."""
    ids = _inside(row, ids)
    values, factor = row[ids], np.float32(finite(penalty))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        _put(row, ids, np.where(values > 0, values / factor, values * factor))


def penalise_counts(row: Row, ids: Ids, counts: Row, *, presence: float, frequency: float) -> None:
    """Lowers the logits of ``ids`` by ``presence``, and by ``frequency`` times their counts (OpenAI)."""
    inside = _inside(row, ids)
    if inside.size < ids.size:
        counts = counts[(ids >= 0) & (ids < row.size)]
    with np.errstate(over="ignore"):
        _put(row, inside, row[inside] - (finite(presence) + finite(frequency) * counts))


def _inside(row: Row, ids: Ids) -> Ids:
    """Those of ``ids`` that are in the vocabulary."""
    if ids.size and (ids.min() < 0 or ids.max() >= row.size):
        return ids[(ids >= 0) & (ids < row.size)]
    return ids


def finite(value: float) -> float:
    """``value`` in float32's range."""
    return min(max(value, -LARGEST), LARGEST)


def _put(row: Row, ids: Ids, values: Row) -> None:
    row[ids] = np.clip(values, -LARGEST, LARGEST)
