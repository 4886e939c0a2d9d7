"""Bias and penalties: which logits they change and by how much, and the counts of token ids that they need.

Each sequence keeps one :class:`TokenCounts`: counting a whole context anew for each token costs 0.8 ms at 32K
tokens; updating the counts costs only the new tokens. :func:`adjustments` says what a row's options change;
``decode.sampler`` applies it to a row in host memory, ``decode.device_sampler`` to a batch on a device. Both
keep finite logits finite: a value outside float32's range becomes the largest or smallest float32. Logits
that reach that limit are ties. It must not know sequences or how a token is drawn.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farshore.sampling import Sampling

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
        self.truncate(len(tokens) - prompt_tokens)
        for token in tokens[prompt_tokens + len(self._completion) :]:
            self._add(token)

    def truncate(self, completion_tokens: int) -> None:
        """Forgets the tokens of the completion from index ``completion_tokens`` on: others may follow."""
        while len(self._completion) > completion_tokens:
            self._remove_last()

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


class Adjustments(NamedTuple):
    """What one row's options change, in this order. Ids are distinct within a field and in the vocabulary."""

    bias: tuple[Ids, Row]
    """Token ids, and what is added to their logits."""
    repeated: tuple[Ids, np.float32]
    """Token ids, and the factor: it divides positive logits and multiplies the others (CTRL, Keskar et al.
    2019, section 4.1)."""
    counted: tuple[Ids, Row]
    """Token ids, and what is subtracted: ``presence + frequency * count`` (OpenAI's formula)."""

    def copy(self) -> "Adjustments":
        """A copy that stays as it is when the counts change."""
        ids, factor = self.repeated
        return self._replace(repeated=(ids.copy(), factor), counted=(self.counted[0].copy(), self.counted[1]))


NO_IDS: Ids = np.empty(0, dtype=np.int64)
NO_VALUES: Row = np.empty(0, dtype=np.float32)


def adjustments(
    sampling: Sampling, *, vocab: int, tokens: Sequence[int], prompt_tokens: int, counts: TokenCounts
) -> Adjustments | None:
    """What ``sampling`` changes in the logits of the token after ``tokens``; None: nothing.

    ``counts`` is updated if a penalty needs it. The repetition penalty counts prompt and completion; the
    presence and frequency penalties count the completion only.
    """
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    penalised = presence or frequency
    repeated = sampling.repetition_penalty != 1.0
    if not (sampling.logit_bias or repeated or penalised):
        return None
    if repeated or penalised:
        counts.update(tokens, prompt_tokens)
    found = Adjustments((NO_IDS, NO_VALUES), (NO_IDS, np.float32(1.0)), (NO_IDS, NO_VALUES))
    if sampling.logit_bias:
        found = found._replace(bias=_biases(sampling.logit_bias, vocab))
    if repeated:
        ids = counts.ids
        factor = np.float32(finite(sampling.repetition_penalty))
        found = found._replace(repeated=(ids[_inside(ids, vocab)], factor))
    if penalised:
        ids, times = counts.generated
        inside = _inside(ids, vocab)
        with np.errstate(over="ignore"):
            amounts = finite(presence) + finite(frequency) * times[inside]
        found = found._replace(counted=(ids[inside], amounts))
    return found


def adjust(row: Row, changes: Adjustments) -> None:
    """Applies ``changes`` to ``row``, f32[vocab], in place."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ids, values = changes.bias
        _put(row, ids, row[ids] + values)
        ids, factor = changes.repeated
        logits = row[ids]
        _put(row, ids, np.where(logits > 0, logits / factor, logits * factor))
        ids, values = changes.counted
        _put(row, ids, row[ids] - values)


def finite(value: float) -> float:
    """Clips ``value`` to float32's range."""
    return min(max(value, -LARGEST), LARGEST)


def _biases(biases: Mapping[int, float], vocab: int) -> tuple[Ids, Row]:
    inside = {id: bias for id, bias in biases.items() if 0 <= id < vocab}
    ids = np.fromiter(inside.keys(), dtype=np.int64, count=len(inside))
    values = np.fromiter(inside.values(), dtype=np.float64, count=len(inside))
    return ids, np.clip(values, -LARGEST, LARGEST).astype(np.float32)


def _inside(ids: Ids, vocab: int) -> slice | NDArray[np.bool_]:
    """Selects the ids that are in the vocabulary, as a copy only if some are not."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        selected: NDArray[np.bool_] = (ids >= 0) & (ids < vocab)
        return selected
    return slice(None)


def _put(row: Row, ids: Ids, values: Row) -> None:
    if ids.size:
        row[ids] = np.clip(values, -LARGEST, LARGEST)
