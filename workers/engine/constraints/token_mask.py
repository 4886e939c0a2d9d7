"""Which tokens a completion may draw next: by its grammar, and by the options that forbid tokens.

Kept by each sequence that needs one; asked by ``step_entry`` before a draw. It must not know how a token is
drawn.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farshore.errors import FarshoreError
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.grammar import Grammar

Mask = NDArray[np.bool_]


class TokenMask:
    """The restrictions of one completion. Not thread-safe.

    The grammar and ``allowed_token_ids`` always hold. ``min_tokens`` and ``bad_words`` hold as long as they
    leave a token: a finished object may be all that a grammar allows.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocab: int,
        bad_words: Sequence[tuple[int, ...]] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """``bad_words``: sequences of token ids that must not come."""
        self._sampling = sampling
        self._vocab = vocab
        self._bad_words = bad_words
        self._grammar = grammar
        self._allowed: Mask | None = None
        if sampling.allowed_token_ids:
            self._allowed = np.zeros(vocab, dtype=np.bool_)
            self._allowed[_inside(sampling.allowed_token_ids, vocab)] = True
        self._stops = _inside(sampling.stop_token_ids, vocab)

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        *,
        vocab: int,
        bad_words: Sequence[tuple[int, ...]] = (),
        grammar: Grammar | None = None,
    ) -> "TokenMask | None":
        """None if nothing restricts the completion."""
        if not (sampling.allowed_token_ids or sampling.min_tokens or bad_words or grammar is not None):
            return None
        return cls(sampling, vocab=vocab, bad_words=bad_words, grammar=grammar)

    def copy(self) -> "TokenMask":
        """An independent copy, for a fork."""
        grammar = self._grammar.copy() if self._grammar is not None else None
        return TokenMask(self._sampling, vocab=self._vocab, bad_words=self._bad_words, grammar=grammar)

    def prepare(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Begins to compute the next mask. Never blocks for long."""
        if self._grammar is not None:
            self._grammar.prepare(tokens, prompt_tokens)

    def truncate(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Forgets the tokens behind ``tokens`` that masks were computed for: others may follow."""
        if self._grammar is not None:
            self._grammar.truncate(tokens, prompt_tokens)

    def allowed(self, tokens: Sequence[int], prompt_tokens: int) -> Mask:
        """Which tokens may follow ``tokens``, the prompt and the completion so far: bool[vocab], not to be
        changed. At least one may. Raises FarshoreError if none may."""
        mask = self._allowed
        if self._grammar is not None:
            by_grammar = self._grammar.mask(tokens, prompt_tokens)
            mask = by_grammar if mask is None else mask & by_grammar
        if mask is None:
            mask = np.ones(self._vocab, dtype=np.bool_)
        if not mask.any():
            raise FarshoreError("no token may follow: allowed_token_ids leaves the grammar none")
        if len(tokens) - prompt_tokens < self._sampling.min_tokens:
            mask = _without(mask, self._stops)
        return _without(mask, self._ends_of_bad_words(tokens, prompt_tokens))

    def _ends_of_bad_words(self, tokens: Sequence[int], prompt_tokens: int) -> list[int]:
        """The tokens that would complete a bad word."""
        completion = len(tokens) - prompt_tokens
        ends = []
        for word in self._bad_words:
            before = len(word) - 1
            if before <= completion and tuple(tokens[len(tokens) - before :]) == word[:-1]:
                ends.append(word[-1])
        return [end for end in ends if end < self._vocab]


def _inside(ids: Sequence[int] | frozenset[int], vocab: int) -> list[int]:
    return [token for token in ids if token < vocab]


def _without(mask: Mask, ids: Sequence[int]) -> Mask:
    """``mask`` without these ids, unless nothing would remain."""
    if not ids:
        return mask
    less = mask.copy()
    less[ids] = False
    return less if less.any() else mask
